"""Refusals: what came, what was expected, in one sentence."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, Literal


def check(condition: bool, sentence: str) -> None:
    """Raise ValueError(sentence) unless the condition holds."""
    if not condition:
        raise ValueError(sentence)


def require(name: str, value: object, holds: bool, expected: str) -> None:
    """Raise ValueError, with a sentence made of these words, unless holds.

    >>> require("top_p", 2.0, False, "in (0, 1]")
    Traceback (most recent call last):
    ValueError: top_p is 2.0; it must be in (0, 1]
    """
    if not holds:
        raise ValueError(f"{name} is {shown(value)}; it must be {expected}")


def is_count(value: object) -> bool:
    """A whole number from 1 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_fields(instance: Any, prefix: str = "") -> None:
    """Raise ValueError unless every field of a dataclass holds a value of the type that it declares.

    Types may be bool, int, float, str, dataclasses, Literal, unions, tuples and lists of these; others are not looked
    at. A whole number is a float, too; True is not a number; NaN and the infinities are not floats.

    Args:
        instance: a dataclass.
        prefix: what stands before a field's name in the sentence, such as "optim.".

    >>> @dataclasses.dataclass
    ... class Walk:
    ...     steps: int
    ...     speed: float = 1.0
    >>> check_fields(Walk(3, 2), "walk.")
    >>> check_fields(Walk(3, float("nan")), "walk.")
    Traceback (most recent call last):
    ValueError: walk.speed is nan; it must be a finite number
    """
    hints = typing.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if not is_a(value, hints[field.name]):
            require(prefix + field.name, value, False, expected(hints[field.name]))


def is_a(value: object, kind: Any) -> bool:
    """Whether value is of a declared type, as `check_fields` reads it."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(is_a(value, option) for option in arguments)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in arguments)
    if origin is tuple and arguments[-1] is not Ellipsis:
        return isinstance(value, tuple) and len(value) == len(arguments) and all(map(is_a, value, arguments))
    if origin in (tuple, list):
        return isinstance(value, origin) and all(is_a(item, arguments[0]) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is type(None) or kind is None:
        return value is None
    if kind in (bool, str) or (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        return isinstance(value, kind)
    return True


def expected(kind: Any) -> str:
    """A declared type in words.

    >>> expected(int | None), expected(tuple[float, float]), expected(Literal["a", "b"])
    ('a whole number or None', '2 values, each a finite number', "'a' or 'b'")
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(expected, arguments))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"{len(arguments)} values, each {expected(arguments[0])}"
    if origin in (tuple, list):
        return f"a {origin.__name__}, each value {expected(arguments[0])}"
    words = {bool: "True or False", int: "a whole number", float: "a finite number", str: "a text", type(None): "None"}
    return words.get(kind, f"a {getattr(kind, '__name__', kind)}")


def shown(value: object, most: int = 80) -> str:
    """A value as a sentence may show it: cut where it is long.

    >>> shown("x" * 1000, 12)
    "'xxxxxxx ..."
    """
    text = repr(value)
    return text if len(text) <= most else text[: most - 4] + " ..."
