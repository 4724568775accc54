"""One `embed` in a process of its own that is killed, or that waits, at a named step; run by test_protocol.py.

    python run_and_die.py RUN_FILE STEP die          SIGKILL to this process and its JVM when the step is done
    python run_and_die.py RUN_FILE STEP wait FOLDER  makes FOLDER/waiting, goes on when FOLDER/go is there

Steps are those of Hooks.step, and two inside the publication: "fenced" (the fence passed, nothing committed) and
"landed" (committed, not yet looked at). A run that gets through, or fails, prints its report as one JSON document.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    from shoal.conf.errors import ShoalError
    from shoal.conf.loader import load_run
    from shoal.jobs import publish
    from shoal.jobs.embed import Hooks, embed
    from shoal.jobs.session import open_spark

    run_file, wanted, mode, *folder = sys.argv[1:]

    def step(name: str) -> None:
        if name != wanted:
            return
        if mode == "die":
            os.killpg(os.getpgid(0), signal.SIGKILL)
        (Path(folder[0]) / "waiting").touch()
        while not (Path(folder[0]) / "go").exists():
            time.sleep(0.05)

    # The two steps between the hooks are reached by wrapping what comes last before them, nothing is replaced.
    publish._fence = after(publish._fence, lambda: step("fenced"))  # type: ignore[assignment]
    publish._own_head = before(publish._own_head, lambda: step("landed"))  # type: ignore[assignment]
    config = load_run(run_file)
    spark = open_spark(config.spark, app_name="run and die", log_file=Path(run_file).parent / "dying.log")
    try:
        report = embed(spark, config, hooks=Hooks(step=step)).public()
    except ShoalError as error:
        report = error.report.public() | {"raised": type(error).__name__}  # type: ignore[attr-defined]
    sys.stdout.write(json.dumps(report))
    sys.stdout.flush()
    spark.stop()


def after(call: Callable[..., Any], then: Callable[[], None]) -> Callable[..., Any]:
    def both(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        then()
        return result

    return both


def before(call: Callable[..., Any], first: Callable[[], None]) -> Callable[..., Any]:
    def both(*args: Any, **kwargs: Any) -> Any:
        first()
        return call(*args, **kwargs)

    return both


if __name__ == "__main__":
    main()
