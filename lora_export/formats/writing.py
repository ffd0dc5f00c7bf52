"""What the writers of formats share: values without rounding, what a format cannot hold by name, and the one file."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused, listed
from lora_export.formats.lora_changes import KeyPart
from lora_export.lora import Adapter, LoraPair, is_power_of_two
from lora_export.options.spelling import named
from lora_export.pairs.computed import FactoredPair
from lora_export.pairs.open_shape import OpenPair
from lora_export.pairs.structured import HadamardPair, KroneckerPair, WholePair
from lora_export.storage import safetensors_file

_HALVES = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))
BESIDES = {  # what an adapter may have besides pairs: its field -> what it is
    "magnitude": "DoRA's magnitude",
    "replaced": "a whole tensor",
    "biases": "a change of a bias",
    "added": "a change of a vector",
    "token_rows": "rows of tokens",
    "invocation_tokens": "a pair that acts on some tokens only",
    "tied": "the repetition of the pair of another module",
}
NEIGHBOURS = 3  # floats beside the nearest alpha that are tried
LOHA_PARTS = {"a1": KeyPart.LOHA_W1_B, "b1": KeyPart.LOHA_W1_A, "a2": KeyPart.LOHA_W2_B, "b2": KeyPart.LOHA_W2_A}


def smallest_dtype(arrays: Iterable[NDArray[np.float32]]) -> np.dtype[np.generic]:
    """The smallest type that holds every value of all arrays exactly: bfloat16, float16 or float32."""
    arrays = list(arrays)
    for dtype in _HALVES:
        with np.errstate(over="ignore"):  # an infinity is no equal value
            if all(np.array_equal(array.astype(dtype).astype(np.float32), array) for array in arrays):
                return dtype
    return np.dtype(np.float32)


def alpha_of(scale: float, divisor: float) -> float:
    """The alpha for which alpha / divisor is the scale, to the last bit where a float has it, else the nearest.

    The divisor is the rank, or its root. An alpha that is a whole number is preferred.
    """
    nearest = scale * divisor
    candidates = [float(round(nearest)), nearest]
    for direction in (-math.inf, math.inf):
        value = nearest
        for _ in range(NEIGHBOURS):
            value = math.nextafter(value, direction)
            candidates.append(value)
    return min(candidates, key=lambda alpha: abs(alpha / divisor - scale))


def usual_and_patterns(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The value that most modules have, 1 without any; and PEFT's patterns for the others, which match whole names."""
    usual = Counter(values.values()).most_common(1)[0][0] if values else 1
    return usual, {f"^{re.escape(name)}": value for name, value in values.items() if value != usual}


def pair_factors(pairs: Iterable[LoraPair]) -> Iterator[NDArray[np.float32]]:
    """A, B and the magnitude of each pair."""
    for pair in pairs:
        yield pair.a
        yield pair.b
        if pair.magnitude is not None:
            yield pair.magnitude


def beyond_pairs(adapter: Adapter, allowed: Collection[str] = ()) -> list[str]:
    """What an adapter has besides pairs, one line each. `allowed` names the fields that the format can hold."""
    problems = [f"{name}: {why}" for name, pair in adapter.pairs.items() if (why := why_no_low_rank(pair))]
    if adapter.flattened:
        problems.append(
            f"the names of its modules, in which `_` stands for the dots: state their model by {named('base')}"
        )
    for what, names in adapter.beyond_pairs.items():
        if what in BESIDES and what not in allowed:
            problems += [f"{name}: {BESIDES[what]}" for name in names]
    return problems


def with_positive_scales(adapter: Adapter) -> Adapter:
    """The adapter with the sign of each pair's scale in its B: a reader may refuse an alpha below zero."""
    turned = {
        name: LoraPair(pair.a, -pair.b, -pair.scale, pair.magnitude, pair.embedding, pair.as_stored)
        for name, pair in adapter.pairs.items()
        if not why_no_low_rank(pair) and pair.scale < 0
    }
    return replace(adapter, pairs={**adapter.pairs, **turned})


def why_no_low_rank(pair: LoraPair) -> str:
    """Why a pair is not written as A and B; empty where it is."""
    if isinstance(pair, OpenPair):
        return f"its file does not record its shape: state its base by {named('base')}"
    if pair.needs_weight:
        return f"its change by {pair.kind} follows from the weight"
    is_factored = type(pair) is FactoredPair and pair.is_low_rank
    return "" if type(pair) is LoraPair or is_factored else f"{type(pair).__name__} is no low-rank pair"


def refuse_inexpressible(adapter: Adapter, target: str, problems: Sequence[str]) -> None:
    """Raise InputRefused with all that a format cannot express."""
    if problems:
        raise InputRefused(
            f"the format {target} cannot express everything in {adapter.name}:",
            listed(sorted(set(problems)), len(problems)),
        )


# --- One `.safetensors` file, for programs of image and video models ---


@dataclass
class OneFile:
    """The tensors of an adapter under the keys of one format. `key` makes one of a module and an ending."""

    adapter: Adapter
    target: str  # the format, for messages
    key: Callable[[str, str], str]
    tensors: dict[str, NDArray[Any]] = field(default_factory=dict)
    alphas: dict[str, NDArray[Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add_changes(self, sides: tuple[str, str], *, with_alpha: bool = True) -> None:
        """Every change of the adapter, each pair with its alpha or multiplied by its scale. `sides` end A and B.

        LoHa, LoKr and whole changes are written as LyCORIS does: a LoHa's core as a part of its factors.
        """
        for module, pair in self.adapter.pairs.items():
            if pair.embedding or pair.as_stored:
                self.problems.append(f"{module}: a pair of an embedding or of a bare parameter")
            elif isinstance(pair, HadamardPair):
                self._add_hadamard(module, pair)
            elif isinstance(pair, KroneckerPair):
                self._add_kronecker(module, pair)
            elif isinstance(pair, WholePair):
                self._put(module, {KeyPart.CHANGE: pair.delta()})
                self._put_magnitude(module, pair)
            elif why := why_no_low_rank(pair):
                self.problems.append(f"{module}: {why}")
            elif with_alpha:
                self._put(module, {sides[0]: pair.a, sides[1]: pair.b})
                self._put_scale(module, pair, pair.rank)
            else:
                self._put(module, {sides[0]: pair.a, sides[1]: pair.b * np.float32(pair.scale)})
                self._put_magnitude(module, pair)
        for module, change in self.adapter.biases.items():
            self._put(module, {KeyPart.BIAS_CHANGE: change})
        for tensor, change in self.adapter.added.items():
            module, _, what = tensor.rpartition(".")
            part = {"weight": KeyPart.NORM_CHANGE, "bias": KeyPart.NORM_BIAS_CHANGE}[what]
            self._put(module, {part: change})

    def _add_hadamard(self, module: str, pair: HadamardPair) -> None:
        factors = pair.factors_of_part()
        self._put(module, {part: factors[name].reshape(len(factors[name]), -1) for name, part in LOHA_PARTS.items()})
        self._put_scale(module, pair, len(pair.a1))

    def _add_kronecker(self, module: str, pair: KroneckerPair) -> None:
        if pair.rows is not None or pair.columns is not None:
            self.problems.append(f"{module}: a LoKr of a part of a weight, which is no Kronecker product")
            return
        stored, rank = dict(pair.stored), pair.decomposed_rank
        if rank is None and pair.scale != 1:
            if not is_power_of_two(pair.scale):
                self.problems.append(
                    f"{module}: a LoKr of two whole factors with the scale {pair.scale!r}. LyCORIS has one only where "
                    "a factor is decomposed"
                )
            stored["w1"] = pair.w1 * np.float32(pair.scale)  # no digit changes
        self._put(module, {KeyPart(f"lokr_{name}"): value for name, value in stored.items()})
        if rank is None:
            self._put_magnitude(module, pair)
        else:
            self._put_scale(module, pair, rank)

    def _put_scale(self, module: str, pair: LoraPair, rank: int) -> None:
        alpha = alpha_of(pair.scale, rank)  # off by a unit of fp64 at most, and readers multiply in fp32
        dtype = np.float32 if float(np.float32(alpha)) == alpha else np.float64
        self.alphas[self.key(module, KeyPart.ALPHA)] = np.array(alpha, dtype)
        self._put_magnitude(module, pair)

    def _put_magnitude(self, module: str, pair: LoraPair) -> None:
        if pair.magnitude is not None:
            shape = (-1, *[1] * (len(pair.shape) - 1))
            self._put(module, {KeyPart.DORA_SCALE: pair.magnitude.reshape(shape)})

    def _put(self, module: str, parts: dict[Any, NDArray[Any]]) -> None:
        for part, value in parts.items():
            key = self.key(module, str(part))
            if key in self.tensors:
                self.problems.append(f"{key}: two tensors would have this key")
            self.tensors[key] = value

    def write(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        """Write the file. Raises InputRefused with everything that the format cannot express."""
        for table in ("replaced", "token_rows", "tied"):
            self.problems += [f"{name}: {BESIDES[table]}" for name in getattr(self.adapter, table)]
        infinite = [key for key, value in self.tensors.items() if not np.isfinite(value).all()]
        self.problems += [f"{key}: values that float32 cannot hold, times the scale" for key in infinite]
        refuse_inexpressible(self.adapter, self.target, self.problems)
        dtype = smallest_dtype(self.tensors.values())
        tensors = {key: value.astype(dtype) for key, value in self.tensors.items()} | self.alphas
        safetensors_file.write(path, dict(sorted(tensors.items())), {"format": "pt", **(metadata or {})})


def without_component(adapter: Adapter) -> tuple[str, ...]:
    """What the user should know of names without a component: they are taken for those of the denoising model."""
    if any("/" not in name for name in adapter.pairs):
        return (f"{adapter.name}: names without a model are written as those of the UNet or transformer.",)
    return ()
