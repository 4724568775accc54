"""The part of Databricks' REST API that Shoal asks, on this machine: runs are processes of run_notebook.py."""

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cluster import clean_environment
from werkzeug.formparser import parse_form_data

DRIVER = Path(__file__).parent.parent / "run_notebook.py"
TOKEN = "dapi-hush-hush"


@dataclass
class Workspace:
    """root: where /Workspace is on this disk. asked: every call, as (method, path, body). conf: of the clusters' Spark.

    refuse: (path of a call, status, code, message) that it answers instead.
    """

    root: Path
    conf: dict[str, str]
    asked: list[tuple[str, str, Any]] = field(default_factory=list)
    runs: dict[int, dict[str, Any]] = field(default_factory=dict)
    cancelled: list[int] = field(default_factory=list)
    refuse: tuple[str, int, str, str] | None = None
    address: str = ""

    def place(self, path: str) -> Path:
        """Where a path of the workspace is on this disk."""
        assert path.startswith("/Workspace/Users/me@example.org/"), path
        return self.root / path.removeprefix("/Workspace/")

    def start(self, body: dict[str, Any]) -> int:
        run_id = len(self.runs) + 1
        (task,) = body["tasks"]
        given = dict(task["notebook_task"]["base_parameters"])
        notebook = self.place(task["notebook_task"]["notebook_path"])
        given["folder"] = str(self.place(given["folder"]))
        values = self.root / f"values-{run_id}.json"
        log = (self.root / f"log-{run_id}").open("wb")
        env = clean_environment() | {
            "DATABRICKS_RUNTIME_VERSION": "17.3",
            "CLUSTER_CONF": json.dumps(self.conf),
            "PYSPARK_PYTHON": sys.executable,
        }
        process = subprocess.Popen(
            [sys.executable, str(DRIVER), str(notebook), json.dumps(given), str(values)],
            env=env, cwd=self.root, stdout=log, stderr=log
        )  # fmt: skip
        self.runs[run_id] = {"process": process, "body": body, "values": values, "log": self.root / f"log-{run_id}"}
        return run_id

    def log(self, run_id: int) -> str:
        return str(self.runs[run_id]["log"].read_text(errors="replace"))

    def state(self, run_id: int) -> dict[str, Any]:
        code = self.runs[run_id]["process"].poll()
        if code is None:
            return {"life_cycle_state": "RUNNING"}
        told = {"result_state": "SUCCESS"} if code == 0 else {"result_state": "FAILED", "state_message": "Task failed"}
        return {"life_cycle_state": "TERMINATED", **told}


class _Handler(BaseHTTPRequestHandler):
    workspace: Workspace

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self._answer(parts.path, {name: values[0] for name, values in parse_qs(parts.query).items()})

    def do_POST(self) -> None:
        data = self.rfile
        length = int(self.headers.get("Content-Length", 0))
        if (self.headers.get("Content-Type") or "").startswith("multipart/"):
            environ = {
                "wsgi.input": data,
                "CONTENT_LENGTH": str(length),
                "CONTENT_TYPE": self.headers["Content-Type"],
                "REQUEST_METHOD": "POST",
            }
            _, form, files = parse_form_data(environ)
            self._answer(self.path, {**form.to_dict(), "content": files["content"].read()})
            return
        self._answer(self.path, json.loads(data.read(length) or b"{}"))

    def _answer(self, path: str, body: dict[str, Any]) -> None:
        space = self.workspace
        space.asked.append((self.command, path, body))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error_code": "UNAUTHENTICATED", "message": "who are you"})
            return
        if space.refuse and path.endswith(space.refuse[0]):
            self._send(space.refuse[1], {"error_code": space.refuse[2], "message": space.refuse[3]})
            return
        name = re.sub(r"^/api/\d\.\d/", "", path)
        found: Any = {}
        if name == "preview/scim/v2/Me":
            found = {"userName": "me@example.org"}
        elif name == "workspace/mkdirs":
            space.place(body["path"]).mkdir(parents=True)
        elif name == "workspace/import":
            space.place(body["path"]).write_bytes(body["content"])
        elif name == "workspace/export":
            place = space.place(body["path"])
            if not place.exists():
                self._send(404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "there is no such file"})
                return
            found = place.read_bytes()
        elif name == "workspace/delete":
            shutil.rmtree(space.place(body["path"]))
        elif name == "jobs/runs/submit":
            found = {"run_id": space.start(body)}
        elif name == "jobs/runs/get":
            run_id = int(body["run_id"])
            tasks = [{"task_key": "embed", "run_id": run_id}]
            page = f"{space.address}/run/{run_id}"
            found = {"run_id": run_id, "state": space.state(run_id), "run_page_url": page, "tasks": tasks}
        elif name == "jobs/runs/get-output":
            log = space.log(int(body["run_id"]))
            found = {"error": log.strip().splitlines()[-1] if log.strip() else ""}
        elif name == "jobs/runs/cancel":
            space.cancelled.append(body["run_id"])
            space.runs[body["run_id"]]["process"].kill()
        else:
            self._send(404, {"error_code": "ENDPOINT_NOT_FOUND", "message": name})
            return
        self._send(200, found)

    def _send(self, status: int, found: Any) -> None:
        data = found if isinstance(found, bytes) else json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if isinstance(found, bytes) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(root: Path, conf: dict[str, str]) -> Iterator[Workspace]:
    """A workspace on a free port of this machine; its runs end with it."""
    space = Workspace(root, conf)
    handler = type("Handler", (_Handler,), {"workspace": space})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    space.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield space
    finally:
        server.shutdown()
        for run in space.runs.values():
            run["process"].kill()
            run["process"].wait()
