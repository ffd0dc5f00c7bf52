"""Outputs of the reference, cached in a folder for the next candidate of the same model.

The fp64 reference is the most expensive step of a proof: it runs three times for each case. It does not depend on the
candidate, so its outputs for a model, its adapters and the inputs are computed once. An entry is found by the hashes
of these, and of what PyTorch computes from them in the deployed precision. It is used only where the code that made it
is the same and its own hash is right. Do not use a folder that others can write to: who can write there can decide the
verdict.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import nn

from lora_export.errors import InputRefused, OutputFailed
from lora_export.models.model import Model
from lora_export.models.stored_parameter import state_of
from lora_export.runtime.runner import Arrays
from lora_export.storage import atomic_output, json_files, safetensors_file
from lora_export.storage.hashes import file_sha256
from lora_export.verification.references.proof_weights import ProofWeights
from lora_export.version import __version__

Warn = Callable[[str], None]

METADATA = "lora_export"
KNOWN_BY_VERSION = ("torch", "transformers", "builtins")  # packages whose version identifies their code


@dataclass(frozen=True)
class CacheKey:
    """What the reference's outputs depend on: `digest` of model, adapters and inputs, `made_with` of the code."""

    digest: str
    made_with: dict[str, str]


class CachedOutputs(NamedTuple):
    """Outputs of the reference in fp64, and the operators that computed in less than fp64."""

    by_role: Mapping[str, Mapping[str, Arrays]]  # role -> case -> output -> values
    narrow_operators: frozenset[str]
    detected: frozenset[str] = frozenset()  # pairs whose absence the gates detect


@dataclass(frozen=True)
class CacheEntry:
    """The entry of one proof in a folder. Without a folder, or a key, nothing is read or written."""

    folder: Path | None
    key: CacheKey | None
    warn: Warn

    def read(self) -> CachedOutputs | None:
        """The outputs in the entry; None where it is missing, stale or damaged. The last two are warned of."""
        if self.folder is None or self.key is None or not (path := self._path(self.folder, self.key)).exists():
            return None
        by_role: dict[str, dict[str, Arrays]] = {}
        try:
            file = safetensors_file.open_file(path)
            record = json_files.parse_json(file.metadata.get(METADATA, "{}").encode(), f"the record in {path}")
            flat = [(tuple(json.loads(name)), file.read(name)) for name in file.entries]
            if record.get("digest") != _digest(flat, record["detected"]):
                raise InputRefused("its values are not those that were written")
            if record["made_with"] != self.key.made_with:
                changes = _changes(record["made_with"], self.key.made_with)
                self.warn(f"cache: {path.name} is stale ({changes}): the reference runs again")
                return None
            for (case, role, output), values in flat:
                by_role.setdefault(role, {}).setdefault(case, {})[output] = values
            return CachedOutputs(by_role, frozenset(record["stayed"]), frozenset(record["detected"]))
        except (InputRefused, ValueError, TypeError, KeyError, AttributeError) as error:
            self.warn(f"cache: {path.name} is damaged ({error}): the reference runs again")
            return None

    def write(self, outputs: CachedOutputs) -> None:
        """Write the entry, whole or not at all. A failure is warned of, and never ends a proof."""
        if self.folder is None:
            return
        if self.key is None:
            self.warn("cache: not used: an adapter came from no file, or was merged into quantised weights")
            return
        path, detected = self._path(self.folder, self.key), sorted(outputs.detected)
        flat = [
            ((case, role, output), values)
            for role, by_case in outputs.by_role.items()
            for case, arrays in by_case.items()
            for output, values in arrays.items()
        ]
        record = {
            "made_with": self.key.made_with,
            "stayed": sorted(outputs.narrow_operators),
            "detected": detected,
            "digest": _digest(flat, detected),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_output.stage_file(path, inputs=[], overwrite=True) as stage:
                named = {json.dumps(name): values for name, values in flat}
                safetensors_file.write(stage / path.name, named, {METADATA: json.dumps(record)})
        except (OutputFailed, OSError, KeyError) as error:  # KeyError: a dtype that safetensors does not have
            self.warn(f"cache: nothing was saved: {error}")

    @staticmethod
    def _path(folder: Path, key: CacheKey) -> Path:
        return folder / f"reference-{key.digest[:32]}.safetensors"


def cache_key(
    weights: ProofWeights, inputs: Mapping[str, Arrays], deployed: nn.Module, outputs: Mapping[str, Arrays]
) -> CacheKey | None:
    """The hashes of everything that the reference's outputs depend on.

    None for an adapter that came from no file, and where weights are rounded to the numbers of quantised ones.

    `outputs` are those of PyTorch as `deployed`, by case. They depend on all that the reference's depend on, also on
    what no list would be sure to name: the arguments of a user's factory, the attributes of its modules. Where two
    values are equally near, the reference rounds to the candidate's choice: the rounded weights are hashed, too.
    """
    adapters, rounding = weights.adapters, weights.attached.rounding
    if any(map(callable, rounding.values())) or not all(adapter.sha256 for adapter in adapters):
        return None
    digest = hashlib.sha256(hash_of_state(weights.base).encode())
    strengths = weights.strengths or [1.0] * len(adapters)
    chosen = [[adapter.sha256, float(w)] for adapter, w in zip(adapters, strengths, strict=True)]
    digest.update(json.dumps(chosen).encode())
    tensors = state_of(deployed)
    for name in sorted(rounding):
        weight = tensors[name].detach().cpu().contiguous().reshape(-1)
        _update(digest, f"{name}\0{rounding[name]}", weight.view(torch.uint8).numpy())
    for runs in (inputs, outputs):
        for case, arrays in runs.items():
            add_arrays(digest, arrays, f"{case}\0")
    return CacheKey(digest.hexdigest(), code_of(weights.base.module))


def hash_of_state(model: Model) -> str:
    """The SHA-256 of all weights and buffers of a model, those that no state_dict holds among them."""
    digest = hashlib.sha256()
    digest.update(model.fingerprint().encode())
    for name, buffer in sorted(model.module.named_buffers()):
        _update(digest, name, buffer.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def add_arrays(digest: Any, arrays: Arrays, case: str = "") -> None:
    """Take arrays into a hash, with their names, dtypes and shapes."""
    for name, array in arrays.items():
        _update(digest, f"{case}{name}\0{array.dtype}\0{array.shape}", array)


def _update(digest: Any, name: str, array: NDArray[Any]) -> None:
    digest.update(f"\0{name}\0{array.nbytes}\0".encode(errors="surrogatepass"))
    digest.update(np.ascontiguousarray(array).tobytes())


def code_of(module: nn.Module) -> dict[str, str]:
    """The versions and hashes of the code that computes the outputs, the model's own included."""
    code = {"lora_export": __version__, "torch": torch.__version__}
    if transformers := sys.modules.get("transformers"):
        code["transformers"] = str(transformers.__version__)
    structure = hashlib.sha256(repr(module).encode())
    structure.update(str(getattr(module, "config", "")).encode())
    code["structure"] = structure.hexdigest()
    for path in sorted({path for part in module.modules() for path in _sources(type(part))}):
        name = f"code of {path.name}"  # which several files may have
        code[name] = code.get(name, "") + file_sha256(path)
    return code


def _sources(layer: type) -> list[Path]:
    """The files that define a layer's class and its base classes."""
    defined_elsewhere = [each for each in layer.__mro__ if each.__module__.partition(".")[0] not in KNOWN_BY_VERSION]
    paths = []
    for each in defined_elsewhere:
        try:
            paths.append(Path(inspect.getfile(each)))
        except (TypeError, OSError):  # typed at a prompt, or compiled
            continue
    return [path for path in paths if path.is_file()]


def _digest(flat: Sequence[tuple[Sequence[str], NDArray[Any]]], detected: Sequence[str]) -> str:
    digest = xxhash.xxh3_128(json.dumps(detected).encode())
    for name, array in sorted(flat, key=lambda item: list(item[0])):
        _update(digest, json.dumps([*name, str(array.dtype), list(array.shape)]), array)
    return digest.hexdigest()


def _changes(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return ", ".join(
        f"{name} {then.get(name, 'absent')[:12]} then, {now.get(name, 'absent')[:12]} now" for name in sorted(names)
    )
