"""The fields of a file's JSON, each of the type that it should be, or a sentence that says where it is not."""

from __future__ import annotations

import math
import re
from typing import Any

from lora_export.errors import InputRefused
from lora_export.models.pt2.program_types import DTYPES, ITEM_BYTES, Symbol, Tensor

SYMBOL = re.compile(r"Symbol\('(\w{1,64})'(?:, \w{1,32}=(?:True|False))*\)|(?!\d)(\w{1,64})")
NUMBERS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}  # as torch writes them
STRIDED = 7


def expect(value: Any, kind: type | tuple[type, ...], place: str, what: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputRefused(f"{place}: where {what} should stand is {str(value)[:80]!r}")
    return value


def table(value: Any, place: str) -> dict[str, Any]:
    return expect(value, dict, place, "a JSON object")  # type: ignore[no-any-return]


def items(value: Any, place: str) -> list[Any]:
    return expect(value, list, place, "a list")  # type: ignore[no-any-return]


def text(value: Any, place: str) -> str:
    return expect(value, str, place, "a text")  # type: ignore[no-any-return]


def whole(value: Any, place: str) -> int:
    number: int = expect(value, int, place, "a whole number")
    if not -(1 << 63) <= number < 1 << 63:
        raise InputRefused(f"{place}: {number.bit_length()} bits are too many for a number")
    return number


def real(value: Any, place: str) -> float:
    if isinstance(value, str) and value in NUMBERS:
        return NUMBERS[value]
    number: float = expect(value, (int, float), place, "a number")
    try:
        return float(number)
    except OverflowError:
        raise InputRefused(f"{place}: a number is beyond number") from None


def only(union: Any, place: str) -> tuple[str, Any]:
    """The one field of a union."""
    fields = table(union, place)
    if len(fields) != 1:
        raise InputRefused(f"{place}: one field is expected, and there are {', '.join(fields) or 'none'}")
    ((name, value),) = fields.items()
    return name, value


def size_of(told: Any, place: str) -> int | Symbol:
    kind, value = only(told, place)
    if kind == "as_int":
        if whole(value, place) < 0:
            raise InputRefused(f"{place}: a size is negative")
        return int(value)
    if kind != "as_expr":
        raise InputRefused(f"{place}: a size is told as {kind}")
    expression = table(value, place)
    match = SYMBOL.fullmatch(text(expression.get("expr_str"), place))
    hint = expression.get("hint")
    number = None if hint is None else whole(table(hint, place).get("as_int"), place)
    return Symbol((match[1] or match[2]) if match else "", number)


def tensor_of(meta: dict[str, Any], place: str) -> Tensor:
    if meta.get("layout") != STRIDED:
        raise InputRefused(f"{place} is no dense tensor; only such are supported")
    return Tensor(
        dtype_of(meta.get("dtype"), place), tuple(size_of(size, place) for size in items(meta.get("sizes"), place))
    )


def dtype_of(number: Any, place: str) -> str:
    if whole(number, place) not in DTYPES:
        raise InputRefused(f"{place} is of torch's type {number}, which is not supported ({', '.join(ITEM_BYTES)} are)")
    return DTYPES[number]
