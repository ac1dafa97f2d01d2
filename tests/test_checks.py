"""Checks: what a declared type takes, and the sentence about what it does not."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from palimpsest.checks import check_fields, expected, is_a, shown

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (int, [0, -3, 10**30], [True, 1.0, "1", None, NAN]),
        (float, [0, 1.5, -2], [True, NAN, INFINITY, "1.0", None, 1j]),
        (bool, [True, False], [0, 1, "true", None]),
        (str, ["", "x"], [1, None, b"x"]),
        (int | None, [3, None], [3.0, False, "none"]),
        (Literal["a", "b"], ["a"], ["c", 1, None]),
        (Literal[1], [1], [True, 1.0]),
        (tuple[str, ...], [(), ("x", "y")], ["xy", ["x"], ("x", 1)]),
        (tuple[float, float], [(1, 2.0)], [(1,), (1, 2, 3), (1, NAN), [1, 2]]),
        (list[int], [[], [1]], [(1,), [1.5]]),
        (Any, [1, "x"], []),
    ],
)
def test_a_type_takes_its_values_and_no_others(kind, good, bad):
    assert all(is_a(value, kind) for value in good)
    assert not any(is_a(value, kind) for value in bad)


@dataclass
class Inner:
    share: float = 0.5


@dataclass
class Outer:
    inner: Inner
    names: tuple[str, ...] = ()


def test_the_sentence_names_field_value_and_what_is_expected():
    check_fields(Outer(Inner()))
    with pytest.raises(ValueError, match=r"data\.inner is 3; it must be a Inner"):
        check_fields(Outer(3), "data.")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"names is 'abc'; it must be a tuple, each value a text"):
        check_fields(Outer(Inner(), "abc"))  # type: ignore[arg-type]
    assert expected(float | None) == "a finite number or None"


def test_long_values_are_cut():
    assert len(shown("x" * 10**6)) == 80
