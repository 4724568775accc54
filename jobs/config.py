"""`shoal config`: check a run file, or describe all settings; without Spark and in well under a second."""

import json
from collections.abc import Sequence
from pathlib import Path

from shoal.conf.loader import load_run
from shoal.conf.schema import json_schema


def check(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """One line that says what a valid run file would do; raises ConfigError with every problem of an invalid one."""
    settings = load_run(path, overrides).redacted()
    source, destination = settings["source"], settings["destination"]
    origin = source["path"] or source["table"] or "a query"
    if isinstance(origin, list):
        origin = f"{len(origin)} paths"
    return (
        f"{path}: valid run {settings['name']!r} ({source['format']} {origin}, encoder {settings['encoder']['model']}, "
        f"to {destination['path'] or destination['table']})"
    )


def schema() -> str:
    """The JSON Schema of a run file as text; an editor that knows it completes settings and shows their meaning."""
    return json.dumps(json_schema(), indent=2)
