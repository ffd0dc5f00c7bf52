"""JSON: every noun as a document with a schema.

A verdict's is written down in `verdict-2.schema.json` beside this file, field by field. A new field does not
change the number: whoever reads a document passes over what they do not know.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lora_export.verification.against_checkpoint import Audit
from lora_export.verification.parity import Verdict

VERSIONS = {"verdict": 2}  # of a document's schema, 1 where none is given; grows when a field is removed or redefined


class Placement(Protocol):
    """What ran where, as a runtime tells it."""

    @property
    def requested_provider(self) -> str: ...
    @property
    def by_provider(self) -> Mapping[str, Sequence[tuple[str, str]]]: ...  # provider -> (node, operator) ...
    @property
    def compute_nodes(self) -> int: ...
    @property
    def off_provider(self) -> Sequence[tuple[str, str, str]]: ...  # (provider, node, operator)
    @property
    def options(self) -> Mapping[str, str]: ...
    @property
    def version(self) -> str: ...


def as_dict(noun: Any) -> dict[str, Any]:
    """A dataclass as a JSON document: its fields, and the schema's name and version.

    Arrays are told by shape and dtype. JSON has no NaN and no infinity: they become null, and
    `<field>_text` says which.
    """
    return {"schema": _schema(noun), **_members(noun)}


def document(
    verdict: Verdict | Audit,
    placement: Placement | None = None,
    about: Mapping[str, Any] | None = None,
    diagnosis: Any = None,
    exit_code: int | None = None,
) -> dict[str, Any]:
    """A verdict with what it takes to trust it: what ran where, and facts `about` the run (versions, files, seed).

    `diagnosis` says where a difference begins, if somebody looked: a mapping or dataclass with `first`, `why`
    and `layers`. `exit_code` is another than the verdict's own where the provider did not do the work.
    """
    result = as_dict(verdict) | {
        "exit_code": verdict.exit_code if exit_code is None else exit_code,
        "placement": None,
        "diagnosis": _plain(diagnosis),
        "about": _plain(about or {}),
    }
    if placement is not None:
        result["placement"] = {
            "requested_provider": placement.requested_provider,
            "compute_nodes": placement.compute_nodes,
            "off_provider": _plain(placement.off_provider),
            "nodes": {provider: len(nodes) for provider, nodes in placement.by_provider.items()},
            "options": _plain(placement.options),
            "version": placement.version,
        }
    return result


def _schema(noun: Any) -> str:
    name = re.sub(r"(?<!^)(?=[A-Z])", "-", type(noun).__name__).lower()
    return f"lora-export/{name}/{VERSIONS.get(name, 1)}"


def _members(noun: Any) -> dict[str, Any]:
    # A field that is left out of the repr is an index over the others.
    return _object({member.name: getattr(noun, member.name) for member in fields(noun) if member.repr})


def _object(members: Mapping[Any, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in members.items():
        result[str(name)] = _plain(value)
        if _unspeakable(value):
            result[f"{name}_text"] = str(value)
    return result


def _unspeakable(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_unspeakable(item) for item in value)
    return isinstance(value, float | np.floating) and not math.isfinite(value)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if _unspeakable(value) and isinstance(value, float):
        return None
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, str | PurePath | np.dtype):
        return str(value)
    if isinstance(value, np.ndarray):
        return _outline(value)
    if is_dataclass(value):
        return _members(value)
    if isinstance(value, Mapping):
        return _object(value)
    if isinstance(value, set | frozenset):
        return [_plain(item) for item in sorted(value)]
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    raise TypeError(f"a report cannot hold a {type(value).__name__}")


def _outline(array: NDArray[Any]) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": str(array.dtype)}
