"""The digest: types differ, order of keys does not matter, and the value never changes between releases."""

from itertools import combinations

import pytest

from shoal.conf.fingerprint import digest

DIFFERENT = [None, False, True, 0, 1, 1.0, -0.0, 0.0, "", "1", "None", b"", b"1", [], [1], ["1"], [[1]], {}, {"a": 1}]


def test_values_of_different_types_never_share_a_digest() -> None:
    digests = [digest(value) for value in DIFFERENT]
    clashes = [pair for pair in combinations(range(len(DIFFERENT)), 2) if digests[pair[0]] == digests[pair[1]]]
    assert clashes == []


def test_moving_a_border_between_neighbours_changes_the_digest() -> None:
    assert digest(["ab", "c"]) != digest(["a", "bc"]) != digest([["a"], "bc"])
    assert digest({"a": "bc"}) != digest({"ab": "c"})


def test_key_order_and_tuple_against_list_do_not_matter() -> None:
    assert digest({"a": 1, "b": (2, 3)}) == digest({"b": [2, 3], "a": 1})


def test_the_golden_value_is_frozen() -> None:
    value = {"name": "shoal", "dim": 384, "scale": 0.5, "normalize": True, "prompt": None, "raw": b"\x00", "list": [1]}
    assert digest(value) == "a4f61ecd2e893027a2c6615e17bfcdbb551197d5be0f6021ece273fd9fdd7ab8"


def test_a_lone_surrogate_has_a_digest() -> None:
    assert digest("\ud800") != digest("?")


def test_an_unknown_type_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="got a set"):
        digest({"a": {1, 2}})
