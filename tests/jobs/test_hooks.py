"""What a verb says while it works, without what came from the environment."""

from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.conf.loader import load_run
from shoal.jobs.hooks import Hooks, masked


def test_what_came_from_the_environment_is_masked_in_what_is_said_and_steps_go_through(
    run_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_TEST_PLACE", "hidden-bucket")
    config = load_run(run_file(destination={"path": "s3a://${SHOAL_TEST_PLACE}/docs"}))
    said: list[str] = []
    steps: list[str] = []

    hooks = masked(Hooks(said.append, steps.append), config)
    hooks.say("writing to s3a://hidden-bucket/docs")
    hooks.step("planned")

    assert said == ["writing to ***"]
    assert steps == ["planned"]
