"""A standalone Spark cluster on this machine, from the wheel: a master, two workers, and their children."""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sysconfig
import time
import urllib.request
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyspark

from shoal.conf.loader import SHIPPED_TARGETS

SPARK_HOME = Path(pyspark.__file__).parent
NUM_WORKERS = 2
PR_SET_PDEATHSIG = 1
BARE = {"PATH", "HOME", "JAVA_HOME", "TMPDIR", "SPARK_SUBMIT_OPTS"}

SHORT_LIVED = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
"""Options of a JVM that ends before the code it would compile best has paid for that; executors have it too."""

SMALL_QUERIES = (
    "-Dspark.sql.adaptive.enabled=false -Dspark.sql.codegen.factoryMode=NO_CODEGEN -Dspark.sql.codegen.wholeStage=false"
)
"""And of a driver whose queries run once or twice: compiling and adapting their plans would cost more than it saves."""


class Cluster:
    """Daemons as processes of their own; `stop` or `kill` ends them, with all executors and Python workers."""

    def __init__(
        self,
        folder: Path,
        *,
        memory: str = "1g",
        cores: int = 1,
        num_gpus: int = 0,
        num_workers: int = NUM_WORKERS,
        secret: str | None = None,
    ) -> None:
        """secret: what every application has to know; Spark's processes then encrypt what they say to each other."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.python = without_shoal(folder / "python")
        """What a target names as the Python of the workers, so that their Shoal is the one that was sent."""
        self.port, self.web = free_port(), free_port()
        self.address = f"spark://127.0.0.1:{self.port}"
        told = folder / "daemons.conf"
        gpus, secured = _gpu_settings(folder, num_gpus) if num_gpus else "", _secured(secret) if secret else ""
        told.write_text(f"spark.decommission.enabled true\n{gpus}{secured}")
        self._log = (folder / "daemons.log").open("a")
        self._size = ["--cores", str(cores), "--memory", memory, "--properties-file", str(told)]
        ports = ["--port", str(self.port), "--webui-port", str(self.web)]
        self._daemons = [self._start(folder, "Master", *ports, "--properties-file", str(told))]
        for _ in range(num_workers):
            self.add_worker()

    def add_worker(self, **environment: str) -> Path:
        """Starts one more worker, which registers by itself; the folder of what it runs.

        environment: more variables of it, which its executors and their Python workers inherit.
        """
        work = self.folder / f"work{len(self._daemons) - 1}"
        ports = ["--port", str(free_port()), "--webui-port", str(free_port())]
        self._daemons.append(
            self._start(
                self.folder, "Worker", *ports, *self._size, "--work-dir", str(work), self.address, **environment
            )
        )
        return work

    def withdraw_worker(self) -> None:
        """Tells the first worker that its machine will go, as a cloud does before it takes one back."""
        self._daemons[1].send_signal(signal.SIGPWR)

    def kill_workers(self) -> None:
        """SIGKILL to all workers and what is below them; the master stays."""
        self._kill(self._daemons[1:])

    def wait(self) -> None:
        """Returns when all workers have registered."""
        end = time.monotonic() + 120
        while time.monotonic() < end:
            # A master that has just begun to listen may answer with an empty page.
            with contextlib.suppress(OSError, ValueError):
                if self._said()["aliveworkers"] == len(self._daemons) - 1:
                    return
            time.sleep(0.3)
        raise TimeoutError(f"{len(self._daemons) - 1} workers did not register within two minutes")

    def times(self) -> dict[str, tuple[float, float]]:
        """When each application that is over began and ended, in seconds."""
        found = {each["id"]: (each["starttime"], each["duration"]) for each in self._said()["completedapps"]}
        return {name: (began / 1000, (began + took) / 1000) for name, (began, took) in found.items()}

    def executors(self) -> list[int]:
        """Process ids of the executors."""
        return [pid for pid, line in self._below(self._daemons) if "CoarseGrainedExecutorBackend" in line]

    def python_workers(self) -> list[int]:
        """Process ids of the Python workers, and of the daemons that fork them."""
        return [pid for pid, line in self._below(self._daemons) if "pyspark.daemon" in line]

    def kill(self) -> None:
        """SIGKILL to the daemons and to everything below them."""
        self._kill(self._daemons)
        self._log.close()

    def _said(self) -> dict[str, Any]:
        """What the master tells of itself."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.web}/json/") as answer:
            said: dict[str, Any] = json.load(answer)
        return said

    def _kill(self, daemons: Sequence[subprocess.Popen[bytes]]) -> None:
        for pid in [pid for pid, _ in self._below(daemons)] + [daemon.pid for daemon in daemons]:
            kill(pid)
        for daemon in daemons:
            daemon.wait()

    def _below(self, daemons: Sequence[subprocess.Popen[bytes]]) -> list[tuple[int, str]]:
        """Process ids and command lines of all descendants of these daemons."""
        parents, commands = processes()
        mine = {daemon.pid for daemon in daemons}
        found: list[tuple[int, str]] = []
        grown = True
        while grown:
            new = [pid for pid, parent in parents.items() if parent in mine and pid not in mine]
            grown = bool(new)
            mine.update(new)
            found += [(pid, commands[pid]) for pid in new]
        return found

    def _start(self, folder: Path, role: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        env = bare_environment() | {
            "SPARK_HOME": str(SPARK_HOME),
            "SPARK_LOCAL_IP": "127.0.0.1",
            "SPARK_LOCAL_DIRS": str(folder / "local"),
            "SPARK_DAEMON_MEMORY": "256m",
            "SPARK_DAEMON_JAVA_OPTS": "-XX:+UseSerialGC",
            "JDK_JAVA_OPTIONS": SHORT_LIVED,
            "PYSPARK_PYTHON": self.python,
            "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        }
        env |= environment
        name = f"org.apache.spark.deploy.{role.lower()}.{role}"
        command = [str(SPARK_HOME / "bin" / "spark-class"), name, "--host", "127.0.0.1", *arguments]
        return subprocess.Popen(
            command, env=env, cwd=folder, stdout=self._log, stderr=self._log, preexec_fn=die_with_parent
        )


def die_with_parent() -> None:
    """In a child before it execs: Linux is to kill it when the thread that started it is gone, however that ended."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def clean_environment() -> dict[str, str]:
    """This process's environment without what Spark would take settings from, for drivers that are short-lived."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SPARK_", "PYSPARK_"))}
    return kept | {"SPARK_SUBMIT_OPTS": f"{SHORT_LIVED} {SMALL_QUERIES}"}


def bare_environment() -> dict[str, str]:
    """An environment with nothing in it but where programs, Java and the user's folders are."""
    return {key: value for key, value in clean_environment().items() if key in BARE}


def without_shoal(folder: Path) -> str:
    """A Python in this folder with all packages of the running one but Shoal, which is installed there by a link.

    Python reads the links of its own site-packages alone, not those of a folder that a link names.
    """
    venv.create(folder, symlinks=True)
    (own,) = folder.glob("lib/*/site-packages")
    (own / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return str(folder / "bin" / "python")


def processes() -> tuple[dict[int, int], dict[int, str]]:
    """Parent and command line of every process that is there, zombies left out."""
    parents: dict[int, int] = {}
    commands: dict[int, str] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rsplit(")", 1)[1].split()
            line = (stat.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if fields[0] != "Z":
                parents[int(stat.parent.name)], commands[int(stat.parent.name)] = int(fields[1]), line
    return parents, commands


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _gpu_settings(folder: Path, num_gpus: int) -> str:
    """What a worker is told that is to find so many GPUs, by Shoal's script and an nvidia-smi that tells of them."""
    smi = folder / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\nseq 0 {num_gpus - 1}\n")
    smi.chmod(0o755)
    resource = "spark.worker.resource.gpu"
    script = SHIPPED_TARGETS / "discover_gpus.sh"
    return f"{resource}.amount {num_gpus}\n{resource}.discoveryScript {script}\n"


def _secured(secret: str) -> str:
    return f"spark.authenticate true\nspark.authenticate.secret {secret}\nspark.network.crypto.enabled true\n"


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
