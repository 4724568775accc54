"""Who gets the table: the lease on real files, with holders that are alive, dead, far away and torn."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from shoal.conf.errors import BusyError, LeaseLostError
from shoal.jobs.filesystem import FileSystem
from shoal.jobs.lease import TAKEOVER_BEATS, _process_identity, held, holder

pytestmark = pytest.mark.spark

BEAT = 0.1


@pytest.fixture
def files(spark: SparkSession, tmp_path: Path) -> FileSystem:
    return FileSystem(spark, str(tmp_path))


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "lease.json")


def body(run_id: str, **fields: Any) -> str:
    """A lease as another machine would have written it."""
    far = {"host": "elsewhere", "user": "ada", "pid": 4711, "process": None, "started": "2026-01-01", "heartbeat": 3}
    return json.dumps({"run_id": run_id} | far | fields)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A live process of this machine that can be made a holder."""
    # It lives for as long as its input is open, and so never longer than these tests.
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def wait_until(happened: Callable[[], bool]) -> None:
    """Looks again and again; fails after half a minute."""
    until = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < until, "it has not happened"
        time.sleep(BEAT / 10)


def test_the_heartbeat_counts_up_while_the_lease_is_held_and_the_file_goes_with_it(
    files: FileSystem, path: str
) -> None:
    with held(files, path, "one", heartbeat_seconds=BEAT) as lease:
        first = holder(files, path)
        assert first is not None
        wait_until(lambda: (holder(files, path) or first)["heartbeat"] >= first["heartbeat"] + 2)
        later = holder(files, path)
        lease.check()

    assert later is not None
    assert (first["run_id"], first["pid"]) == (later["run_id"], later["pid"]) == ("one", os.getpid())
    assert holder(files, path) is None


def test_the_file_goes_even_when_the_run_fails(files: FileSystem, path: str) -> None:
    with pytest.raises(ZeroDivisionError), held(files, path, "one"):
        _ = 1 / 0
    assert holder(files, path) is None


def test_a_live_holder_is_named_in_the_refusal(files: FileSystem, path: str) -> None:
    with held(files, path, "one", heartbeat_seconds=BEAT) as lease:
        with (
            pytest.raises(
                BusyError, match=rf"lease .*: run one by \S+ on \S+ \(process {os.getpid()}\) holds the table"
            ) as error,
            held(files, path, "two", heartbeat_seconds=BEAT),
        ):
            pytest.fail("two runs hold one table")
        lease.check()
    assert error.value.exit_code == 4


@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "zombie"])
def test_a_holder_of_this_machine_that_is_dead_is_replaced_at_once(
    files: FileSystem, path: str, sleeper: subprocess.Popen[bytes], reaped: bool
) -> None:
    Path(path).write_text(body("dead", pid=sleeper.pid, process=_process_identity(sleeper.pid)))
    sleeper.send_signal(signal.SIGKILL)
    if reaped:
        sleeper.wait()
    else:
        while Path(f"/proc/{sleeper.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
            time.sleep(0.01)
    said: list[str] = []

    with held(files, path, "next", heartbeat_seconds=60, say=said.append):
        taken = holder(files, path)

    assert taken is not None
    assert taken["run_id"] == "next"
    assert said == ["run dead on elsewhere is dead; taking its lease over"]


def test_a_process_that_only_has_the_dead_holders_number_does_not_protect_its_lease(
    files: FileSystem, path: str, sleeper: subprocess.Popen[bytes]
) -> None:
    identity = _process_identity(sleeper.pid)
    assert identity is not None
    Path(path).write_text(body("dead", pid=sleeper.pid, process=identity | {"started": "1"}))

    with held(files, path, "next", heartbeat_seconds=60) as lease:
        lease.check()


@pytest.mark.parametrize("text", [body("far"), "", '{"run_id": "to', "[]"], ids=["far", "empty", "torn", "no lease"])
def test_a_heartbeat_that_stands_still_is_watched_and_then_replaced(files: FileSystem, path: str, text: str) -> None:
    Path(path).write_text(text)
    said: list[str] = []
    began = time.monotonic()

    with held(files, path, "next", heartbeat_seconds=BEAT, say=said.append) as lease:
        waited = time.monotonic() - began
        lease.check()

    assert waited >= TAKEOVER_BEATS * BEAT
    assert "watching its heartbeat" in said[0]
    assert "taking its lease over" in said[1]


def test_a_heartbeat_that_moves_far_away_keeps_the_table(files: FileSystem, path: str) -> None:
    files.create(path, body("far"))
    stop = threading.Event()

    def beat() -> None:
        count = 3
        while not stop.wait(BEAT):
            count += 1
            files.replace(path, body("far", heartbeat=count))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with (
            pytest.raises(BusyError, match=r"run far by ada on elsewhere \(process 4711\)"),
            held(files, path, "next", heartbeat_seconds=5 * BEAT),
        ):
            pytest.fail("a live run was robbed")
    finally:
        stop.set()
        thread.join()
    assert (holder(files, path) or {})["run_id"] == "far"


def test_a_lease_released_while_it_is_watched_is_taken_without_waiting_longer(files: FileSystem, path: str) -> None:
    files.create(path, body("far"))
    threading.Timer(0.3, lambda: files.delete(path)).start()
    began = time.monotonic()

    with held(files, path, "next", heartbeat_seconds=15) as lease:
        lease.check()

    assert time.monotonic() - began < TAKEOVER_BEATS * 15


def test_of_two_who_find_one_dead_lease_exactly_one_gets_it(spark: SparkSession, files: FileSystem, path: str) -> None:
    for attempt in range(10):
        Path(path).write_text(body("dead", process=(_process_identity(os.getpid()) or {}) | {"started": "1"}))
        start, loser_is_told = threading.Barrier(2), threading.Event()
        won: list[str] = []
        refused: list[str] = []

        def take(
            name: str, start: threading.Barrier, told: threading.Event, won: list[str], refused: list[str]
        ) -> None:
            start.wait()
            try:
                with held(files, path, name, heartbeat_seconds=BEAT) as lease:
                    won.append(name)
                    told.wait(20)
                    lease.check()
            except (BusyError, LeaseLostError) as error:
                refused.append(f"{name}: {error}")
                told.set()

        takers = [
            threading.Thread(target=take, args=(f"taker {n} of {attempt}", start, loser_is_told, won, refused))
            for n in range(2)
        ]
        for taker in takers:
            taker.start()
        for taker in takers:
            taker.join()

        assert (len(won), len(refused)) == (1, 1)
        assert f"run {won[0]} by" in refused[0]
        assert holder(files, path) is None


def test_a_taker_that_comes_second_gives_the_lease_back_to_the_first(
    files: FileSystem, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(path).write_text(body("dead", process=(_process_identity(os.getpid()) or {}) | {"started": "1"}))
    move = files.move
    with contextlib.ExitStack() as stack:
        first = []

        def overtaken(old: str, new: str) -> bool:
            """Between the second's look and its rename the first has taken over."""
            if not first:
                monkeypatch.setattr(files, "move", move)
                first.append(stack.enter_context(held(files, path, "first", heartbeat_seconds=60)))
            return move(old, new)

        monkeypatch.setattr(files, "move", overtaken)

        with pytest.raises(BusyError, match="run first by"), held(files, path, "second", heartbeat_seconds=60):
            pytest.fail("two runs hold one table")

        first[0].check()
    assert files.names(str(Path(path).parent)) == []


def lose(files: FileSystem, path: str) -> None:
    files.replace(path, body("usurper"))


def vanish(files: FileSystem, path: str) -> None:
    files.delete(path)


@pytest.mark.parametrize(("event", "who"), [(lose, "usurper"), (vanish, "unknown")])
def test_a_run_whose_lease_is_another_s_or_gone_is_stopped_at_its_next_check(
    files: FileSystem, path: str, event: Callable[[FileSystem, str], None], who: str
) -> None:
    with held(files, path, "one", heartbeat_seconds=BEAT) as lease:
        event(files, path)

        with pytest.raises(LeaseLostError, match=rf"lease .*: run {who} took the table over .*nothing was published"):
            lease.check()

        # Its heartbeat must not bring the lease back, and its end must not take another run's away.
        wait_until(lambda: not lease._thread.is_alive())
        with pytest.raises(LeaseLostError, match="took the table over"):
            lease.check()
    assert (holder(files, path) or {}).get("run_id") == (None if who == "unknown" else who)
