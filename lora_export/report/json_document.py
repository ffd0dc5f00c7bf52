"""JSON documents: every record of the package as a document that names its schema.

`verdict-2.schema.json`, beside this file, describes each field of a verdict. A new field does not change the
number of the schema: readers ignore the fields that they do not know.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lora_export.lora import LoraPair
from lora_export.pairs.open_shape import OpenPair, known_shape
from lora_export.pairs.structured import StructuredPair

if TYPE_CHECKING:
    from lora_export.verification.against_checkpoint import Audit
    from lora_export.verification.proof import Proof

AnyProof: TypeAlias = "Proof | Audit"
VERSIONS = {"verdict": 2}  # of a schema, 1 where none is given; grows when a field is removed or redefined


def as_dict(record: Any) -> dict[str, Any]:
    """A dataclass as a JSON document: its fields, and the name and version of its schema.

    Arrays become their shape and dtype. NaN and infinity, which JSON cannot represent, become null, and the field
    `<name>_text` holds the value as text.
    """
    return {"schema": _schema(record), **_members(record)}


def document_of_proof(proof: AnyProof) -> dict[str, Any]:
    """A verdict with its evidence: what ran where, and the facts about the run (versions, files, seed)."""
    result = as_dict(proof.verdict) | {
        "exit_code": proof.exit_code,
        "placement": None,
        "diagnosis": plain(proof.diagnosis),
        "about": plain(proof.about),
    }
    if (placement := proof.placement) is not None:
        result["placement"] = {
            "requested_provider": placement.requested_provider,
            "compute_nodes": placement.compute_nodes,
            "off_provider": plain(placement.off_provider),
            "nodes": {provider: len(nodes) for provider, nodes in placement.by_provider.items()},
            "options": plain(placement.options),
            "version": placement.version,
        }
    return result


def _schema(record: Any) -> str:
    name = re.sub(r"(?<!^)(?=[A-Z])", "-", type(record).__name__).lower()
    return f"lora-export/{name}/{VERSIONS.get(name, 1)}"


def _members(record: Any) -> dict[str, Any]:
    # A field that is left out of the repr is an index over the others, or a member of its own in the document.
    return _object({member.name: getattr(record, member.name) for member in fields(record) if member.repr})


def _computed_pair(pair: LoraPair) -> dict[str, Any]:
    """A pair whose A and B are not stored, without making them; null where they have no shape yet."""
    out, *inner = known_shape(pair) or (0,)
    sizes = {"a": [pair.rank, *inner], "b": [out, pair.rank, *[1] * (len(inner) - 1)]}
    shapes = {name: {"shape": size, "dtype": "float32"} if known_shape(pair) else None for name, size in sizes.items()}
    others = {name: getattr(pair, name) for name in ("scale", "magnitude", "embedding", "as_stored")}
    return shapes | _object(others)


def _object(members: Mapping[Any, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in members.items():
        result[str(name)] = plain(value)
        if _has_no_json(value):
            result[f"{name}_text"] = str(value)
    return result


def _has_no_json(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_has_no_json(item) for item in value)
    return isinstance(value, float | np.floating) and not math.isfinite(value)


def plain(value: Any) -> Any:
    """A value that JSON can represent: arrays become shape and dtype, NaN and infinity null."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and _has_no_json(value):
        return None
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, str | PurePath | np.dtype):
        return str(value)
    if isinstance(value, np.ndarray):
        return {"shape": list(value.shape), "dtype": str(value.dtype)}
    if isinstance(value, StructuredPair | OpenPair):
        return _computed_pair(value)
    if is_dataclass(value):
        return _members(value)
    if isinstance(value, Mapping):
        return _object(value)
    if isinstance(value, set | frozenset):
        return [plain(item) for item in sorted(value)]
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    raise TypeError(f"a report cannot hold a {type(value).__name__}")
