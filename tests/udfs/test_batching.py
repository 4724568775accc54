from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.udfs.batching import TokenBudget, plan_microbatches

LENGTHS = st.lists(st.integers(min_value=0, max_value=600), max_size=200).map(lambda x: np.array(x, dtype=np.int32))


@given(lengths_N=LENGTHS, budget=st.integers(min_value=1, max_value=5000), packed=st.booleans())
def test_every_chunk_is_in_exactly_one_microbatch(lengths_N: np.ndarray, budget: int, packed: bool) -> None:
    planned = plan_microbatches(lengths_N, budget, packed=packed)
    assert sorted(int(row) for part in planned for row in part) == list(range(len(lengths_N)))


@given(lengths_N=LENGTHS, budget=st.integers(min_value=1, max_value=5000), packed=st.booleans())
def test_a_microbatch_stays_within_the_budget_or_holds_one_chunk(
    lengths_N: np.ndarray, budget: int, packed: bool
) -> None:
    for part in plan_microbatches(lengths_N, budget, packed=packed):
        lengths = np.maximum(lengths_N[part], 1)
        cost = lengths.sum() if packed else lengths.max() * len(part)
        assert cost <= budget or len(part) == 1


@given(lengths_N=LENGTHS, budget=st.integers(min_value=1, max_value=5000))
def test_chunks_are_ordered_from_long_to_short(lengths_N: np.ndarray, budget: int) -> None:
    order = [int(row) for part in plan_microbatches(lengths_N, budget) for row in part]
    assert all(lengths_N[a] >= lengths_N[b] for a, b in pairwise(order))


@given(lengths_N=LENGTHS.filter(len), budget=st.integers(min_value=1, max_value=5000))
def test_microbatches_are_as_full_as_the_order_allows(lengths_N: np.ndarray, budget: int) -> None:
    planned = plan_microbatches(lengths_N, budget)
    for part in planned[:-1]:
        longest = max(int(lengths_N[part[0]]), 1)
        assert longest * (len(part) + 1) > budget


def test_a_budget_grows_while_it_pays_and_then_stays() -> None:
    budget = TokenBudget(value=100, ceiling=1000)
    budget.observe(100, 1.0)
    assert budget.value == 200
    budget.observe(190, 1.0)
    assert budget.value == 400
    budget.observe(400, 2.2)
    assert (budget.value, budget.settled) == (400, True)
    budget.observe(400, 0.1)
    assert budget.value == 400


def test_a_pass_that_is_far_from_full_says_nothing_about_the_budget() -> None:
    budget = TokenBudget(value=100, ceiling=1000)
    budget.observe(50, 0.001)
    assert budget.value == 100


@pytest.mark.parametrize(("value", "expected"), [(1000, 500), (100, 64), (64, 64)])
def test_a_budget_halves_down_to_its_floor_and_never_grows_back(value: int, expected: int) -> None:
    budget = TokenBudget(value=value, ceiling=4000)
    budget.halve()
    budget.observe(expected, 0.001)
    assert budget.value == expected


def test_a_budget_below_the_floor_is_not_raised_by_halving() -> None:
    budget = TokenBudget.fixed(10)
    budget.halve()
    assert budget.value == 10
