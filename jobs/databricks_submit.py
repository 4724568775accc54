"""`shoal submit` to Databricks: a one-time run of a job, out of a folder of the workspace that is made for it."""

import json
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from databricks.sdk import WorkspaceClient
from databricks.sdk.errors import BadRequest, DatabricksError, NotFound, PermissionDenied, Unauthenticated
from databricks.sdk.service.jobs import Run, RunLifeCycleState, SubmitTask
from databricks.sdk.service.workspace import ImportFormat, Language

from shoal.conf.errors import ConfigError, RefusedError, RunError, UserError, first_line
from shoal.conf.run import RunConfig
from shoal.conf.target import TargetConfig
from shoal.jobs.databricks_job import NOTEBOOK, NOTEBOOK_SOURCE, ZIP, arguments_of, cluster_of, libraries_of, run_task
from shoal.jobs.shoal_zip import pack_shoal

OUTCOME: Final = "outcome.json"
FAILURES: Final = (RunError.exit_code, UserError.exit_code, RefusedError.exit_code)
ENDS: Final = (RunLifeCycleState.TERMINATED, RunLifeCycleState.SKIPPED, RunLifeCycleState.INTERNAL_ERROR)

REFUSALS: Final = (BadRequest, NotFound, PermissionDenied, Unauthenticated)
CANCEL_SECONDS: Final = 60.0

poll_seconds = 10.0
patience_seconds = 600.0


@dataclass(frozen=True)
class DatabricksRun:
    """A verb as a one-time run of a job.

    name: of the run; file: the run file, which goes along. cluster: the fields of the task that name the cluster, and
    shown: the same with secrets masked.
    """

    name: str
    file: Path
    arguments: tuple[str, ...]
    cluster: Mapping[str, Any]
    shown: Mapping[str, Any]
    libraries: Sequence[Mapping[str, Any]]

    def document(self) -> dict[str, object]:
        """What `--dry-run --json` prints; nobody has been asked, so the folder's place is not known yet."""
        folder = "/Workspace/Users/USER/.shoal/RUN"
        return {
            "status": "composed",
            "files": [f"{folder}/{name}" for name in (NOTEBOOK, ZIP, self.file.name)],
            "run": {"run_name": self.name, "tasks": [self._task(folder, self.shown)]},
        }

    def lines(self) -> list[str]:
        """The same for people."""
        return json.dumps(self.document(), indent=2).splitlines()

    def run(self, say: Callable[[str], None]) -> int:
        """Puts the files into the workspace, has them run, waits, and returns Shoal's exit code; its output is ours.

        Raises ConfigError where the workspace refuses what it is asked for, RunError where nobody answers or where the
        run ends before Shoal does, RefusedError where it goes on and can no longer be followed.
        """
        with _asking():
            outcome = self._outcome(WorkspaceClient(), say)
        for line in outcome["stderr"].splitlines():
            say(line)
        sys.stdout.write(outcome["stdout"])
        sys.stdout.flush()
        return int(outcome["exit_code"])

    def _outcome(self, workspace: WorkspaceClient, say: Callable[[str], None]) -> dict[str, Any]:
        """What Shoal has left of the run in its folder, which is deleted once nobody needs it."""
        token = uuid.uuid4().hex
        folder = f"/Workspace/Users/{workspace.current_user.me().user_name}/.shoal/{token[:12]}"
        say(f"submitting to {workspace.config.host}")
        workspace.workspace.mkdirs(folder)
        is_needed = False
        try:
            self._upload(workspace, folder)
            task = SubmitTask.from_dict(self._task(folder, self.cluster))
            is_needed = True
            try:
                # The client asks again when no answer comes; with the token that starts no second run.
                waiting = workspace.jobs.submit(run_name=self.name, tasks=[task], idempotency_token=token)
            except REFUSALS:
                is_needed = False
                raise
            try:
                run = _ended(workspace, waiting.run_id, say)
            except KeyboardInterrupt:
                is_needed = False
                raise
            outcome = _read_outcome(workspace, f"{folder}/{OUTCOME}")
            is_needed = False
            if outcome is None:
                reason = _reason(workspace, run)
                raise RunError(f"{run.run_page_url}: the run ended before Shoal did ({reason})")
            return outcome
        finally:
            if not is_needed:
                _delete(workspace, folder, say)

    def _task(self, folder: str, cluster: Mapping[str, Any]) -> dict[str, Any]:
        task: dict[str, Any] = run_task(f"{folder}/{NOTEBOOK}", folder, self.arguments, FAILURES, OUTCOME)
        return {**task, **cluster, "libraries": list(self.libraries)}

    def _upload(self, workspace: WorkspaceClient, folder: str) -> None:
        files = workspace.workspace
        notebook = NOTEBOOK_SOURCE.encode()
        files.upload(f"{folder}/{NOTEBOOK}", notebook, format=ImportFormat.SOURCE, language=Language.PYTHON)
        files.upload(f"{folder}/{self.file.name}", self.file.read_bytes(), format=ImportFormat.RAW)
        with tempfile.TemporaryDirectory(prefix="shoal-") as made:
            pack_shoal(Path(made) / ZIP)
            files.upload(f"{folder}/{ZIP}", (Path(made) / ZIP).read_bytes(), format=ImportFormat.RAW)


def composed_run(
    target: TargetConfig, verb: str, file: Path, config: RunConfig, more: Sequence[str] = ()
) -> DatabricksRun:
    """What runs `shoal VERB FILE MORE` on the target; ConfigError for a cluster that Databricks would not know."""
    cluster, shown = cluster_of(target), target.redacted()["new_cluster"]
    return DatabricksRun(
        name=f"shoal {verb} {config.name}",
        file=file.absolute(),
        arguments=tuple(arguments_of(target, verb, file.name, config, more)),
        cluster=cluster,
        shown={"new_cluster": {**cluster["new_cluster"], **shown}} if shown else cluster,
        libraries=libraries_of(target, config),
    )


def _ended(workspace: WorkspaceClient, run_id: int, say: Callable[[str], None]) -> Run:
    """The run when it is over, with a line for each of its states; an interrupt cancels it, and waits for its end.

    RefusedError, which no scheduler tries again, where nobody has answered for `patience_seconds`: then it goes on, and
    its files stay.
    """
    before, answered = None, time.monotonic()
    try:
        while True:
            try:
                run = workspace.jobs.get_run(run_id)
            except (DatabricksError, OSError, ValueError) as error:
                if isinstance(error, REFUSALS) or time.monotonic() - answered > patience_seconds:
                    raise RefusedError(
                        f"run {run_id} of Databricks can no longer be followed ({first_line(error)}); it goes on "
                        "there: look at it before you submit it again"
                    ) from error
                time.sleep(poll_seconds)
                continue
            answered = time.monotonic()
            state = run.state.life_cycle_state if run.state else None
            if before is None:
                say(f"its log, while it runs: {run.run_page_url}")
            if state != before and state is not None:
                say(f"run {run_id}: {state.value.lower()}")
            if state in ENDS:
                return run
            before = state
            time.sleep(poll_seconds)
    except KeyboardInterrupt:
        _cancel(workspace, run_id)
        raise


def _cancel(workspace: WorkspaceClient, run_id: int) -> None:
    """Cancels a run and gives it some time, in which it tells of its end and still has its files."""
    workspace.jobs.cancel_run(run_id)
    end = time.monotonic() + CANCEL_SECONDS
    while time.monotonic() < end:
        run = workspace.jobs.get_run(run_id)
        if run.state and run.state.life_cycle_state in ENDS:
            return
        time.sleep(poll_seconds)


def _read_outcome(workspace: WorkspaceClient, path: str) -> dict[str, Any] | None:
    """What Shoal has written when it ended; None where it has not."""
    try:
        with workspace.workspace.download(path) as stream:
            found: dict[str, Any] = json.loads(stream.read())
    except NotFound:
        return None
    except ValueError as error:
        raise RunError(f"{path} of the workspace does not say how the run ended ({first_line(error)})") from error
    return found


def _delete(workspace: WorkspaceClient, folder: str, say: Callable[[str], None]) -> None:
    """Deletes a folder of the workspace; that it stays is told and changes nothing."""
    try:
        workspace.workspace.delete(folder, recursive=True)
    except (DatabricksError, OSError, ValueError) as error:
        say(f"{folder} of the workspace stays ({first_line(error)}); delete it when nobody needs it")


def _reason(workspace: WorkspaceClient, run: Run) -> str:
    """What the platform says of a run that failed, and of its task."""
    said = [run.state.state_message if run.state else None]
    for task in run.tasks or ():
        output = workspace.jobs.get_run_output(task.run_id or 0)
        said.append((output.error or "").partition("\n")[0])
    return "; ".join(dict.fromkeys(filter(None, said))) or "no reason was given"


@contextmanager
def _asking() -> Iterator[None]:
    """What the workspace's client raises, as an error of ours."""
    try:
        yield
    except REFUSALS as error:
        raise ConfigError(
            f"Databricks refuses it: {first_line(error)}; see the target, and who you are there"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"no workspace of Databricks can be asked ({first_line(error)}); set DATABRICKS_HOST and DATABRICKS_TOKEN, "
            "or DATABRICKS_CONFIG_PROFILE to a profile of ~/.databrickscfg"
        ) from error
    except (DatabricksError, OSError, TimeoutError) as error:
        raise RunError(f"Databricks does not answer: {first_line(error)}", code="SPARK_UNAVAILABLE") from error
