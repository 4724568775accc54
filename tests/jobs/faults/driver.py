"""A driver process that runs `embed` again and again, told by lines on its standard input, until it is killed.

    {"run": FILE, "step": NAME, "do": "die" | "wait"}    one line per run; without a step it runs through

It answers `@step NAME` when a step is done, `@waiting` when it waits for another line, `@done JSON` with the report.
Steps are those of Hooks.step, "fenced" (the fence passed, nothing committed) and "landed" (committed, not looked at).
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    from shoal.conf.errors import ShoalError
    from shoal.conf.loader import load_run
    from shoal.jobs import publish
    from shoal.jobs.embed import embed
    from shoal.jobs.hooks import Hooks
    from shoal.jobs.session import open_spark

    order: dict[str, Any] = {}

    def step(name: str) -> None:
        tell(f"step {name}")
        if name != order.get("step"):
            return
        if order["do"] == "die":
            os.killpg(os.getpgid(0), signal.SIGKILL)
        tell("waiting")
        sys.stdin.readline()

    publish._fence = around(publish._fence, after=lambda: step("fenced"))  # type: ignore[assignment]
    publish._own_head = around(publish._own_head, before=lambda: step("landed"))  # type: ignore[assignment]
    spark = None
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        config = load_run(Path(order["run"]))
        if spark is None:
            log = Path(order["run"]).parent / "driver.log"
            spark = open_spark(config.spark, app_name="faults", log_file=log)
            tell("ready")
        try:
            report = embed(spark, config, hooks=Hooks(step=step)).public()
        except ShoalError as error:
            report = error.report.public() | {"raised": type(error).__name__}  # type: ignore[attr-defined]
        tell("done " + json.dumps(report))


def tell(line: str) -> None:
    # One write, so that lines of two threads never mix.
    os.write(sys.stdout.fileno(), f"@{line}\n".encode())


def around(
    call: Callable[..., Any], before: Callable[[], None] = lambda: None, after: Callable[[], None] = lambda: None
) -> Callable[..., Any]:
    def whole(*args: Any, **kwargs: Any) -> Any:
        before()
        result = call(*args, **kwargs)
        after()
        return result

    return whole


if __name__ == "__main__":
    main()
