"""Driver processes as the harness sees them: orders in, lines out, SIGKILL to the whole group."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from cluster import clean_environment, die_with_parent

SCRIPT = Path(__file__).with_name("driver.py")
PATIENCE = 300


class Driver:
    """A driver process in a group of its own, which its JVM shares; `steps` are those of the run under way."""

    def __init__(self, env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, SCRIPT],
            env=clean_environment() | {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"} | (env or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.told: list[str] = []
        self.steps: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=self._keep_errors, daemon=True).start()
        self.is_warm = False

    def order(self, run_file: Path, step: str | None = None, do: str = "die") -> None:
        """Starts a run; returns when Spark is up."""
        self.steps = []
        self._send(json.dumps({"run": str(run_file), "step": step, "do": do}))
        if not self.is_warm:
            if self._until("ready") is None:
                raise RuntimeError(f"the driver did not start: {''.join(self.told)[-2000:]}")
            self.is_warm = True

    def go_on(self) -> None:
        """Lets a run that waits at its step go on."""
        self._send("")

    def until_waiting(self) -> bool:
        """Whether the run came to the step that it was to wait at."""
        return self._until("waiting", "done ") == "waiting"

    def finish(self, seconds: float = PATIENCE) -> dict[str, Any] | None:
        """The report of the run under way; None when the driver died before it had one."""
        line = self._until("done ", seconds=seconds)
        return None if line is None else json.loads(line.removeprefix("done "))

    def runs_for(self, seconds: float) -> bool:
        """Waits so long; False when the run, or the driver, is over before."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            try:
                line = self.lines.get(timeout=left)
            except queue.Empty:
                return True
            if line is None or line.startswith("done "):
                self.lines.put(line)
                return False
            self._note(line)
        return True

    def kill(self) -> None:
        """SIGKILL to the driver and its JVM, and waits for its end."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def drain(self) -> None:
        """Notes what the driver told before it died."""
        while self._until("done ", seconds=10) is not None:
            pass

    def _until(self, *wanted: str, seconds: float = PATIENCE) -> str | None:
        end = time.monotonic() + seconds
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"the driver told nothing for {seconds} s after {self.steps[-3:]}") from None
            if line is None:
                self.lines.put(None)
                self.process.wait()
                return None
            self._note(line)
            if line.startswith(wanted):
                return line

    def _note(self, line: str) -> None:
        if line.startswith("step "):
            self.steps.append(line.removeprefix("step "))

    def _send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                self.lines.put(line[1:].rstrip("\n"))
        self.lines.put(None)

    def _keep_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.told = [*self.told[-50:], line]
