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

poll_seconds = 10.0


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
        run ends before Shoal does.
        """
        with _asking():
            workspace = WorkspaceClient()
            folder = f"/Workspace/Users/{workspace.current_user.me().user_name}/.shoal/{uuid.uuid4().hex[:12]}"
            say(f"submitting to {workspace.config.host}")
            workspace.workspace.mkdirs(folder)
            is_over = True
            try:
                self._upload(workspace, folder)
                task = SubmitTask.from_dict(self._task(folder, self.cluster))
                run_id = workspace.jobs.submit(run_name=self.name, tasks=[task]).run_id
                is_over = False
                found = _ended(workspace, run_id, say)
                is_over = True
                return self._told(workspace, found, folder, say)
            except KeyboardInterrupt:
                is_over = True
                raise
            finally:
                if is_over:
                    workspace.workspace.delete(folder, recursive=True)

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

    def _told(self, workspace: WorkspaceClient, run: Run, folder: str, say: Callable[[str], None]) -> int:
        """The exit code that Shoal has left in the folder, once its output has been printed."""
        try:
            with workspace.workspace.download(f"{folder}/{OUTCOME}") as stream:
                outcome = json.loads(stream.read())
        except NotFound:
            raise RunError(f"{run.run_page_url}: the run ended before Shoal did ({_reason(workspace, run)})") from None
        for line in outcome["stderr"].splitlines():
            say(line)
        sys.stdout.write(outcome["stdout"])
        sys.stdout.flush()
        return int(outcome["exit_code"])


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
    """The run when it is over, with a line for each of its states; an interrupt cancels it.

    RunError where nobody answers any more: then it goes on, and its files stay.
    """
    before = None
    try:
        while True:
            run = workspace.jobs.get_run(run_id)
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
        workspace.jobs.cancel_run(run_id)
        raise
    except (DatabricksError, OSError) as error:
        raise RunError(
            f"run {run_id} of Databricks can no longer be followed ({first_line(error)}); it goes on there: look at it "
            "before you submit it again",
            code="SPARK_UNAVAILABLE",
        ) from error


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
    except (BadRequest, NotFound, PermissionDenied, Unauthenticated) as error:
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
