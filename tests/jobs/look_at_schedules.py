"""Run by the Python that has Airflow and the schemas of Kubernetes: what they make of rendered schedules, as JSON.

Arguments: a folder with DAG files, and a Kubernetes manifest. The command of the DAG ends with $CODE.
"""

import json
import os
import sys
from pathlib import Path

import kubernetes_validate
import yaml
from airflow.dag_processing.dagbag import DagBag


def main() -> None:
    bag = DagBag(dag_folder=sys.argv[1])
    dags = {}
    for name, dag in bag.dags.items():
        tasks = {}
        for task in dag.tasks:
            tasks[task.task_id] = {
                "retries": task.retries,
                "minutes": task.retry_delay.total_seconds() / 60,
                "hours": task.execution_timeout.total_seconds() / 3600,
                "raised": {code: raised(task.python_callable, code) for code in range(5)},
            }
        dags[name] = {"max_active_runs": dag.max_active_runs, "catchup": dag.catchup, "tasks": tasks}
    manifest = yaml.safe_load(Path(sys.argv[2]).read_text(encoding="utf-8"))
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(manifest, version, strict=True)
    sys.stdout.write(json.dumps({"problems": bag.import_errors, "dags": dags, "kubernetes": version}))


def raised(run, code):
    """What the task raises when the command ends with the code."""
    os.environ["CODE"] = str(code)
    try:
        run()
    except Exception as error:  # noqa: BLE001 - which it is, is the question
        return type(error).__name__
    return None


main()
