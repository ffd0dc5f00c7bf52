"""The ways to read the names of an adapter: as the base's own, as the loaded model's, as the original ones."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from lora_export.errors import InputRefused, Misfit
from lora_export.lora import Adapter, LoraPair, expert_name, split_part
from lora_export.plan.conversion.architecture import ArchitectureRules
from lora_export.plan.conversion.loaded_names import LoadedNames, LoadedTensor
from lora_export.plan.conversion.tensor_parts import AssembledTensor, NotExpressible
from lora_export.plan.match_names import (
    BaseTensors,
    Prefix,
    considered_modules,
    find_prefix,
    missing_targets,
    weight_of,
)
from lora_export.plan.placing import Place, places_in_result, places_in_sources
from lora_export.plan.stored_region import parse
from lora_export.plan.types import Layout, TensorSpec

OF_MODULES = (".weight", ".in_proj_weight")


class Spelling(StrEnum):
    """How the names of an adapter relate to those of its base."""

    SAME = "same"  # the names of both are of one generation, or the model has only one
    LOADED = "loaded"  # the adapter has the names of the loaded model, the base has the original ones
    ORIGINAL = "original"  # the adapter has the original names, the base has those of the loaded model


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
        self.matched = 0

    @abstractmethod
    def weights_of(self, module: str) -> list[str]:
        """The base tensors, or parts of these, that a module's pair changes."""

    @abstractmethod
    def assembled(self, parameter: str) -> AssembledTensor | None:
        """What a whole tensor of the adapter consists of in the base. None where it is unknown.

        Raises NotExpressible.
        """

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
        self.matched = sum(bool(self.weights_of(module)) for module in self.modules)

    def weights_of(self, module: str) -> list[str]:
        weight = weight_of(self.prefix.to_base(module), self.base)
        return [] if weight is None else [weight]

    def assembled(self, parameter: str) -> AssembledTensor | None:
        weight = weight_of(self.prefix.to_base(parameter), self.base)
        return None if weight is None else AssembledTensor.stored(weight, self.base[weight].shape)

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

    def __init__(self, adapter: Adapter, base: BaseTensors, rules: ArchitectureRules):
        super().__init__(adapter, base)
        self.rules = rules
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
            return [place.name for place in self.places(tensor, () if pair is None else shape_in_model(pair))]
        except NotExpressible as problem:
            return [f"a part of what {problem}"]


class AsLoaded(ConvertedNames):
    spelling = Spelling.LOADED
    meaning = "the names of the loaded model"

    def __init__(self, adapter: Adapter, base: BaseTensors, rules: ArchitectureRules):
        super().__init__(adapter, base, rules)
        self.loaded = loaded_names(base, rules)
        self.names = BaseTensors(_loaded_spec(tensor, base) for tensor in self.loaded.values())
        # transformers keeps the name of a tensor that has no place under its new one.
        self.unchanged = {name: spec for name, spec in base.items() if name not in self.names}
        self.every_name = BaseTensors([*self.names.values(), *self.unchanged.values()])
        self.prefix = _prefix_or_none(adapter, self.every_name)
        self.shapes = {self.prefix.to_base(name) or name: shape for name, shape in _tensor_shapes(adapter)}
        self.matched = sum(self.tensor_of(module) is not None for module in self.modules)

    @property
    def own_prefix(self) -> Prefix:
        return Prefix(adapter=self.prefix.adapter)

    def tensor_of(self, module: str) -> str | None:
        weight = weight_of(self.prefix.to_base(module), self.every_name)
        return None if weight is None else self.prefix.adapter + weight.removeprefix(self.prefix.base)

    def find(self, tensor: str, shape: Sequence[int]) -> list[Place]:
        name = self.prefix.to_base(tensor) or tensor
        found = self.loaded.get(name)
        if found is None:
            return [Place(name)] if name in self.unchanged else []
        if found.conversion is None:
            return [Place(found.stored)]
        assembled = found.conversion.assembled(self._stored_shape, self.shapes.get)[name]
        if shape and tuple(shape) != assembled.shape:
            raise NotExpressible(
                f"makes a tensor of {assembled.shape} of them, and the adapter was trained on {tuple(shape)}"
            )
        return places_in_sources(assembled, self._stored_shape)

    def assembled(self, parameter: str) -> AssembledTensor | None:
        weight = weight_of(self.prefix.to_base(parameter), self.every_name)
        found = self.loaded.get(weight) if weight is not None else None
        if found is not None and found.conversion is not None:
            return found.conversion.assembled(self._stored_shape, self.shapes.get)[found.name]
        stored = weight if found is None else found.stored
        return None if stored is None else AssembledTensor.stored(stored, self._stored_shape(stored))

    def misfits(self, spelled: Adapter) -> list[Misfit]:  # noqa: ARG002
        return missing_targets(self.adapter, self.prefix, self.names)


class AsOriginal(ConvertedNames):
    spelling = Spelling.ORIGINAL
    meaning = "the names before transformers renames them"

    def __init__(self, adapter: Adapter, base: BaseTensors, rules: ArchitectureRules):
        super().__init__(adapter, base, rules)
        self.shapes = dict(_tensor_shapes(adapter))
        self.by_stored = LoadedNames(rules, self.shapes).by_stored
        self.prefix = _prefix_or_none(self._renamed(), base)
        self.matched = sum(self.tensor_of(module) is not None for module in self.modules)

    def _renamed(self) -> Adapter:
        """The adapter with the modules of the loaded model. Its pairs are used for their names only."""
        pairs: dict[str, LoraPair] = {}
        for module, pair in self.adapter.pairs.items():
            if module not in self.adapter.tied:
                stored = split_part(_weight(module, pair))[0]
                pairs |= {module_of_tensor(tensor.name): pair for tensor in self.by_stored.get(stored, ())}
        return replace(self.adapter, pairs=pairs or self.adapter.pairs, tied={})

    @property
    def own_prefix(self) -> Prefix:
        return self.prefix

    def tensor_of(self, module: str) -> str | None:
        pair = self.adapter.pairs.get(module)
        name = f"{module}.weight" if pair is None else _weight(module, pair)
        found = self.by_stored.get(split_part(name)[0], ())
        return name if found and all(self.prefix.to_base(each.name) in self.base for each in found) else None

    def find(self, tensor: str, shape: Sequence[int]) -> list[Place]:  # noqa: ARG002
        places = []
        for found in self.by_stored.get(tensor, ()):
            name = self.prefix.to_base(found.name)
            if name is None or name not in self.base:
                return []
            if found.conversion is None:
                places.append(Place(name))
                continue
            assembled = found.conversion.assembled(self.shapes.__getitem__, self._base_shape)[found.name]
            if assembled.shape != self.base[name].shape:
                raise NotExpressible(f"makes {name} {self.base[name].shape} of tensors that the adapter lacks in part")
            places += [
                places_in_result(assembled, name, piece, self.shapes.__getitem__)
                for piece in assembled.pieces
                if piece.source == tensor
            ]
        return places

    def assembled(self, parameter: str) -> AssembledTensor | None:
        (found,) = self.by_stored.get(parameter, ()) or (None,)
        if found is None:
            return None
        if found.conversion is not None:
            raise NotExpressible("converts a stacked tensor")
        name = self.prefix.to_base(found.name) or found.name
        return AssembledTensor.stored(name, self._stored_shape(name)) if name in self.base else None

    def _base_shape(self, name: str) -> tuple[int, ...] | None:
        spec = self.base.get(self.prefix.to_base(name) or name)
        return None if spec is None else spec.shape

    def misfits(self, spelled: Adapter) -> list[Misfit]:
        targets = set(self.adapter.targets)
        new = {
            name.rpartition(".")[2]
            for module in self.adapter.pairs
            if any(f".{module}".endswith(f".{target}") for target in targets)
            for name in (module_of_tensor(split_part(tensor)[0]) for tensor in self.weights_of(module))
        }
        return missing_targets(replace(spelled, targets=tuple(sorted(new))), self.prefix, self.base)


# --- Names ---


def loaded_names(base: BaseTensors, rules: ArchitectureRules) -> LoadedNames:
    """The names of the base's tensors in the loaded model, computed once for a base."""
    if base.loaded is None or base.loaded.rules is not rules:
        base.loaded = LoadedNames(rules, base)
    return base.loaded


def _loaded_spec(tensor: LoadedTensor, base: BaseTensors) -> TensorSpec:
    spec = replace(base[tensor.sources[0]], name=tensor.name)
    stacks = tensor.conversion is not None and any(
        operation["name"] == "MergeModulelist" for operation in tensor.conversion.rule.operations
    )
    # `missing_targets` looks at the number of dimensions, which stacking raises.
    return replace(spec, layout=Layout.OTHER, shape=(1, *spec.shape)) if stacks else spec


def _prefix_or_none(adapter: Adapter, names: BaseTensors) -> Prefix:
    """As `find_prefix`, for names that may not be the adapter's: two prefixes that fit are no error then."""
    try:
        return find_prefix(adapter, names)
    except InputRefused:
        return Prefix()


def _tensor_shapes(adapter: Adapter) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Every tensor that an adapter changes, with the shape that it has in the model."""
    experts = Counter(split_part(module)[0] for module in adapter.pairs if split_part(module)[1])
    for module, pair in adapter.pairs.items():
        owner, indices = split_part(_weight(module, pair))
        yield owner, (experts[owner], *shape_in_model(pair)) if indices else shape_in_model(pair)
    for module, change in adapter.biases.items():
        yield f"{module}.bias", change.shape
    for tensor, value in adapter.replaced.items():
        yield tensor, value.shape
    for tensor in adapter.token_rows:
        yield tensor, ()


def shape_in_model(pair: LoraPair) -> tuple[int, ...]:
    return pair.shape[::-1] if pair.embedding else pair.shape


def _weight(module: str, pair: LoraPair) -> str:
    return module if pair.as_stored else f"{module}.weight"


def module_of_tensor(tensor: str) -> str:
    suffix = next((each for each in OF_MODULES if tensor.endswith(each)), "")
    return tensor.removesuffix(suffix)


def prefix_notes(adapter: Adapter, prefix: Prefix) -> list[str]:
    return [f"{adapter.name}: {prefix}; resolved."] if prefix else []
