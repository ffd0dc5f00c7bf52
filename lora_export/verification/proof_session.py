"""What proofs of several adapters on one base have in common: the first one computes it, and the others reuse it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lora_export.models.model import Model
from lora_export.runtime.runner import Arrays
from lora_export.verification.module_copies import parameters_and_buffers
from lora_export.verification.references.cached_outputs import add_arrays

MOST_RESULTS = 4  # of one base: those for other inputs are dropped


@dataclass(eq=False)
class SharedResult:
    """What the proofs of a base have in common, once it is computed."""

    value: Any = None


@dataclass(eq=False)
class _Base:
    """A base, as it was loaded from these files."""

    key: Hashable
    model: Model
    results: dict[str, SharedResult] = field(default_factory=dict)


class ProofSession:
    """Give one to the proofs of several adapters on one base, one after the other. Verdicts and figures stay the same.

    Shared are the loaded model, the hash of its weights, and its outputs in fp64 without adapters. One base is in
    memory at a time. It is loaded again where a file of it has changed.
    """

    def __init__(self) -> None:
        self._base: _Base | None = None

    def model(self, folder: Path, options: Hashable, load: Callable[[], Model]) -> Model:
        """The model of a folder, loaded with these options. Raises what `load` raises."""
        key = folder.resolve(), options, _files(folder)
        if self._base is None or self._base.key != key:
            self._base = None  # its memory is free while the other one is loaded
            self._base = _Base(key, load())
        return self._base.model

    def fingerprint(self, model: Model) -> str:
        """`model.fingerprint()`, computed once for the base."""
        known = self._result("fingerprint", model.module)
        known.value = known.value or model.fingerprint()
        return str(known.value)

    def without_adapters(
        self, module: nn.Module, settings: Mapping[str, Any], cases: Mapping[str, Arrays]
    ) -> SharedResult:
        """What the base computes for these cases; its value is None until somebody sets it.

        `module` is the base with adapters attached. Where a tensor of it is not the base's, nothing is shared.
        `settings`, of JSON's types, are what the outputs depend on besides the base and the cases.
        """
        return self._result(_digest(settings, cases), module)

    def _result(self, key: str, module: nn.Module) -> SharedResult:
        if self._base is None or not self._has_all(module):
            return SharedResult()
        results = self._base.results
        if key not in results and len(results) == MOST_RESULTS:
            del results[next(iter(results))]
        return results.setdefault(key, SharedResult())

    def _has_all(self, module: nn.Module) -> bool:
        """Whether a module has every tensor of the base under its name, and not a copy of it."""
        own = dict(parameters_and_buffers(module))
        base = self._base
        return base is not None and all(own.get(name) is one for name, one in parameters_and_buffers(base.model.module))


def _files(folder: Path) -> Hashable:
    """The files of a folder, with what changes when one of them does."""
    found = set()
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # it has gone since it was listed
            if path.is_file():
                it = path.stat()
                found.add((path.relative_to(folder), it.st_ino, it.st_size, it.st_mtime_ns, it.st_ctime_ns))
    return frozenset(found)


def _digest(settings: Mapping[str, Any], cases: Mapping[str, Arrays]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for case, arrays in cases.items():
        add_arrays(digest, arrays, f"{case}\0")
    return digest.hexdigest()
