import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path

import pytest

from shoal.conf.errors import ModelError
from shoal.conf.run import EncoderConfig
from shoal.udfs.encoder import Encoded, EncodeOptions
from shoal.udfs.hash_encoder import describe_hash, hash_vectors

POISONED = Path(__file__).with_name("poisoned_worker.py")
SPEC = describe_hash(EncoderConfig(model="hash:2"))

PARENT = """
import sys
from shoal.conf.run import EncoderConfig
from shoal.udfs.encoder import EncodeOptions
from shoal.udfs.hash_encoder import describe_hash
from shoal.udfs.isolation import IsolatedEncoder

spec = describe_hash(EncoderConfig(model="hash:2"))
IsolatedEncoder(spec, "cpu", EncodeOptions(), command=(sys.executable, sys.argv[1])).encode(["hang"])
"""


def test_a_child_answers_until_its_parent_closes_the_socket() -> None:
    ours, theirs = Pipe()
    child = subprocess.Popen(
        [sys.executable, "-m", "shoal.udfs.isolated_worker", str(theirs.fileno()), "2"], pass_fds=[theirs.fileno()]
    )
    theirs.close()
    ours.send((SPEC, "cpu", EncodeOptions(), None))
    assert ours.recv() is None
    for texts in (["a", "b"], ["c"]):
        ours.send(texts)
        answer = ours.recv()
        assert isinstance(answer, Encoded)
        assert answer.vectors_ND.tolist() == hash_vectors(texts, 2).tolist()
    ours.close()
    assert child.wait(30) == 0


def test_an_error_of_ours_arrives_with_its_class_and_code() -> None:
    error = ModelError("encoder.model: gone", code="MODEL_NOT_FOUND")
    ours, theirs = Pipe()
    theirs.send(error)
    arrived = ours.recv()
    assert (type(arrived), str(arrived), arrived.code) == (ModelError, str(error), "MODEL_NOT_FOUND")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_child_that_hangs_does_not_outlive_a_parent_that_was_killed(tmp_path: Path) -> None:
    log = tmp_path / "passes.log"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, POISONED], env=os.environ | {"POISON_LOG": str(log)})
    try:
        wait_until(lambda: log.exists() and "hang" in log.read_text())
        (child,) = children_of(parent.pid)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_until(lambda: not is_alive(child))


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not come to that within a minute"
        time.sleep(0.02)


def children_of(pid: int) -> list[int]:
    return [int(name) for name in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
