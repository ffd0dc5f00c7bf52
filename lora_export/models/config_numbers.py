"""Numbers of a config that JSON cannot write: transformers writes infinity as {"__float__": "Infinity"}."""

from __future__ import annotations

from typing import Any

TAG = "__float__"
NUMBERS = {name: float(name) for name in ("Infinity", "-Infinity", "NaN")}


def with_numbers(value: Any) -> Any:
    """The value with these objects as the numbers that they stand for, at any depth."""
    if isinstance(value, list):
        return [with_numbers(each) for each in value]
    if not isinstance(value, dict):
        return value
    number = value.get(TAG) if len(value) == 1 else None
    if isinstance(number, str) and number in NUMBERS:
        return NUMBERS[number]
    return {key: with_numbers(each) for key, each in value.items()}
