"""Shows how far the encoder stage is: a bar on a terminal, a log line now and then elsewhere."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from shoal.udfs.progress import ProgressReceiver

REFRESH_SECONDS = 0.25
LOG_SECONDS = 10.0
MAX_POINTS = 200

Points = list[tuple[float, int, int]]


@contextmanager
def shown_progress(
    receiver: ProgressReceiver,
    num_chunks: int,
    num_done: int,
    started: float,
    console: Console,
    say: Callable[[str], None],
) -> Iterator[Points]:
    """Shows progress until the block ends; gives (seconds since `started`, chunks, tokens), thinned to MAX_POINTS.

    num_done: chunks of the plan that needed no encoding; the bar counts on from there. started: as time.time().
    """
    points: Points = []
    stop = threading.Event()
    show = _bar if console.is_terminal and not console.is_dumb_terminal else _lines
    thread = threading.Thread(
        target=show,
        args=(receiver, num_chunks, num_done, started, console, say, points, stop),
        name="shoal-progress",
        daemon=True,
    )
    thread.start()
    try:
        yield points
    finally:
        stop.set()
        thread.join()
        _note(points, receiver, started)
        del points[: -MAX_POINTS or None]


def _note(points: Points, receiver: ProgressReceiver, started: float) -> tuple[int, int]:
    totals = receiver.totals()
    points.append((round(time.time() - started, 2), totals.chunks, totals.tokens))
    if len(points) > 2 * MAX_POINTS:
        points[:] = points[::2]
    return totals.chunks, totals.tokens


def _bar(
    receiver: ProgressReceiver,
    num_chunks: int,
    num_done: int,
    started: float,
    console: Console,
    say: Callable[[str], None],
    points: Points,
    stop: threading.Event,
) -> None:
    del say
    columns = (
        SpinnerColumn(),
        TextColumn("encoding"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("chunks  {task.fields[rates]}"),
        TimeRemainingColumn(),
    )
    began = time.monotonic()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("encode", total=num_done + num_chunks, completed=num_done, rates="")
        last_point = 0.0
        while not stop.wait(REFRESH_SECONDS):
            totals = receiver.totals()
            now = time.monotonic()
            if now - last_point >= 1:
                _note(points, receiver, started)
                last_point = now
            progress.update(
                task, completed=num_done + totals.chunks, rates=_rates(totals.chunks, totals.tokens, now - began)
            )


def _lines(
    receiver: ProgressReceiver,
    num_chunks: int,
    num_done: int,
    started: float,
    console: Console,
    say: Callable[[str], None],
    points: Points,
    stop: threading.Event,
) -> None:
    del console
    began = time.monotonic()
    while not stop.wait(LOG_SECONDS):
        chunks, tokens = _note(points, receiver, started)
        seconds = time.monotonic() - began
        left = f", about {(num_chunks - chunks) * seconds / chunks:.0f} s left" if chunks else ""
        say(f"encoding: {num_done + chunks} of {num_done + num_chunks} chunks, {_rates(chunks, tokens, seconds)}{left}")


def _rates(chunks: int, tokens: int, seconds: float) -> str:
    return f"{chunks / seconds:,.0f} chunks/s, {tokens / seconds:,.0f} tokens/s"
