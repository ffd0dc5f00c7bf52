"""The ways to read the names of an adapter: as the base's own, as the loaded model's, as the original ones."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from lora_export.errors import Misfit
from lora_export.lora import Adapter, LoraPair, expert_name, split_part
from lora_export.names.tensor_parts import AssembledTensor, NotExpressible
from lora_export.pairs.open_shape import known_shape
from lora_export.plan.match_names import (
    BaseTensors,
    Prefix,
    considered_modules,
    find_prefix,
    missing_targets,
    weight_of,
)
from lora_export.plan.placing import Place, places_in_sources
from lora_export.plan.stored_region import parse
from lora_export.plan.types import TensorSpec

OF_MODULES = (".weight", ".in_proj_weight")


class Spelling(StrEnum):
    """How the names of an adapter relate to those of its base."""

    SAME = "same"  # the names of both are of one generation, or the model has only one
    LOADED = "loaded"  # the adapter has the names of the loaded model, the base has the original ones
    ORIGINAL = "original"  # the adapter has the original names, the base has those of the loaded model
    OTHER_LAYOUT = "other layout"  # one has the names of the model's authors, the other those of diffusers


@dataclass(frozen=True, eq=False)
class SpelledAdapter:
    """An adapter under the names of the base."""

    adapter: Adapter
    prefix: Prefix
    spelling: Spelling = Spelling.SAME
    views: Mapping[str, TensorSpec] = field(default_factory=dict)  # parts of base tensors that it changes, by name
    misfits: Sequence[Misfit] = ()  # layers without tensors, and tensors that a converter keeps from the base
    notes: Sequence[str] = ()


class Attempt(ABC):
    """One way to read the names of an adapter."""

    meaning = ""

    def __init__(self, adapter: Adapter, base: BaseTensors):
        self.adapter, self.base = adapter, base
        self.modules = considered_modules(adapter)
        self.matched = 0  # how many of these modules have a weight in the base
        self.matched_tensors = 0  # how many of the adapter's tensors that are no pairs the base has
        self.has_converted_experts = False  # whether a converter makes the adapter's experts of the base's

    @abstractmethod
    def weights_of(self, module: str) -> list[str]:
        """The base tensors, or parts of these, that a module's pair changes."""

    @abstractmethod
    def assembled(self, parameter: str) -> AssembledTensor | None:
        """What a whole tensor of the adapter consists of in the base. None where it is unknown.

        Raises NotExpressible.
        """

    def _tensors(self) -> list[str]:
        """The tensors of the adapter that are no pairs."""
        biases = (f"{module}.bias" for module in self.adapter.biases)
        return [*self.adapter.replaced, *self.adapter.token_rows, *self.adapter.added, *biases]

    def stack_of_parts(self, parameter: str) -> tuple[int, ...] | None:
        """The shape of a stacked parameter of which the base has each expert as a tensor of its own, as graphs do."""
        names = itertools.takewhile(self.base.__contains__, (expert_name(parameter, e) for e in itertools.count()))
        shapes = [self.base[name].shape for name in names]
        return (len(shapes), *shapes[0]) if shapes else None


class AsSpelled(Attempt):
    meaning = "its own spelling"

    def __init__(self, adapter: Adapter, base: BaseTensors):
        super().__init__(adapter, base)
        self.prefix = find_prefix(adapter, base)
        self.matched = sum(bool(self.weights_of(module)) and not self._is_bare(module) for module in self.modules)
        self.matched_tensors = sum((self.prefix.to_base(name) or name) in base for name in self._tensors())

    def _is_bare(self, module: str) -> bool:
        """Whether a layer of the adapter has the name of a bare parameter, which may be stored otherwise."""
        pair = self.adapter.pairs.get(module)
        return pair is not None and not pair.as_stored and self.prefix.to_base(module) in self.base

    def weights_of(self, module: str) -> list[str]:
        weight = weight_of(self.prefix.to_base(module), self.base)
        return [] if weight is None else [weight]

    def assembled(self, parameter: str) -> AssembledTensor | None:
        weight = weight_of(self.prefix.to_base(parameter), self.base)
        return None if weight is None else AssembledTensor.stored(weight, self.base[weight].shape)

    @property
    def fits(self) -> bool:
        """Whether the base has all tensors that the adapter changes."""
        return self.matched == len(self.modules) and self.matched_tensors == len(self._tensors())

    def spelled(self) -> SpelledAdapter:
        missing = missing_targets(self.adapter, self.prefix, self.base)
        notes = prefix_notes(self.adapter, self.prefix)
        return SpelledAdapter(self.adapter, self.prefix, views=self._views(), misfits=missing, notes=notes)

    def _views(self) -> dict[str, TensorSpec]:
        """The parts of base tensors that the adapter names."""
        views = {}
        for module in self.adapter.pairs:
            weight = weight_of(self.prefix.to_base(module), self.base)
            if weight is not None and weight not in self.base:
                stored = self.base[split_part(weight)[0]]
                if (region := parse(weight, stored.shape)) is not None:
                    views[weight] = Place(stored.name, region).view(stored)
        return views


class ConvertedNames(Attempt):
    """An adapter whose names are those of another generation than the base's."""

    spelling: Spelling

    def __init__(self, adapter: Adapter, base: BaseTensors):
        super().__init__(adapter, base)
        self.prefix = Prefix()
        self._places: dict[str, list[Place]] = {}
        self._slices: dict[str, list[AssembledTensor]] = {}  # a stacked tensor -> its experts

    @abstractmethod
    def tensor_of(self, module: str) -> str | None:
        """The name of a module's weight, as far as this spelling knows it."""

    @abstractmethod
    def find(self, tensor: str, shape: Sequence[int]) -> list[Place]:
        """The places of a tensor, given its name in the adapter. Empty where there are none. Raises NotExpressible."""

    @abstractmethod
    def misfits(self, spelled: Adapter) -> list[Misfit]:
        """The layers that the adapter targets, and has no tensors for."""

    @property
    @abstractmethod
    def own_prefix(self) -> Prefix:
        """The prefix of the names that `spelled` gives."""

    @abstractmethod
    def converts(self, tensor: str) -> str:
        """What converts a tensor, as the start of a sentence: `X converts tensor while it loads the model: it`."""

    @property
    @abstractmethod
    def note(self) -> str:
        """How the names were matched."""

    def laid_on(self, tensor: str, pair: LoraPair) -> LoraPair:  # noqa: ARG002 - it is overridden
        """The pair in the shape of a converted tensor, as far as it fits. Raises NotExpressible."""
        return pair

    def places(self, tensor: str, shape: Sequence[int]) -> list[Place]:
        """The places of a tensor of the adapter, or of a part of it, such as `experts.down_proj[3]`."""
        if tensor not in self._places:
            owner, indices = split_part(tensor)
            is_part = indices and self.prefix.to_base(tensor) not in self.base
            self._places[tensor] = self._of_slice(owner, indices) if is_part else self.find(tensor, shape)
        return self._places[tensor]

    def _of_slice(self, tensor: str, index: str) -> list[Place]:
        if tensor not in self._slices:
            whole = self.assembled(tensor)
            self._slices[tensor] = [] if whole is None else whole.along_first_axis()
        slices = self._slices[tensor]
        if not slices:
            return []
        if not index.isdecimal():
            return [self._named_part(tensor, index)]
        if int(index) >= len(slices):
            raise NotExpressible(f"makes a tensor of {len(slices)} experts")
        return places_in_sources(slices[int(index)], self._stored_shape)

    def _named_part(self, tensor: str, indices: str) -> Place:
        """A part of a stored tensor that has other names at most. Raises NotExpressible."""
        whole = self.assembled(tensor)
        stored = "" if whole is None or len(whole.pieces) != 1 else whole.pieces[0].source
        region = parse(f"{stored}[{indices}]", self._stored_shape(stored)) if stored else None
        if whole is None or region is None or whole.shape != self._stored_shape(stored):
            raise NotExpressible("makes a tensor of which the adapter changes a part that is no expert")
        return Place(stored, region)

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        return self.base[name].shape

    def weights_of(self, module: str) -> list[str]:
        tensor, pair = self.tensor_of(module), self.adapter.pairs.get(module)
        if tensor is None:
            return []
        try:
            shape = () if pair is None else shape_in_model(self.laid_on(tensor, pair))
            return [place.name for place in self.places(tensor, shape)]
        except NotExpressible as problem:
            return [f"a part of what {problem}"]


# --- Names ---


def shape_in_model(pair: LoraPair) -> tuple[int, ...]:
    return pair.shape[::-1] if pair.embedding else known_shape(pair)


def pair_weight(module: str, pair: LoraPair) -> str:
    return module if pair.as_stored else f"{module}.weight"


def module_of_tensor(tensor: str) -> str:
    suffix = next((each for each in OF_MODULES if tensor.endswith(each)), "")
    return tensor.removesuffix(suffix)


def prefix_notes(adapter: Adapter, prefix: Prefix) -> list[str]:
    return [f"{adapter.name}: {prefix}; resolved."] if prefix else []
