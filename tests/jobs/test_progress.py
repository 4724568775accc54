"""What people see while the encoder works, with real datagrams and a clock that is turned up."""

import io
import time
from collections.abc import Callable

import pytest
from rich.console import Console

from shoal.jobs import progress
from shoal.jobs.progress import MAX_POINTS, shown_progress
from shoal.udfs.device_load import DeviceLoad
from shoal.udfs.progress import Counts, ProgressReceiver, ProgressSender, ProgressTarget

LONG_S = 20.0


def until(done: Callable[[], object]) -> None:
    """Waits for what another thread does."""
    end = time.monotonic() + LONG_S
    while not done():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.02)
    said: list[str] = []
    console = Console(file=io.StringIO())
    with ProgressReceiver() as receiver:
        sender = ProgressSender(ProgressTarget("127.0.0.1", receiver.port, receiver.secret, 0), 0, 0)
        with shown_progress(receiver, 100, 40, 4, time.time(), console, said.append) as shown:
            until(lambda: said)
            assert said[0].startswith("encoding: 40 of 140 chunks, 0 chunks/s, 0 tokens/s")
            sender.send(Counts(chunks=60, tokens=900, padded=1000))
            until(lambda: "100 of 140" in said[-1])
        assert "s left" in said[-1]
        num_said = len(said)
        time.sleep(0.1)
        assert len(said) == num_said, "it goes on after its end"
        sender.close()
    assert shown.points[-1][1:] == (60, 900)
    assert [point[0] for point in shown.points] == sorted(point[0] for point in shown.points)


def test_several_executors_have_a_line_each_with_what_they_did_since_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.02)
    monkeypatch.setattr(progress, "PLACES_SECONDS", 0.02)
    said: list[str] = []
    with ProgressReceiver() as receiver:
        to = ProgressTarget("127.0.0.1", receiver.port, receiver.secret, 0)
        slow, fast = ProgressSender(to, 0, 0, "a/1"), ProgressSender(to, 1, 0, "b/2 cuda:0")
        with shown_progress(receiver, 100, 0, 4, time.time(), Console(file=io.StringIO()), said.append):
            slow.send(Counts(chunks=1, tokens=10))
            until(lambda: "1 of 100" in (said or [""])[-1])
            assert not any("a/1" in line for line in said), "the line of the run says all of a single executor"
            fast.send(Counts(chunks=9, tokens=900), DeviceLoad(3_000_000_000, 80_000_000_000, 97))
            until(lambda: [line for line in said if line.startswith("  b/2 cuda:0: ")])
        slow.close()
        fast.close()
    (first, second) = [line for line in said if line.startswith("  ")][:2]
    assert first == "  a/1: 0 chunks/s, 0 tokens/s"
    assert second.endswith(" tokens/s, 97 % busy, 3.0 GB of 80.0 GB in use")
    assert not second.startswith("  b/2 cuda:0: 0 chunks/s")


def test_of_many_executors_the_slowest_are_shown() -> None:
    with ProgressReceiver() as receiver:
        shown = progress.Shown(receiver, 100, 0, 4, time.time(), Console(file=io.StringIO()), lambda _: None)
        for number in range(20):
            to = ProgressTarget("127.0.0.1", receiver.port, receiver.secret, 0)
            ProgressSender(to, number, 0, f"h/{number:02}").send(Counts(chunks=1, tokens=10_000 * (20 - number)))
        until(lambda: receiver.totals().chunks == 20)
        lines = shown.places()
    assert [line.split(":")[0].strip() for line in lines] == [
        *(f"h/{n:02}" for n in range(19, 3, -1)),
        "and 4 faster ones",
    ]


def test_on_a_terminal_there_is_a_bar_that_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 0.02)
    monkeypatch.setattr(progress, "PLACES_SECONDS", 0.2)
    said: list[str] = []
    screen = io.StringIO()
    environment = {"TERM": "xterm"}
    console = Console(file=screen, force_terminal=True, width=120, color_system=None, _environ=environment)
    with ProgressReceiver() as receiver:
        sender = ProgressSender(ProgressTarget("127.0.0.1", receiver.port, receiver.secret, 0), 0, 0)
        with shown_progress(receiver, 100, 40, 4, time.time(), console, said.append) as shown:
            sender.send(Counts(chunks=60, tokens=900, padded=1000), DeviceLoad(1_000_000, 2_000_000, None))
            until(lambda: "100/140" in screen.getvalue())
            until(lambda: "1.0 MB of 2.0 MB in use" in screen.getvalue())
        sender.close()
    assert said == []
    assert "tokens/s" in screen.getvalue()
    assert shown.points[-1][1:] == (60, 900)


def test_where_no_counts_arrive_that_is_said_once_and_whole_waves_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.02)
    said: list[str] = []
    with ProgressReceiver() as receiver:
        ProgressSender(ProgressTarget("127.0.0.1", receiver.port, b"of another run", 0), 0, 0).send(Counts(chunks=60))
        with shown_progress(receiver, 100, 40, 4, time.time(), Console(file=io.StringIO()), said.append) as shown:
            until(lambda: said)
            shown.wave_staged()
            num_said = len(said)
            shown.wave_staged()
            time.sleep(0.1)
    assert [line.partition(",")[0] for line in said[num_said - 2 :]] == [
        "no counts come from the executors",
        "encoding: 1 of 4 waves",
        "encoding: 2 of 4 waves",
    ]
    assert f":{receiver.port} on this machine" in said[num_said - 2]


def test_a_long_run_keeps_a_bounded_number_of_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0001)
    lines = 0

    def say(line: str) -> None:
        nonlocal lines
        lines += 1

    with (
        ProgressReceiver() as receiver,
        shown_progress(receiver, 10, 0, 4, time.time(), Console(file=io.StringIO()), say) as shown,
    ):
        until(lambda: lines > 3 * MAX_POINTS)
    assert MAX_POINTS // 2 <= len(shown.points) <= MAX_POINTS


def test_a_run_that_fails_stops_the_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.02)
    said: list[str] = []
    with ProgressReceiver() as receiver:
        with (
            pytest.raises(ValueError, match="stop"),
            shown_progress(receiver, 10, 0, 4, time.time(), Console(file=io.StringIO()), said.append),
        ):
            raise ValueError("stop")
        num_said = len(said)
        time.sleep(0.1)
    assert len(said) == num_said
