"""Adapters that are one `.safetensors` file, as trainers of image and video models write them: their tensors as pairs.

A format states how its keys name modules (`OneFileFormat`). What the factors of a change mean is in `lora_changes.py`.
Whole changes of weights, biases and norms are read here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused, refuse_unprintable
from lora_export.formats.adapter_files import (
    TensorSource,
    hash_of_unchanged,
    is_pickle,
    names_in,
    open_tensors,
    refuse_integers,
    refuse_problems,
    weights_of,
)
from lora_export.formats.lora_changes import (
    CHANGE_KINDS,
    ChangeKind,
    KeyPart,
    Parts,
    SortedKeys,
    fp32,
    has_pairs,
    is_finite,
    sort_keys,
    split_key,
)
from lora_export.lora import Adapter, LoraPair, component_name
from lora_export.options.reading import DEFAULTS, ReadOptions
from lora_export.pairs.structured import WholePair

BY_ALPHA = "alpha / rank, by the alpha of each pair; 1 where the file has none"
OF_A_PAIR = (KeyPart.ALPHA, KeyPart.MAGNITUDE, KeyPart.DORA_SCALE, KeyPart.B_BIAS, KeyPart.ON_INPUT)
# Parts of which a module has one: the other would be lost, or both be added.
NOT_TOGETHER = (
    (KeyPart.CHANGE, KeyPart.NORM_CHANGE),
    (KeyPart.BIAS_CHANGE, KeyPart.NORM_BIAS_CHANGE),
    (KeyPart.MAGNITUDE, KeyPart.DORA_SCALE),
    (KeyPart.LOKR_W2, KeyPart.LOKR_T2),
)
Scales = Callable[[str, int, float | None], float]  # (module, rank, alpha) -> the factor of the change


@dataclass(frozen=True)
class OneFileFormat:
    """A format of one file: how it spells modules. It recognises and reads files as a module of a format does."""

    name: str
    module_of: Callable[[str], str | None]  # what a key has before its ending -> the module; None where it has no place
    flattened: bool = False  # `_` stands for the dots in the names

    def _keys(self, path: Path) -> tuple[SortedKeys, list[str]]:
        """The names in an adapter's file, sorted, and those of another format among them. Raises nothing."""
        weights = weights_of(path)
        names = frozenset() if weights is None else names_in(weights)
        if weights is not None and is_pickle(weights):  # which contains other texts, too
            names = frozenset(name for name in names if split_key(name) is not None)
        keys = sort_keys(names if has_pairs(names) else (), self.module_of)
        return keys, sorted(key for key in keys.unknown if self.module_of(key) is None)

    def recognises(self, path: Path) -> bool:
        """Whether the keys of the file are those of an adapter, and every module has a place. Raises nothing."""
        keys, foreign = self._keys(path)
        return len(keys.modules) > 0 and not foreign

    def foreign_keys(self, path: Path) -> list[str]:
        """The keys of other formats in a file with most keys in this one; none for other files. Raises nothing."""
        keys, foreign = self._keys(path)
        known = len(keys.duplicates) + sum(map(len, keys.modules.values()))
        return foreign if known > len(foreign) else []

    def read(
        self,
        path: Path,
        name: str,
        options: ReadOptions = DEFAULTS,
        *,
        scale_of: Scales | None = None,
        scale_source: str = BY_ALPHA,
    ) -> Adapter:
        """Read an adapter. Raises InputRefused with everything that is wrong with it.

        `scale_of` is the factor of a module's change by its rank and its alpha, which is None where the file has none.
        `scale_source` describes it.
        """
        weights = weights_of(path)
        if weights is None:
            raise InputRefused(f"{path} is not an adapter of one file")
        options.refuse_rank_and_alpha("its tensors")
        file = open_tensors(weights, options)
        refuse_unprintable(file.entries, f"the header of {weights}")
        keys = sort_keys(file.entries, self.module_of)
        if keys.unknown:
            raise InputRefused(f"{weights}: unknown kinds of tensors: {', '.join(sorted(keys.unknown)[:10])}")
        if keys.duplicates:
            raise InputRefused(f"{weights} contains one tensor under two names: {'; '.join(keys.duplicates)}")
        reader = _FileChanges(file, scale_of or scale_by_alpha)
        for module, parts in keys.modules.items():
            reader.add(module, parts)
        refuse_problems(file, reader.problems if file.entries else ["it contains no tensor"])
        return Adapter(
            name=name,
            format=self.name,
            pairs=reader.pairs,
            biases=reader.biases,
            added=reader.added,
            layouts={module: "out_in" for module, pair in reader.pairs.items() if set(pair.shape[2:]) <= {1}},
            flattened=self.flattened,
            spelling=reader.spelling,
            scale_source=scale_source,
            metadata={"header": dict(file.metadata)} if file.metadata else {},
            notes=reader.notes(),
            sha256=hash_of_unchanged(file),
        )


def module_by_prefix(name: str, prefixes: Mapping[str, str]) -> str | None:
    """The module for a name in a key, by a table from prefixes to components; None for a name of another format."""
    found = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
    return None if found is None else component_name(prefixes[found], name.removeprefix(found))


def scale_by_alpha(_module: str, rank: int, alpha: float | None) -> float:
    """alpha / rank; 1 where a file has no alpha. Raises InputRefused for an alpha of 0."""
    if alpha == 0:
        raise InputRefused("its alpha is 0: sd-scripts takes that for alpha = rank, other programs for no change")
    return 1.0 if alpha is None else alpha / rank


class _FileChanges:
    """The changes of one file, module after module."""

    def __init__(self, file: TensorSource, scale_of: Scales):
        self.file, self.scale_of = file, scale_of
        self.pairs: dict[str, LoraPair] = {}
        self.biases: dict[str, NDArray[np.float32]] = {}  # module -> change of its bias
        self.added: dict[str, NDArray[np.float32]] = {}  # tensor -> change of it, for vectors
        self.spelling: dict[str, str] = {}
        self.problems: list[str] = []
        self.has_alpha: list[bool] = []  # of each pair

    def add(self, module: str, keys: Mapping[KeyPart, str]) -> None:
        """Read what the file has for a module. What is wrong is added to the problems."""
        first = next(iter(keys.values()))
        try:
            tensors = {part: self.file.read(key) for part, key in keys.items()}
            for part, tensor in tensors.items():
                if part not in (KeyPart.ALPHA, KeyPart.ON_INPUT):
                    refuse_integers(keys[part], tensor)
            if bad := [keys[part] for part, tensor in tensors.items() if not is_finite(tensor)]:
                raise InputRefused(f"{', '.join(bad)} holds values that are not finite (NaN or infinity)")
            self._add(module, keys, tensors)
        except InputRefused as error:
            self.problems.append(f"{first}: {error}")

    def _add(self, module: str, keys: Mapping[KeyPart, str], tensors: Parts) -> None:
        kinds = [kind for kind in CHANGE_KINDS if not kind.own.isdisjoint(tensors)]
        for one, other in NOT_TOGETHER:
            if one in tensors and other in tensors:
                raise InputRefused(f"it has both {one} and {other}")
        if len(kinds) > 1 or (kinds and KeyPart.CHANGE in tensors):
            raise InputRefused(f"it has changes of several kinds: {', '.join(tensors)}")
        for kind in kinds:
            self._add_pair(module, kind, keys, tensors)
        if KeyPart.CHANGE in tensors:
            change, of_matrix = fp32(tensors[KeyPart.CHANGE]), tensors[KeyPart.CHANGE].ndim >= 2
            if of_matrix:
                self.pairs[module] = WholePair({"change": change}, 1.0)
            else:
                self.added[f"{module}.weight"] = change
            self.spelling[module if of_matrix else f"{module}.weight"] = keys[KeyPart.CHANGE]
        if not kinds and (alone := [part for part in OF_A_PAIR if part in tensors]):
            raise InputRefused(f"it has {', '.join(alone)}, and no pair")
        if KeyPart.BIAS_CHANGE in tensors:
            self._add_bias(module, keys[KeyPart.BIAS_CHANGE], fp32(tensors[KeyPart.BIAS_CHANGE]))
        for part, tensor in ((KeyPart.NORM_CHANGE, "weight"), (KeyPart.NORM_BIAS_CHANGE, "bias")):
            if part in tensors:
                self.added[f"{module}.{tensor}"] = fp32(tensors[part])
                self.spelling[f"{module}.{tensor}"] = keys[part]

    def _add_pair(self, module: str, kind: ChangeKind, keys: Mapping[KeyPart, str], tensors: Parts) -> None:
        if empty := [
            part for part, value in tensors.items() if value.size == 0 or (value.ndim == 0 and part in kind.own)
        ]:
            raise InputRefused(f"its {', '.join(empty)} has no entries, or no dimensions")
        if missing := [part for part in kind.needed if part not in tensors]:
            raise InputRefused(f"there is no {', '.join(missing)} for it")
        if KeyPart.ALPHA in tensors and tensors[KeyPart.ALPHA].size != 1:
            raise InputRefused(f"its alpha is {tensors[KeyPart.ALPHA].shape}; it must be one number")
        alpha = float(tensors[KeyPart.ALPHA].reshape(-1)[0]) if KeyPart.ALPHA in tensors else None
        self.has_alpha.append(alpha is not None)
        pair = kind.make(tensors, lambda rank: self.scale_of(module, rank, alpha))
        self.pairs[module] = pair
        self.spelling[module] = next(key for part, key in keys.items() if part in kind.own)
        if KeyPart.B_BIAS in tensors:
            self._add_bias(module, keys[KeyPart.B_BIAS], np.float32(pair.scale) * fp32(tensors[KeyPart.B_BIAS]))

    def _add_bias(self, module: str, key: str, change: NDArray[np.float32]) -> None:
        if module in self.biases:
            raise InputRefused("it has two changes of one bias")
        self.biases[module] = change.reshape(-1)
        self.spelling[f"{module}.bias"] = key

    def notes(self) -> tuple[str, ...]:
        without = self.has_alpha.count(False)
        several = 0 < without < len(self.has_alpha)
        return (f"{without} of {len(self.has_alpha)} pairs have no alpha: scale 1.",) if several else ()
