"""Shows how far the encoder stage is: a bar on a terminal, a log line now and then elsewhere."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from shoal.jobs.meter import human
from shoal.udfs.device_load import DeviceLoad
from shoal.udfs.progress import Counts, ProgressReceiver

REFRESH_SECONDS = 0.25
LOG_SECONDS = 10.0
PLACES_SECONDS = 60.0
"""Between two looks at each executor where there is no terminal; on one, between its lines below the bar, a tenth."""
MAX_PLACES = 16
MAX_POINTS = 200

Points = list[tuple[float, int, int]]


@contextmanager
def shown_progress(
    receiver: ProgressReceiver,
    num_chunks: int,
    num_done: int,
    num_waves: int,
    started: float,
    console: Console,
    say: Callable[[str], None],
) -> Iterator["Shown"]:
    """Shows progress until the block ends.

    num_done: chunks of the plan that needed no encoding; the bar counts on from there. started: as time.time().
    """
    shown = Shown(receiver, num_chunks, num_done, num_waves, started, console, say)
    show = shown.bar if console.is_terminal and not console.is_dumb_terminal else shown.lines
    thread = threading.Thread(target=show, name="shoal-progress", daemon=True)
    thread.start()
    try:
        yield shown
    finally:
        shown.stop.set()
        thread.join()
        shown.note()
        del shown.points[: -MAX_POINTS or None]


@dataclass
class Shown:
    """What is shown, and what is known by now.

    points: (seconds since `started`, chunks, tokens), thinned to MAX_POINTS.
    """

    receiver: ProgressReceiver
    num_chunks: int
    num_done: int
    num_waves: int
    started: float
    console: Console
    say: Callable[[str], None]
    points: Points = field(default_factory=list)
    num_staged: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    before: dict[str, Counts] = field(default_factory=dict)
    looked: float = field(default_factory=time.monotonic)

    def wave_staged(self) -> None:
        """Told of each wave, of which whole ones are all that is known where executors do not reach this machine."""
        self.num_staged += 1
        if self.receiver.totals().chunks:
            return
        if self.num_staged == 1:
            host, port = self.receiver.address
            self.say(
                f"no counts come from the executors, whose UDP packets do not reach {host}:{port} on this machine; "
                "whole waves are told instead"
            )
        self.say(f"encoding: {self.num_staged} of {self.num_waves} waves")

    def places(self) -> list[str]:
        """A line for each executor and GPU: its rates since the last call, slowest first, and what the GPU is doing.

        None where there is one executor without a GPU, of which the line of the whole run says all.
        """
        found, now = self.receiver.places(), time.monotonic()
        seconds, self.looked = max(now - self.looked, 1e-3), now
        lines = []
        for place, (counts, load) in found.items():
            before = self.before.get(place, Counts())
            # Counts of an attempt that failed are taken back.
            chunks, tokens = max(0, counts.chunks - before.chunks), max(0, counts.tokens - before.tokens)
            lines.append((tokens, f"  {place}: {_rates(chunks, tokens, seconds)}{_told(load)}"))
        self.before = {place: counts for place, (counts, _) in found.items()}
        if len(found) < 2 and not any(load for _, load in found.values()):
            return []
        shown = [line for _, line in sorted(lines)]
        return shown[:MAX_PLACES] + (
            [f"  and {len(shown) - MAX_PLACES} faster ones"] if len(shown) > MAX_PLACES else []
        )

    def note(self) -> tuple[int, int]:
        """Chunks and tokens so far, kept as a point of the curve."""
        totals = self.receiver.totals()
        self.points.append((round(time.time() - self.started, 2), totals.chunks, totals.tokens))
        if len(self.points) > 2 * MAX_POINTS:
            self.points[:] = self.points[::2]
        return totals.chunks, totals.tokens

    def bar(self) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn("encoding"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("chunks  {task.fields[rates]}"),
            TimeRemainingColumn(),
        )
        began = time.monotonic()
        with _Bar(*columns, console=self.console, transient=True) as progress:
            total = self.num_done + self.num_chunks
            task = progress.add_task("encode", total=total, completed=self.num_done, rates="")
            last_point = last_places = 0.0
            while not self.stop.wait(REFRESH_SECONDS):
                totals = self.receiver.totals()
                now = time.monotonic()
                if now - last_point >= 1:
                    self.note()
                    last_point = now
                if now - last_places >= PLACES_SECONDS / 10:
                    progress.below = "\n".join(self.places())
                    last_places = now
                rates = _rates(totals.chunks, totals.tokens, now - began)
                done = totals.chunks or self.num_chunks * self.num_staged // self.num_waves
                progress.update(task, completed=self.num_done + done, rates=rates)

    def lines(self) -> None:
        began = last_places = time.monotonic()
        while not self.stop.wait(LOG_SECONDS):
            chunks, tokens = self.note()
            if self.num_staged and not chunks:
                continue
            seconds = time.monotonic() - began
            left = f", about {(self.num_chunks - chunks) * seconds / chunks:.0f} s left" if chunks else ""
            done, total = self.num_done + chunks, self.num_done + self.num_chunks
            self.say(f"encoding: {done} of {total} chunks, {_rates(chunks, tokens, seconds)}{left}")
            if time.monotonic() - last_places >= PLACES_SECONDS:
                last_places = time.monotonic()
                for line in self.places():
                    self.say(line)


class _Bar(Progress):
    """With lines of text below the bar."""

    below = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.below:
            yield Text(self.below)


def _told(load: DeviceLoad | None) -> str:
    if load is None:
        return ""
    busy = "" if load.busy_percent is None else f", {load.busy_percent} % busy"
    return f"{busy}, {human(load.used_bytes)} of {human(load.total_bytes)} in use"


def _rates(chunks: int, tokens: int, seconds: float) -> str:
    return f"{chunks / seconds:,.0f} chunks/s, {tokens / seconds:,.0f} tokens/s"
