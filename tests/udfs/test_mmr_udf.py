import itertools

import numpy as np
import pytest

from shoal.udfs.mmr_udf import maximal_marginal_relevance

RNG = np.random.default_rng(7)
VECTORS = RNG.normal(size=(9, 4)).astype(np.float32)
VECTORS /= np.linalg.norm(VECTORS, axis=1, keepdims=True)
SCORES = RNG.uniform(size=9).astype(np.float32)


def step_by_step(k: int, relevance: float) -> list[int]:
    """The definition, candidate by candidate."""
    chosen: list[int] = []
    for _ in range(k):
        worth = {
            row: relevance * float(SCORES[row])
            - (1 - relevance) * max((float(VECTORS[row] @ VECTORS[other]) for other in chosen), default=0.0)
            for row in range(len(SCORES))
            if row not in chosen
        }
        chosen.append(max(worth, key=lambda row: (worth[row], -row)))
    return chosen


@pytest.mark.parametrize(("k", "relevance"), list(itertools.product((1, 4, 9), (0.0, 0.3, 0.7, 1.0))))
def test_each_choice_is_the_best_by_the_definition(k: int, relevance: float) -> None:
    assert maximal_marginal_relevance(VECTORS, SCORES, k, relevance) == step_by_step(k, relevance)


def test_relevance_alone_is_the_order_of_the_scores() -> None:
    assert maximal_marginal_relevance(VECTORS, SCORES, 9, 1.0) == np.argsort(-SCORES).tolist()


def test_a_copy_comes_last_where_anything_else_is_left() -> None:
    vectors = np.array([[1, 0], [1, 0], [0, 1]], dtype=np.float32)
    scores = np.array([1.0, 1.0, 0.4], dtype=np.float32)
    assert maximal_marginal_relevance(vectors, scores, 3, 0.5) == [0, 2, 1]


def test_more_than_there_is_gives_all_and_nothing_gives_nothing() -> None:
    assert sorted(maximal_marginal_relevance(VECTORS, SCORES, 50, 0.5)) == list(range(9))
    assert maximal_marginal_relevance(np.empty((0, 0), np.float32), np.empty(0, np.float32), 3, 0.5) == []
