"""Arguments out of range, in one sentence."""


def require(name: str, value: object, holds: bool, expected: str) -> None:
    """Raise ValueError unless holds."""
    if not holds:
        raise ValueError(f"{name} is {value!r}; it must be {expected}")


def is_count(value: object) -> bool:
    """A whole number from 1 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
