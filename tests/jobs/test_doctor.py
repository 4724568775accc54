"""What a doctor says of executors that do not fit together; tests/jobs/test_cluster.py visits real ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyspark.sql import SparkSession

from shoal.conf.loader import load_run
from shoal.jobs.doctor import Visit, doctor, lines, problems_of

CANARIES_CD = np.eye(3, 4, dtype=np.float32)
FACTS: dict[str, Any] = {
    "host": "a",
    "executor": 7,
    "python": "3.11.7",
    "shoal": "0.1.0",
    "libraries": {"torch": "2.9", "numpy": "2.3"},
    "model_digest": "abc",
    "precision": "float32",
    "device": "cpu",
    "gpu": None,
}


def visited(canaries_CD: np.ndarray = CANARIES_CD, **facts: Any) -> Visit:
    return Visit({**FACTS, **facts}, canaries_CD)


def test_executors_that_are_alike_are_fit() -> None:
    assert problems_of([visited(), visited(host="b"), visited(executor=8)], 3) == []


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"python": "3.11.9"}, "python is 3.11.7 on a/7 and 3.11.9 on b/7; give both the same Python"),
        ({"shoal": ""}, "shoal is 0.1.0 on a/7 and none on b/7; give both the same Shoal"),
        ({"libraries": {"torch": "2.8", "numpy": "2.3"}}, "libraries is torch 2.9 on a/7 and torch 2.8 on b/7"),
        ({"libraries": {"torch": "2.9"}}, "libraries is numpy 2.3 on a/7 and no numpy on b/7"),
        ({"model_digest": "abd"}, "model_digest is abc on a/7 and abd on b/7; one of them has other files"),
        ({"precision": "bfloat16"}, "precision is float32 on a/7 and bfloat16 on b/7"),
    ],
)
def test_what_differs_is_named_with_both_executors(facts: dict[str, Any], told: str) -> None:
    (problem,) = problems_of([visited(), visited(host="b", **facts)], 2)
    assert problem.startswith(told)


def test_a_gpu_that_torch_does_not_find_is_a_problem() -> None:
    found = visited(device="cuda:1", gpu={"name": "H200"})
    lost = visited(host="b", device="cuda:1")
    (told,) = problems_of([found, lost], 2)
    assert told.startswith("b/7 was given cuda:1, and torch finds no CUDA device there")


def test_other_vectors_are_a_problem_beyond_what_the_precision_allows() -> None:
    moved = CANARIES_CD.copy()
    moved[1, 0] = 0.02  # a cosine of 0.9998
    told = problems_of([visited(), visited(moved, host="b")], 2)
    assert len(told) == 1
    assert told[0].startswith("the encoder gives other vectors on b/7 than on a/7 (lowest cosine 0.9998")
    both = [visited(precision="bfloat16"), visited(moved, host="b", precision="bfloat16")]
    assert problems_of(both, 2) == []


def test_executors_that_were_not_visited_are_counted() -> None:
    (told,) = problems_of([visited()], 3)
    assert told.startswith("3 executors are registered, and 1 were visited")


@pytest.mark.spark
def test_in_local_mode_the_driver_is_the_one_executor(spark: SparkSession, run_file: Callable[..., Path]) -> None:
    found = doctor(spark, load_run(run_file()))
    assert (found["status"], found["problems"]) == ("fit", [])
    (facts,) = found["executors"]
    assert (facts["model_digest"], facts["model_sent"], facts["gpu"], facts["shoal"]) == ("", False, None, "0.1.0")
    told = lines(found)
    assert told[0].startswith("local[2,2]: 1 executors")
    assert "model hash" in told[1]
