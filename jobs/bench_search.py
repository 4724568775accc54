"""`shoal bench search`: seconds of a search over JDBC, beside plain SQL, NEAREST BY and a library on the same vectors.

A published table of vectors in clusters is searched exactly, by its index, for many vectors at once, filtered, and
again after nights of change, and it is joined with itself by its index. Each query is asked through Hive's own JDBC
client, which says how long each took; of several rounds the last counts. What was found is compared with an exact
search by numpy's products.
"""

import importlib
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pyspark
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from shoal.conf.errors import ConfigError, RunError
from shoal.conf.run import EncoderConfig
from shoal.jobs.export import export
from shoal.jobs.indexing import VERB, build
from shoal.jobs.knn import Side, cells_of, join_self, join_sides
from shoal.jobs.maintenance import maintain
from shoal.jobs.meter import metering
from shoal.jobs.model_source import resolve_spec
from shoal.jobs.nearest import nearest
from shoal.jobs.operation import operating
from shoal.jobs.prepare import model_cache
from shoal.jobs.sql_functions import Functions
from shoal.jobs.sql_parts import EMBED
from shoal.jobs.synthetic_vectors import PER_MILLE, SyntheticVectors
from shoal.jobs.thrift import Endpoint, session_settings, thrift_server
from shoal.udfs.knn_join import JoinOptions

K = 10
QUERIES = 10
"""Asked one after another; the median of what they took is told."""

ONLY_K = JoinOptions(K, None)
BATCH, BATCH_ROUNDS = 1000, 3
JOINED = 10_000
WARM_ROUNDS = 5
"""Rounds of searches by the index, each of other queries: they are short, and Java goes on compiling what they run."""

NIGHT_SHARE = 0.01
MIN_ROWS = 10_000
NAME = "bench"

TOOK = re.compile(r"rows? selected \(([0-9.]+) seconds\)")
HEADER = re.compile(r"(^|> )id$")
"""The line above the ids of an answer; beeline puts its prompt before it where it finds no terminal."""


def bench_search(
    num_rows: int,
    dim: int,
    num_nights: int,
    *,
    num_queries: int = QUERIES,
    skip: Collection[str] = (),
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The document that `--json` prints; skip: what of library, batches, join and filters to leave out."""
    if num_rows < MIN_ROWS:
        raise ConfigError(f"--rows is {num_rows}; a thousandth of them is filtered for, ask for {MIN_ROWS} or more")
    if dim < 1 or num_queries < 1 or num_nights < 0:
        raise ConfigError(
            f"--dim is {dim}, --queries {num_queries}, --nights {num_nights}; ask for 1 or more, and 0 nights or more"
        )
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        catalog = Path(folder) / "catalog"
        endpoint = Endpoint(port=0).checked()
        settings = session_settings(catalog)
        with metering(settings, "shoal bench") as spark:
            encoder = EncoderConfig(model=f"hash:{dim}")
            spec = resolve_spec(encoder, model_cache(), tracking_uri="")
            table = SyntheticVectors(spark, f"{folder}/docs", num_rows, dim, spec, encoder)
            bench = _Bench(spark, table, endpoint, num_queries, say)
            with thrift_server(spark, endpoint):
                cores = len(os.sched_getaffinity(0))
                return {"rows": num_rows, "dim": dim, "k": K, "cores": cores, **bench.go(num_nights, skip)}


@dataclass
class _Bench:
    spark: SparkSession
    table: SyntheticVectors
    endpoint: Endpoint
    num_queries: int
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self._true: dict[tuple[int, str], list[set[int]]] = {}
        self.queries_QD = self.table.queries(self.num_queries * WARM_ROUNDS)
        self.functions = Functions(self.spark, {NAME: self.table.path}, self.say)

    def go(self, num_nights: int, skip: Collection[str]) -> dict[str, Any]:
        began = time.monotonic()
        self.table.publish()
        self.say(f"{self.table.rows:,} rows are published: {time.monotonic() - began:.1f} s")
        before = [self._form("ORDER BY .. LIMIT", PLAIN), self._form("NEAREST BY", NEAREST, times=1)]
        self._follow()
        before.append(self._form("exact", f"SELECT id FROM {NAME}_search('{{q}}', {K})"))
        library = [] if "library" in skip else [self._library()]
        began = time.monotonic()
        with operating(self.spark, self.table.path, VERB) as operation:
            made = build(operation)["index"]
        seconds = time.monotonic() - began
        self.say(f"{made['cells']} cells, {made['probes'][K]} of them looked in: {seconds:.1f} s")
        self._follow()
        document = {
            "index": made,
            "index_seconds": round(seconds, 2),
            "forms": [*before, *self._indexed(), *library],
            "batches": [] if "batches" in skip else self._batches(made["probes"][K]),
            "join": None if "join" in skip else self._joined(made["probes"][K]),
            "filters": [
                self._filtered(f"{kind}{share}") for kind in "uc" for share in PER_MILLE if "filters" not in skip
            ],
            "nights": num_nights,
            "after_nights": [],
        }
        if num_nights:
            for night in range(1, num_nights + 1):
                began = time.monotonic()
                self.table.night(NIGHT_SHARE, salt=night + 1)
                with operating(self.spark, self.table.path, "maintain") as operation:
                    maintain(operation)
                self.say(f"night {night} and its maintenance: {time.monotonic() - began:.1f} s")
            self._follow()
            document["after_nights"] = self._indexed()
        return document

    def _indexed(self) -> list[dict[str, Any]]:
        cells = self.table.published().index
        assert cells is not None  # noqa: S101 - it has been built
        return [
            self._form("index", f"SELECT id FROM {NAME}_search('{{q}}', {K})", times=WARM_ROUNDS),
            self._form("index, all cells", f"SELECT id FROM {NAME}_search('{{q}}', {K}, {cells.cells})"),
        ]

    def _batches(self, probes: int) -> list[dict[str, Any]]:
        """BATCH vectors at once, in the session: the median of BATCH_ROUNDS, and the recall of the first of them."""
        asked = f"(SELECT collect_list(struct(id, embedding)) FROM delta.`{self.table.path}` WHERE id < {BATCH})"
        true = self._first(K)
        measured = []
        for name, cells in (("batch, all cells", ""), ("batch, index", f", probes => {probes}")):
            statement = f"SELECT query_id, id FROM {NAME}_join({asked}, {K}{cells})"
            took = []
            found: list[list[int]] = []
            for _ in range(BATCH_ROUNDS):
                began = time.monotonic()
                rows = self.spark.sql(statement).collect()
                took.append(time.monotonic() - began)
                found = [[row["id"] for row in rows if row["query_id"] == str(n)] for n in range(self.num_queries)]
            seconds, recall = round(statistics.median(took), 3), _share_found(true, found)
            self.say(f"{name}: {BATCH} vectors in {seconds:.3f} s, recall {recall:.3f}")
            measured.append({"form": name, "vectors": BATCH, "seconds": seconds, "recall": recall})
        return measured

    def _joined(self, probes: int) -> dict[str, Any]:
        """All rows with themselves as by `shoal join --probes`, written as a table; the recall of the first.

        `exact_seconds`: what all would take without an index, by what JOINED of them took to meet all.
        """
        published, dim = self.table.published(), self.table.dim
        rows = published.rows(self.spark)
        every = Side(rows, ("id",), self.table.rows)
        num_left = min(JOINED, self.table.rows)
        some = Side(rows.where(F.col("id") < num_left), ("id",), num_left)
        began = time.monotonic()
        join_sides(self.spark, some, every, dim, ONLY_K).write.format("noop").mode("overwrite").save()
        exact = (time.monotonic() - began) * self.table.rows / num_left
        out = f"{self.table.path}_near"
        began = time.monotonic()
        cells = cells_of(self.spark, published, rows, probes)
        join_self(self.spark, every, dim, ONLY_K, cells).write.format("delta").save(out)
        seconds = time.monotonic() - began
        of_first = (
            self.spark.read.format("delta")
            .load(out)
            .where(f"left_id < {self.num_queries} OR right_id < {self.num_queries}")
        )
        pairs = [(row["left_id"], row["right_id"]) for row in of_first.collect()]
        found = [[sum(pair) - n for pair in pairs if n in pair] for n in range(self.num_queries)]
        recall = _share_found([wanted - {n} for n, wanted in enumerate(self._first(K + 1))], found)
        self.say(f"join, index: {seconds:.1f} s, recall {recall:.3f}; exact, by a part: {exact:.0f} s")
        took = {"seconds": round(seconds, 2), "exact_seconds": round(exact, 2)}
        return {"form": "join, index", **took, "recall": recall}

    def _first(self, k: int) -> list[set[int]]:
        """The true neighbours of the first rows, themselves among them."""
        rows = self.table.published().rows(self.spark)
        first = rows.where(F.col("id") < self.num_queries).orderBy("id").select("embedding").collect()
        vectors_QD = np.array([row["embedding"] for row in first], dtype=np.float32)
        return [{row["id"] for row in hits} for hits in nearest(rows, ["id"], vectors_QD, k)]

    def _filtered(self, column: str) -> dict[str, Any]:
        by_index = f"SELECT id FROM {NAME}_match('{{q}}', map('{column}', '1'), {K})"
        exact = f"SELECT id FROM {NAME}_scores('{{q}}') WHERE {column} = 1 ORDER BY score DESC, id LIMIT {K}"
        condition = f"{column} = 1"
        found = self._form(f"match {column}", by_index, where=condition)
        slow = self._form(f"exact {column}", exact, where=condition, times=1)
        return {**found, "column": column, "exact_seconds": slow["seconds"]}

    def _form(self, name: str, statement: str, *, where: str = "true", times: int = 2) -> dict[str, Any]:
        """One form of search: median seconds of a query in the last round, and the recall of all."""
        asked = [
            statement.format(q=f"q{number}", vector=_literal(query_D), path=self.table.path)
            for number, query_D in enumerate(self.queries_QD[: self.num_queries * times])
        ]
        took, found = _beeline(self.endpoint.jdbc, asked)
        recall = self._recall(found, where)
        seconds = round(statistics.median(took[-self.num_queries :]), 3)
        self.say(f"{name}: {seconds:.3f} s, recall {recall:.3f}")
        return {"form": name, "seconds": seconds, "recall": recall}

    def _recall(self, found: Sequence[Sequence[int]], where: str) -> float:
        published = self.table.published()
        key = (published.version, where)
        if key not in self._true:
            rows = published.rows(self.spark).where(where)
            hits = nearest(rows, ["id"], self.queries_QD, K)
            self._true[key] = [{row["id"] for row in neighbours} for neighbours in hits]
        return _share_found(self._true[key][: len(found)], found)

    def _follow(self) -> None:
        """The functions of the newest version, with the queries of the bench in the place of an encoder."""
        self.functions.create()
        queries_QD = self.queries_QD

        def embed(name: str, text: str) -> list[float]:
            del name
            return queries_QD[int(text[1:])].tolist()

        self.spark.udf.register(EMBED, embed, "array<float>")

    def _library(self) -> dict[str, Any]:
        """FAISS, flat, in this process, out of `shoal export`: what one machine can do without Spark."""
        try:
            faiss = importlib.import_module("faiss")
        except ImportError:
            return {"form": "FAISS flat", "seconds": None, "recall": None}
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
            export(self.spark, self.table.path, "faiss", f"{folder}/flat")
            flat = faiss.read_index(f"{folder}/flat/index.faiss")
            ids = pq.read_table(f"{folder}/flat/rows.parquet", columns=["id"])["id"].to_numpy()
        loaded = time.monotonic() - began
        took, found = [], []
        for query_D in self.queries_QD[: self.num_queries]:
            began = time.monotonic()
            _, places_1K = flat.search(query_D[None], K)
            took.append(time.monotonic() - began)
            found.append(ids[places_1K[0]].tolist())
        seconds = round(statistics.median(took), 4)
        self.say(f"FAISS flat: {seconds:.4f} s, after {loaded:.1f} s of export")
        return {
            "form": "FAISS flat",
            "seconds": seconds,
            "recall": self._recall(found, "true"),
            "loading_seconds": round(loaded, 2),
        }


PLAIN = f"SELECT id FROM delta.`{{path}}` ORDER BY vector_inner_product(embedding, {{vector}}) DESC, id LIMIT {K}"
NEAREST = (
    "SELECT t.id FROM (SELECT {vector} AS q) v JOIN delta.`{path}` t "
    f"EXACT NEAREST {K} BY SIMILARITY vector_inner_product(v.q, t.embedding)"
)


def _literal(query_D: npt.NDArray[np.float32]) -> str:
    return f"CAST(array({', '.join(f'{value:.8e}' for value in query_D.tolist())}) AS ARRAY<FLOAT>)"


def _beeline(jdbc: str, statements: Sequence[str]) -> tuple[list[float], list[list[int]]]:
    """Seconds and ids of each statement, one after another in one connection, as Hive's JDBC client says them."""
    home = Path(pyspark.__file__).parent
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
        script.write("".join(f"{statement};\n" for statement in statements))
        script.flush()
        command = [
            str(home / "bin" / "spark-class"), "org.apache.hive.beeline.BeeLine", "-u", jdbc, "-n", "bench",
            "--outputformat=csv2", "--showHeader=true", "-f", script.name,
        ]  # fmt: skip
        environment = {**os.environ, "SPARK_HOME": str(home)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    took = [float(seconds) for seconds in TOOK.findall(done.stderr)]
    found: list[list[int]] = []
    for line in done.stdout.splitlines():
        if HEADER.search(line):
            found.append([])
        elif line.isdecimal() and found:
            found[-1].append(int(line))
    if not len(took) == len(found) == len(statements):
        told = [line for line in done.stderr.splitlines() if "rror" in line]
        raise RunError(f"beeline answered {len(took)} of {len(statements)} queries: {(told or ['no error told'])[0]}")
    return took, found


def _share_found(true: Sequence[set[int]], found: Sequence[Sequence[int]]) -> float:
    """Recall: how much of the true neighbours of each query is among what was found for it."""
    num_found = sum(len(wanted & set(ids)) for wanted, ids in zip(true, found, strict=True))
    return round(num_found / max(1, sum(len(wanted) for wanted in true)), 4)


def lines(found: dict[str, Any]) -> list[str]:
    """The figures for people."""
    made = found["index"]
    what = f"{found['rows']:,} x {found['dim']}, k {found['k']}, {found['cores']} cores"
    told = [
        f"{what}, {made['cells']} cells, {made['probes'][found['k']]} of them looked in",
        f"{'':24} seconds  recall",
        *[_line(form) for form in found["forms"]],
    ]
    if found["batches"]:
        told.append(f"{BATCH:,} vectors at once, together")
        told += [_line(form) for form in found["batches"]]
    if found["join"]:
        told.append(f"all {found['rows']:,} with themselves")
        told.append(f"{_line(found['join'])} {found['join']['exact_seconds']:7.0f} (exact, by a part)")
    if found["filters"]:
        told.append(f"{'':24} seconds  recall   exact")
        told += [f"{_line(form)} {form['exact_seconds']:7.3f}" for form in found["filters"]]
    if found["nights"]:
        told.append(f"after {found['nights']} nights of {NIGHT_SHARE:.0%}")
        told += [_line(form) for form in found["after_nights"]]
    return told


def _line(form: dict[str, Any]) -> str:
    seconds = "      -" if form["seconds"] is None else f"{form['seconds']:7.3f}"
    recall = "      -" if form["recall"] is None else f"{form['recall']:7.3f}"
    return f"{form['form']:24} {seconds} {recall}"
