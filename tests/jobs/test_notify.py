"""Hooks: a command and a webhook get the run's document; what goes wrong with them is one line and nothing else."""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from shoal.conf.run import HookConfig
from shoal.jobs import notify as module
from shoal.jobs.notify import notify

DOCUMENT = json.dumps({"status": "published", "rows": {"new": 3}, "table": "caf\u00e9"}, ensure_ascii=False)
FACTS = {"SHOAL_STATUS": "published"}


class Server(HTTPServer):
    """Answers with the codes that it is given, one after the other, and keeps what it got."""

    codes: list[int]
    got: list[tuple[str, str | None, Any]]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.got.append((self.path, self.headers["Content-Type"], body))
        code = self.server.codes.pop(0)
        self.send_response(code)
        if code == 302:
            self.send_header("Location", "/elsewhere")
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server(("127.0.0.1", 0), Handler)
    found.got, found.codes = [], []
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 0.01)


def told_by(hook: HookConfig) -> tuple[bool, list[str]]:
    said: list[str] = []
    return notify(hook, "on_success", DOCUMENT, FACTS, said.append), said


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}/hook/s3cret"


def test_a_webhook_that_fails_once_gets_the_document_again(server: Server) -> None:
    server.codes = [500, 200]

    assert told_by(HookConfig(webhook=address(server))) == (True, [])

    assert server.got == [("/hook/s3cret", "application/json", json.loads(DOCUMENT))] * 2


@pytest.mark.parametrize("code", [404, 302])
def test_a_webhook_that_does_not_take_it_is_a_warning_without_its_path(server: Server, code: int) -> None:
    server.codes = [code] * 2

    done, said = told_by(HookConfig(webhook=address(server), retries=1))

    assert not done
    assert len(server.got) == 2
    assert f"on_success.webhook http://127.0.0.1:{server.server_port}/***: the answer was HTTP {code}" in said[0]
    assert "s3cret" not in said[0]


def test_a_webhook_that_nobody_listens_to_is_a_warning() -> None:
    done, said = told_by(HookConfig(webhook="http://127.0.0.1:9/s3cret", retries=0))

    assert not done
    assert "cannot be reached" in said[0]
    assert "s3cret" not in said[0]


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.2\r\n", b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"])
def test_a_webhook_that_does_not_speak_http_is_a_warning(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def talk() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(answer)

        thread = threading.Thread(target=talk)
        thread.start()
        done, said = told_by(HookConfig(webhook=f"http://127.0.0.1:{listener.getsockname()[1]}/s3cret", retries=0))
        thread.join()

    assert done is (b"200" in answer), "a taken document is taken, however short the answer"
    assert "s3cret" not in "".join(said)
    assert done or "on_success.webhook" in said[0]


def test_an_address_that_python_refuses_is_a_warning_without_it() -> None:
    done, said = told_by(HookConfig(webhook="http://127.0.0.1:9/s3cret\x7f", retries=0))

    assert not done
    assert "s3cret" not in said[0]
    assert "not usable (InvalidURL)" in said[0]


def test_a_command_that_complains_in_another_encoding_is_told_and_one_that_succeeds_is_done(tmp_path: Path) -> None:
    done, said = told_by(HookConfig(command=r"printf 'caf\351' >&2; exit 3", retries=0))
    again = told_by(HookConfig(command=rf"echo x >> '{tmp_path}/tries'; printf 'caf\351' >&2", retries=2))

    assert not done
    assert "it ended with code 3 (caf\ufffd)" in said[0]
    assert again == (True, [])
    assert (tmp_path / "tries").read_text() == "x\n", "called once"


def test_nobody_waits_for_a_process_that_a_command_leaves_behind(tmp_path: Path) -> None:
    left = tmp_path / "left.py"
    left.write_text(
        "import os, pathlib, time\n"
        "os.setsid()\n"
        "pathlib.Path(__file__).with_name('child').write_text(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    hook = HookConfig(command=f'"{sys.executable}" {left} & while [ ! -s "{tmp_path}/child" ]; do sleep 0.1; done')

    try:
        assert told_by(hook) == (True, []), "it was not the time limit that ended it"
    finally:
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def test_a_command_reads_the_document_and_finds_the_status_in_its_environment(tmp_path: Path) -> None:
    hook = HookConfig(command=f'cat > "{tmp_path}/got"; printf %s "$SHOAL_STATUS" > "{tmp_path}/status"')

    assert told_by(hook) == (True, [])

    assert (tmp_path / "got").read_text() == DOCUMENT
    assert (tmp_path / "status").read_text() == "published"


def test_a_command_that_fails_is_tried_again_and_then_told_by_its_last_words(tmp_path: Path) -> None:
    hook = HookConfig(command=f'echo x >> "{tmp_path}/tries"; echo no such channel >&2; exit 3', retries=2)

    done, said = told_by(hook)

    assert not done
    assert (tmp_path / "tries").read_text() == "x\n" * 3
    assert "on_success.command: it ended with code 3 (no such channel) (attempts: 3)" in said[0]


def test_a_command_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    hook = HookConfig(
        command=f'sleep 600 & echo $! > "{tmp_path}/child"; wait', timeout=timedelta(seconds=1), retries=0
    )

    done, said = told_by(hook)

    assert not done
    assert "no end within 1 s" in said[0]
    child = int((tmp_path / "child").read_text())
    end = time.monotonic() + 30
    while alive(child):
        assert time.monotonic() < end, "the hook's child is still there"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_no_hook_is_no_work() -> None:
    assert notify(None, "on_failure", DOCUMENT, FACTS, pytest.fail)
