"""The SQL functions of published tables in a session, and following the tables: `sql_text.py` has what is in them.

Functions belong to one version of their table; when it has moved, they are replaced.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from shoal.conf.errors import ConfigError, ModelError, ShoalError, code_of, first_line
from shoal.conf.run import EncoderConfig
from shoal.jobs.model_files import send_model
from shoal.jobs.model_source import resolve_model
from shoal.jobs.prepare import model_cache
from shoal.jobs.served_table import ServedTable, has_been_moved, has_moved, read_served
from shoal.jobs.sql_join import NEAR
from shoal.jobs.sql_lexical import TERMS_OF
from shoal.jobs.sql_parts import CELLS, EMBED, require_vector_functions
from shoal.jobs.sql_rerank import MMR, RERANK
from shoal.jobs.sql_text import statements
from shoal.udfs.cells_udf import cells_udf
from shoal.udfs.mmr_udf import mmr_udf
from shoal.udfs.near_udf import near_udf
from shoal.udfs.query_udf import QueryEncoder, query_udf
from shoal.udfs.rerank_udf import rerank_udf
from shoal.udfs.terms_udf import query_terms_udf

logger = logging.getLogger(__name__)

_ENCODERS: WeakKeyDictionary[SparkSession, dict[str, QueryEncoder | str]] = WeakKeyDictionary()
"""What the one `shoal_embed` of a session knows, whoever made its functions."""

_BUILDS: WeakKeyDictionary[SparkSession, dict[str, npt.NDArray[np.float32]]] = WeakKeyDictionary()
"""What the one `shoal_cells` of a session knows: the centroids of builds."""


@dataclass
class Functions:
    """The functions of several tables in one Spark session; `follow` keeps them at the newest version."""

    spark: SparkSession
    tables: Mapping[str, str]
    say: Callable[[str], None]
    reranker: str | None = None
    """Folder of a cross-encoder, for all tables."""
    served: dict[str, ServedTable] = field(default_factory=dict)

    def create(self) -> None:
        """Makes the functions of all tables.

        Raises ConfigError on a Spark without vector functions, DestinationError when one of the tables is not there.
        """
        require_vector_functions(self.spark)
        for name, udf in ((TERMS_OF, query_terms_udf()), (RERANK, rerank_udf()), (MMR, mmr_udf()), (NEAR, near_udf())):
            self.spark.udf.register(name, udf)
        for name, table in self.tables.items():
            self._serve(read_served(self.spark, name, table))

    def follow(self, *, retry: bool = False) -> list[str]:
        """Names of the tables whose functions were replaced because the table has moved since.

        retry: also those whose encoder could not be had, or whose name means another folder now. A table that cannot
        be read just now keeps its functions, and is looked at again next time.
        """
        moved = []
        for name, served in list(self.served.items()):
            try:
                again = retry and (served.problem is not None or has_been_moved(self.spark, served))
                if not again and not has_moved(self.spark, served):
                    continue
                # By its full name: what the one that was given means depends on the schema that a client is in.
                self._serve(read_served(self.spark, name, str(served.ref)))
            except (ShoalError, PySparkException, Py4JJavaError) as error:
                told = first_line(error)
                self.say(f"table '{name}' still answers from version {served.version}: [{code_of(error)}] {told}")
                continue
            moved.append(name)
        return moved

    def _serve(self, served: ServedTable) -> None:
        before = self.served.get(served.name)
        if served.problem and (before is None or before.problem != served.problem):
            self.say(f"table '{served.name}' cannot be searched by text: {served.problem}")
        if served.index_problem and (before is None or before.index_problem != served.index_problem):
            self.say(f"table '{served.name}' is searched without its index: {served.index_problem}")
        # First the function that all others call; it goes on knowing the encoders of versions before.
        encoders = _ENCODERS.setdefault(self.spark, {})
        encoders[served.name] = served.encoder or served.problem or ""
        if served.encoder is not None:
            encoders[served.encoder_key] = served.encoder
            send_model(self.spark, served.encoder.spec)
        self.spark.udf.register(EMBED, query_udf(encoders))
        builds = _BUILDS.setdefault(self.spark, {})
        if served.index is not None:
            builds[served.cells_key] = served.index.centroids_CD
        # The functions of the version before are there until all have been replaced.
        kept = {each.cells_key for each in (served, before) if each is not None}
        for key in [key for key in builds if key.startswith(f"{served.name}@") and key not in kept]:
            del builds[key]
        self.spark.udf.register(CELLS, cells_udf(builds))
        for statement in statements(served, self.reranker):
            self.spark.sql(statement)
        # Last: where one of them fails, the next look makes all of them again.
        self.served[served.name] = served


def install(spark: SparkSession, tables: Mapping[str, str], reranker: str | None = None) -> Functions:
    """The functions in any session with Delta: `install(spark, {"docs": "out/docs"})`, then SQL has `docs_search`.

    reranker: a cross-encoder for `docs_rerank`, named as encoders are in a run file.
    """
    named = {name_of(name): table for name, table in tables.items()}
    if len(named) < len(tables):
        raise ConfigError(f"tables {sorted(tables)}: two of the names begin functions alike; give one another name")
    folder = None if reranker is None else reranker_folder(reranker)
    functions = Functions(spark, named, logger.warning, folder)
    functions.create()
    return functions


def reranker_folder(reference: str) -> str:
    """The folder of a cross-encoder named as an encoder is in a run file; ModelError where it leads nowhere."""
    try:
        config = EncoderConfig(model=reference)
        folder = resolve_model(config, model_cache()).folder
    except (ModelError, ValueError) as error:
        raise ModelError(f"reranker {reference!r}: {first_line(error)}", code="MODEL_NOT_FOUND") from error
    if not folder:
        raise ModelError(
            f"reranker {reference!r} is no cross-encoder; name a folder, a package, a Hub id or models:/.."
        )
    return str(Path(folder).resolve())


def name_of(text: str) -> str:
    """What functions of a table begin with: in lower case, with `_` for each run of other characters than a-z, 0-9, _.

    A digit in front gets a `t_`. ConfigError where nothing is left.
    """
    name = re.sub(r"[^a-z0-9_]+", "_", text.lower()).strip("_")
    if not name:
        raise ConfigError(f"--table {text!r} leaves no name for its functions; write NAME=TABLE")
    return f"t_{name}" if name[0].isdigit() else name


def tables_of(arguments: Sequence[str]) -> dict[str, str]:
    """Function name -> table, of `NAME=TABLE` or TABLE, whose last part is the name then."""
    tables: dict[str, str] = {}
    for argument in arguments:
        name, equals, table = argument.partition("=")
        if not equals or "/" in name:
            name, table = re.split(r"[/.]", argument.rstrip("/"))[-1], argument
        if not table:
            raise ConfigError(f"--table {argument!r} names no table; write NAME=PATH or NAME=CATALOG_NAME")
        name = name_of(name)
        if name in tables:
            raise ConfigError(
                f"--table {argument!r}: functions named {name}_.. are those of {tables[name]!r} already; "
                "give it another name, as OTHER=TABLE"
            )
        tables[name] = table
    return tables
