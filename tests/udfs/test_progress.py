import os
import socket
import time
from collections.abc import Callable
from hashlib import blake2b

import pytest

from shoal.udfs.device_load import DeviceLoad
from shoal.udfs.progress import Counts, ProgressReceiver, ProgressSender, ProgressTarget, place_of


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether the condition came true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


def target(receiver: ProgressReceiver, wave: int = 0, secret: bytes | None = None) -> ProgressTarget:
    return ProgressTarget("127.0.0.1", receiver.port, secret or receiver.secret, wave)


def test_counts_are_absolute_and_summed_over_partitions() -> None:
    with ProgressReceiver() as receiver:
        one, two = (ProgressSender(target(receiver), partition, 0) for partition in (0, 1))
        one.send(Counts(chunks=10, tokens=100, padded=110, busy_s=1.5))
        one.send(Counts(chunks=25, tokens=250, padded=300, busy_s=3.0))
        two.send(Counts(chunks=5, tokens=50, padded=50, busy_s=0.5))
        assert until(lambda: receiver.totals().chunks == 30)
        assert receiver.totals() == Counts(chunks=30, tokens=300, padded=350, busy_s=3.5)
        one.close()
        two.close()


def test_the_highest_attempt_of_a_partition_wins_even_with_fewer_chunks() -> None:
    with ProgressReceiver() as receiver:
        ProgressSender(target(receiver), 0, 0).send(Counts(chunks=50))
        assert until(lambda: receiver.totals().chunks == 50)
        ProgressSender(target(receiver), 0, 1).send(Counts(chunks=7))
        assert until(lambda: receiver.totals().chunks == 7)
        ProgressSender(target(receiver), 0, 0).send(Counts(chunks=60))
        ProgressSender(target(receiver), 1, 0).send(Counts(chunks=1))
        assert until(lambda: receiver.totals().chunks == 8)


def test_a_datagram_that_was_overtaken_takes_nothing_back() -> None:
    with ProgressReceiver() as receiver:
        sender = ProgressSender(target(receiver), 0, 0)
        sender.send(Counts(chunks=20))
        sender.send(Counts(chunks=10))
        ProgressSender(target(receiver), 1, 0).send(Counts(chunks=1))
        assert until(lambda: receiver.totals().chunks == 21)


def test_waves_are_counted_apart() -> None:
    with ProgressReceiver() as receiver:
        ProgressSender(target(receiver, wave=0), 0, 0).send(Counts(chunks=3))
        ProgressSender(target(receiver, wave=1), 0, 0).send(Counts(chunks=4))
        assert until(lambda: receiver.totals().chunks == 7)
        assert receiver.totals(wave=1).chunks == 4


def test_places_have_the_counts_of_their_tasks_and_the_newest_load_of_their_gpu() -> None:
    with ProgressReceiver() as receiver:
        ProgressSender(target(receiver), 0, 0, "a/1").send(Counts(chunks=10, tokens=100))
        ProgressSender(target(receiver, wave=1), 0, 0, "a/1").send(Counts(chunks=5, tokens=50))
        sender = ProgressSender(target(receiver), 1, 0, "b/2 cuda:0")
        sender.send(Counts(chunks=1), DeviceLoad(10, 100, 30))
        sender.send(Counts(chunks=2), DeviceLoad(20, 100, None))
        assert until(lambda: receiver.totals().chunks == 17)
        assert receiver.places() == {
            "a/1": (Counts(chunks=15, tokens=150), None),
            "b/2 cuda:0": (Counts(chunks=2), DeviceLoad(20, 100, None)),
        }
        # The attempt before it was another executor's, whose work is lost.
        ProgressSender(target(receiver), 0, 1, "b/2 cuda:0").send(Counts(chunks=4))
        assert until(lambda: receiver.places()["b/2 cuda:0"][0].chunks == 6)
        assert receiver.places()["a/1"][0].chunks == 5


def test_the_name_of_a_place_is_shown_on_terminals_and_so_has_nothing_else_in_it() -> None:
    with ProgressReceiver() as receiver:
        ProgressSender(target(receiver), 0, 0, "evil\x1b[2Jname" + "x" * 500).send(Counts(chunks=1))
        assert until(lambda: receiver.totals().chunks == 1)
        (place,) = receiver.places()
        assert place.startswith("evil[2Jname")
        assert len(place) < 101


def test_a_worker_is_named_by_its_host_the_process_it_was_forked_from_and_its_gpu() -> None:
    assert place_of("cpu") == f"{socket.gethostname()}/{os.getppid()}"
    assert place_of("cuda:3") == f"{socket.gethostname()}/{os.getppid()} cuda:3"


NOISE = [
    b"",
    b"\xff\xfe",
    b"[1,2]",
    b'{"a": 1}',
    b"null",
    b'["x", 0, 0, 1, 1, 1, 1, "a", null]',
    b'[0, 0, 0, Infinity, 1, 1, 1, "a", null]',
    b'[0, 0, 0, 9, 9, 9, 9, "a", [1, 2]]',
    b'[0, 0, 0, 9, 9, 9, 9, "a", 7]',
    b"[" * 2000,
]


def test_other_runs_and_noise_are_ignored() -> None:
    with ProgressReceiver() as receiver:
        ProgressSender(target(receiver, secret=b"of another run"), 0, 0).send(Counts(chunks=99))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as noise:
            for datagram in NOISE:
                noise.sendto(datagram, receiver.address)
                noise.sendto(
                    blake2b(datagram, key=receiver.secret, digest_size=16).digest() + datagram, receiver.address
                )
        ProgressSender(target(receiver), 3, 0).send(Counts(chunks=2))
        assert until(lambda: receiver.totals().chunks == 2)


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_a_driver_that_cannot_be_reached_is_no_error(host: str) -> None:
    sender = ProgressSender(ProgressTarget(host, 9, b"secret", 0), 0, 0)
    began = time.monotonic()
    for chunks in range(100):
        sender.send(Counts(chunks=chunks))
    sender.close()
    sender.send(Counts(chunks=1))
    assert time.monotonic() - began < 5


def test_without_a_target_nothing_is_sent() -> None:
    sender = ProgressSender(None, 0, 0)
    sender.send(Counts(chunks=1))
    sender.close()
