"""Type checks for the fields of a .pt2 file's JSON. An error names the location and the expected type."""

from __future__ import annotations

import math
import re
from typing import Any

from lora_export.errors import InputRefused
from lora_export.models.pt2.program_types import DTYPES_BY_NUMBER, ITEM_BYTES, Symbol, TensorType

SYMBOL = re.compile(r"Symbol\('(\w{1,64})'(?:, \w{1,32}=(?:True|False))*\)|(?!\d)(\w{1,64})")
NOT_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}  # as torch writes them
STRIDED = 7  # torch's number for dense tensors


def expect(value: Any, kind: type | tuple[type, ...], where: str, what: str) -> Any:
    """The value, if it is of this type. Raises InputRefused otherwise; a bool is no number."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputRefused(f"{where}: expected {what}, found {str(value)[:80]!r}")
    return value


def json_object(value: Any, where: str) -> dict[str, Any]:
    return expect(value, dict, where, "a JSON object")  # type: ignore[no-any-return]


def json_list(value: Any, where: str) -> list[Any]:
    return expect(value, list, where, "a list")  # type: ignore[no-any-return]


def string(value: Any, where: str) -> str:
    return expect(value, str, where, "a string")  # type: ignore[no-any-return]


def boolean(value: Any, where: str) -> bool:
    return expect(value, bool, where, "true or false")  # type: ignore[no-any-return]


def integer(value: Any, where: str) -> int:
    number: int = expect(value, int, where, "an integer")
    if not -(1 << 63) <= number < 1 << 63:
        raise InputRefused(f"{where}: an integer of {number.bit_length()} bits is too large")
    return number


def real(value: Any, where: str) -> float:
    if isinstance(value, str) and value in NOT_FINITE:
        return NOT_FINITE[value]
    number: float = expect(value, (int, float), where, "a number")
    try:
        return float(number)
    except OverflowError:
        raise InputRefused(f"{where}: a number is too large") from None


def single_field(union: Any, where: str) -> tuple[str, Any]:
    """The name and the value of a union's one field."""
    fields = json_object(union, where)
    if len(fields) != 1:
        raise InputRefused(f"{where}: expected one field, found {', '.join(fields) or 'none'}")
    ((name, value),) = fields.items()
    return name, value


def size_of(union: Any, where: str) -> int | Symbol:
    """A size: a number, or the symbol of one that varies. An expression has no name, and is not evaluated."""
    kind, value = single_field(union, where)
    if kind == "as_int":
        if integer(value, where) < 0:
            raise InputRefused(f"{where}: a size is negative")
        return int(value)
    if kind != "as_expr":
        raise InputRefused(f"{where}: a size is of the kind {kind}, which is not supported")
    expression = json_object(value, where)
    match = SYMBOL.fullmatch(string(expression.get("expr_str"), where))
    hint = expression.get("hint")
    number = None if hint is None else integer(json_object(hint, where).get("as_int"), where)
    return Symbol((match[1] or match[2]) if match else "", number)


def tensor_type_of(meta: dict[str, Any], where: str) -> TensorType:
    if meta.get("layout") != STRIDED:
        raise InputRefused(f"{where} is no dense tensor; only dense tensors are supported")
    sizes = tuple(size_of(size, where) for size in json_list(meta.get("sizes"), where))
    return TensorType(dtype_of(meta.get("dtype"), where), sizes)


def dtype_of(number: Any, where: str) -> str:
    if integer(number, where) not in DTYPES_BY_NUMBER:
        raise InputRefused(f"{where} has torch's dtype {number}, which is not supported ({', '.join(ITEM_BYTES)} are)")
    return DTYPES_BY_NUMBER[number]
