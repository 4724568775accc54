"""Spark Connect: a session on a server that is elsewhere, with no Java and no SparkContext on this side."""

import hashlib
import os
import re
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from shoal.conf.errors import ConfigError, RunError, first_line
from shoal.conf.redact import is_secret_name
from shoal.conf.run import RunConfig, SparkConfig
from shoal.jobs.shoal_zip import pack_shoal

ADDRESS = "SPARK_REMOTE"
"""Spark's own environment variable with the address of a server."""

DEFAULT_PORT = 15002
PATIENCE_S = 10.0
ABSENCE_S = 120.0
"""How long a server may not answer before a run gives up, whatever it was doing."""


def is_remote(spark: SparkSession) -> bool:
    """Whether a session is a client of Spark Connect."""
    return type(spark).__module__.startswith("pyspark.sql.connect")


def on_databricks() -> bool:
    """Whether this process is a driver on a cluster of Databricks, by the variable that its runtime sets."""
    return "DATABRICKS_RUNTIME_VERSION" in os.environ


def without_java(spark: SparkSession) -> bool:
    """Whether Shoal has no Java to ask, or one that is not the open one: Databricks' Delta has classes of its own."""
    return is_remote(spark) or on_databricks()


def address_of(settings: SparkConfig) -> str | None:
    """The server that a session is to be opened on; None for a Spark of our own.

    A master in the run file is one that somebody has decided on: then the environment has no say.
    """
    return settings.remote or (None if settings.master else os.environ.get(ADDRESS))


def without_token(address: str) -> str:
    """Scheme, host and port of a server's address: a token may be anywhere else in it, by a slip too."""
    scheme, separator, rest = address.partition("://")
    return scheme + separator + re.split("[/;?]", rest)[0].rpartition("@")[2]


def _said(error: Exception, address: str) -> str:
    """What an error of the client says, without what the address holds besides the server."""
    found = re.search('details = "(.*)"', str(error))
    text = found[1] if found else first_line(error)
    for part in sorted(re.split("[/;?@]", address.partition("://")[2])[1:], key=len, reverse=True):
        value = part.partition("=")[2]
        for secret in (part, value, unquote(value)):
            text = text.replace(secret, "***") if len(secret) > len("false") else text
    return text


def open_remote(address: str, settings: SparkConfig, defaults: Mapping[str, str]) -> SparkSession:
    """A session on the server, whose workers get Shoal; defaults: what it is told unless the server was configured so.

    Raises ConfigError for settings that belong to the server, and where the client's packages are missing; RunError
    where nobody answers.
    """
    server = without_token(address)
    _require_listener(server)
    try:
        spark = SparkSession.builder.remote(address).getOrCreate()
        spark.conf.getAll  # noqa: B018 - the first thing that the server is asked
    except ImportError as error:
        raise ConfigError(
            f"spark.remote is {server}, and a client of Spark Connect needs more packages ({first_line(error)}); "
            "pip install 'shoal[connect]'"
        ) from error
    except Exception as error:  # noqa: BLE001 - whatever it is, its own trace may show the token
        raise RunError(
            f"spark.remote {server}: no session could be opened ({_said(error, address)}); an address is "
            "sc://HOST:PORT, or sc://HOST:PORT/;token=${NAME}, or sc://HOST:PORT/;use_ssl=true",
            code="SPARK_UNAVAILABLE",
        ) from None
    _limit_retries(spark)
    _settle(spark, settings, defaults, f"the server at {server}")
    _send_shoal(spark)
    return spark


def _limit_retries(spark: SparkSession) -> None:
    """Has the client give a server up once, after `ABSENCE_S`; its own policy waits ten minutes, in each call anew."""
    # Needs packages that only a client has.
    from pyspark.sql.connect.client.retries import DefaultPolicy, RetryPolicyState

    # The error is told anyway, and with it what to do.
    warnings.filterwarnings("ignore", r"\[RETRIES_EXCEEDED\]")

    class Patience(RetryPolicyState):
        def __init__(self, policy: DefaultPolicy) -> None:
            super().__init__(policy)
            self._end: float | None = None

        def next_attempt(self, *args: Any) -> int | None:
            now = time.monotonic()
            self._end = self._end or now + ABSENCE_S
            if now >= self._end:
                cast(Once, self.policy).is_over = True
                return None
            return super().next_attempt(*args)

    class Once(DefaultPolicy):
        def __init__(self) -> None:
            super().__init__(max_retries=None, max_backoff=5000)
            self.is_over = False

        def can_retry(self, e: BaseException) -> bool:
            return not self.is_over and super().can_retry(e)

        def to_state(self) -> RetryPolicyState:
            return Patience(self)

    cast(Any, spark).client.set_retry_policies([Once()])


def open_on_databricks(settings: SparkConfig, defaults: Mapping[str, str]) -> SparkSession:
    """The session of the cluster that this process is a driver on, whose workers get Shoal; else as `open_remote`."""
    spark = SparkSession.getActiveSession() or SparkSession.builder.getOrCreate()
    _settle(spark, settings, defaults, "the cluster")
    _send_shoal(spark)
    return spark


def _settle(spark: SparkSession, settings: SparkConfig, defaults: Mapping[str, str], owner: str) -> None:
    """Tells a session that is not ours what it may be told; ConfigError for settings of the user's that it may not."""
    decided = spark.conf.getAll
    for name, value in {**defaults, **settings.conf}.items():
        is_asked = name in settings.conf
        if decided.get(name) == value or (name in decided and not is_asked):
            continue
        try:
            spark.conf.set(name, value)
        except PySparkException as error:
            if is_asked:
                has = "its own" if is_secret_name(name) else repr(decided.get(name))
                raise ConfigError(
                    f"spark.conf: {name} belongs to {owner}, which has {has}; leave it out, or have it started with it"
                ) from error


def _send_shoal(spark: SparkSession) -> None:
    """Puts Shoal's zip on the path of a session's workers."""
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        packed = Path(folder) / "shoal.zip"
        pack_shoal(packed)
        if is_remote(spark):
            spark.addArtifacts(str(packed), pyfile=True)
            return
        # The driver hands out one file of a name, from one place, as long as it lives, and other runs come to it: name
        # and place are those of the contents, and executors that join later fetch it too.
        found = hashlib.sha256(packed.read_bytes()).hexdigest()[:12]
        kept = Path(tempfile.gettempdir()) / f"shoal-{os.getuid()}" / f"shoal-{found}.zip"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            part = kept.with_name(f".{kept.name}.{os.getpid()}")
            shutil.copyfile(packed, part)
            part.replace(kept)
        spark.sparkContext.addPyFile(str(kept))


def require_supported(spark: SparkSession, config: RunConfig) -> None:
    """ConfigError for what a run needs Java on this side for, where there is none."""
    if not without_java(spark):
        return
    stores = [each.model for each in (config.encoder, config.next_encoder) if each and each.form == "store"]
    for setting, found in (
        ("source.database", config.source.database is not None),
        ("encoder.model in a store", bool(stores)),
        ("index", config.index is not None),
    ):
        if found:
            raise ConfigError(
                f"{setting} does not work through Spark Connect or on Databricks, where Shoal has no Java of its own; "
                "leave it out, or run this file by `shoal submit` on another target",
                code="NOT_BY_CONNECT",
            )


def require_absolute(config: RunConfig) -> None:
    """ConfigError for what lies on this machine's disk: a driver inside the cluster runs elsewhere."""
    folder = f"{config.folder}{os.sep}"
    here = dict.fromkeys(setting for setting, path in config.named_paths if path.startswith(folder))
    if here:
        raise ConfigError(
            f"the driver is to run inside the cluster, and {', '.join(here)} lie beside the run file, on this machine, "
            "where it does not look; name an address that every node reaches, or have the driver run here (deploy_mode)"
        )


def own_address(spark: SparkSession) -> str:
    """The address of this machine on the way to the server, where its workers may reach us; of IPv4 alone.

    Where there is none, an address that nobody reaches us at.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # Sends nothing: it has the system choose the interface.
            probe.connect((socket.gethostbyname(str(spark.client.host)), DEFAULT_PORT))
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"


def _require_listener(server: str) -> None:
    """RunError where nobody listens, which the client itself would only say after minutes of trying."""
    parts = urlsplit(server)
    try:
        socket.create_connection((parts.hostname or "", parts.port or DEFAULT_PORT), timeout=PATIENCE_S).close()
    except (OSError, ValueError) as error:
        raise RunError(
            f"spark.remote {server}: no server answers there ({first_line(error)}); it is named as sc://HOST:PORT",
            code="SPARK_UNAVAILABLE",
        ) from error
