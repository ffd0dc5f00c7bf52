"""The attempts in which the names of an adapter are those of converted tensors: another generation, another layout."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from lora_export.errors import InputRefused, Misfit
from lora_export.lora import Adapter, ExpertAxes, LoraPair, ParameterEnding, split_part
from lora_export.names.architecture import ArchitectureRules
from lora_export.names.diffusion_layouts import OtherLayout, other_layouts
from lora_export.names.loaded_names import Conversion, LoadedNames, LoadedTensor
from lora_export.names.tensor_parts import AssembledTensor, NotExpressible
from lora_export.pairs.open_shape import laid_on
from lora_export.plan.attempts import ConvertedNames, Spelling, module_of_tensor, pair_weight, shape_in_model
from lora_export.plan.match_names import BaseTensors, Prefix, endings, find_prefix, missing_targets, weight_of
from lora_export.plan.placing import Place, places_in_result, places_in_sources
from lora_export.plan.types import Layout, TensorSpec

RECENT_RESULTS = 8  # of conversions that are kept: those of one layer


class NamesOfConvertedTensors(ConvertedNames):
    """An adapter whose names are those of tensors that consist of the base's."""

    def __init__(self, adapter: Adapter, base: BaseTensors, loaded: Mapping[str, LoadedTensor]):
        super().__init__(adapter, base)
        self.loaded = loaded
        self.names = BaseTensors(_loaded_spec(tensor, base) for tensor in self.loaded.values())
        # transformers keeps the name of a tensor that has no place under its new one.
        self.unchanged = {name: spec for name, spec in base.items() if name not in self.names}
        self.every_name = BaseTensors([*self.names.values(), *self.unchanged.values()])
        self.prefix = _prefix_or_none(adapter, self.every_name)
        self.shapes = {self.prefix.to_base(name) or name: shape for name, shape in _tensor_shapes(adapter)}
        self.matched = sum(self.tensor_of(module) is not None for module in self.modules)
        self.matched_tensors = sum((self.prefix.to_base(name) or name) in self.every_name for name in self._tensors())

    @property
    def own_prefix(self) -> Prefix:
        return Prefix(adapter=self.prefix.adapter)

    def tensor_of(self, module: str) -> str | None:
        weight = weight_of(self.prefix.to_base(module), self.every_name)
        return None if weight is None else self.prefix.adapter + weight.removeprefix(self.prefix.base)

    def laid_on(self, tensor: str, pair: LoraPair) -> LoraPair:
        found = self.loaded.get(self.prefix.to_base(tensor) or tensor)
        if found is None or found.conversion is None:
            return pair  # the plan lays it on the base's tensor
        shape = found.conversion.assembled(self._stored_shape, self.shapes.get)[found.name].shape
        try:
            return laid_on(pair, shape)
        except InputRefused as error:
            raise NotExpressible(f"makes a tensor of {shape} of them, and {error}") from error

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


class _ByTransformers(ConvertedNames):
    """Names that transformers converts while it loads a model."""

    rules: ArchitectureRules
    relation: str  # between the names of the adapter and those of the base

    def converts(self, tensor: str) -> str:
        return f"transformers {self.rules.version} converts {tensor} while it loads the model: it"

    @property
    def note(self) -> str:
        mapping = f"the conversion mapping of transformers {self.rules.version} for {self.rules.architecture}"
        return f"{self.adapter.name}: {self.relation}; matched by {mapping}."


class AsLoaded(_ByTransformers, NamesOfConvertedTensors):
    spelling = Spelling.LOADED
    meaning = "the names of the loaded model"
    relation = "its names are those of the loaded model, the base has the original ones"

    def __init__(self, adapter: Adapter, base: BaseTensors, rules: ArchitectureRules):
        super().__init__(adapter, base, loaded_names(base, rules))
        self.rules = rules
        experts = (self.loaded.get(self.prefix.to_base(name) or name) for name in adapter.experts)
        self.has_converted_experts = any(found is not None and found.conversion is not None for found in experts)


class AsOtherLayout(NamesOfConvertedTensors):
    spelling = Spelling.OTHER_LAYOUT

    def __init__(self, adapter: Adapter, base: BaseTensors, layout: OtherLayout):
        super().__init__(adapter, base, layout.tensors)
        self.layout = layout
        own, other = ("the original model", "diffusers") if layout.is_original else ("diffusers", "the original model")
        self.meaning = f"the names of {layout.model} in {own}"
        self.other = f"those of {other}"

    def converts(self, tensor: str) -> str:
        return f"the layout of {self.layout.model} in diffusers converts {tensor}: it"

    @property
    def note(self) -> str:
        return f"{self.adapter.name}: it has {self.meaning}, the base has {self.other}; matched."


class AsOriginal(_ByTransformers):
    spelling = Spelling.ORIGINAL
    meaning = "the names before transformers renames them"
    relation = "its names are the original ones, the base has those of the loaded model"

    def __init__(self, adapter: Adapter, base: BaseTensors, rules: ArchitectureRules):
        super().__init__(adapter, base)
        self.rules = rules
        self.shapes = dict(_tensor_shapes(adapter))
        self.by_stored = LoadedNames(rules, self.shapes).by_stored
        self.prefix = _prefix_or_none(self._renamed(), base)
        self.shapes = with_missing_experts(self.shapes, rules, self._base_shape)
        # Every expert of a stack asks for all of the stack.
        self._results = functools.lru_cache(RECENT_RESULTS)(
            lambda conversion: conversion.assembled(self.shapes.__getitem__, self._base_shape)
        )
        self.by_stored = LoadedNames(rules, self.shapes).by_stored
        self.matched = sum(self.tensor_of(module) is not None for module in self.modules)
        self.matched_tensors = sum(self._is_in_base(name) for name in self._tensors())

    def _renamed(self) -> Adapter:
        """The adapter with the modules of the loaded model. Its pairs are used for their names only."""
        pairs: dict[str, LoraPair] = {}
        for module, pair in self.adapter.pairs.items():
            if module not in self.adapter.tied:
                stored = split_part(pair_weight(module, pair))[0]
                pairs |= {module_of_tensor(tensor.name): pair for tensor in self.by_stored.get(stored, ())}
        return replace(self.adapter, pairs=pairs or self.adapter.pairs, tied={})

    @property
    def own_prefix(self) -> Prefix:
        return self.prefix

    def tensor_of(self, module: str) -> str | None:
        pair = self.adapter.pairs.get(module)
        name = f"{module}.weight" if pair is None else pair_weight(module, pair)
        return name if self._is_in_base(split_part(name)[0]) else None

    def _is_in_base(self, tensor: str) -> bool:
        found = self.by_stored.get(tensor, ())
        return bool(found) and all(self.prefix.to_base(each.name) in self.base for each in found)

    def find(self, tensor: str, shape: Sequence[int]) -> list[Place]:  # noqa: ARG002
        places = []
        for found in self.by_stored.get(tensor, ()):
            name = self.prefix.to_base(found.name)
            if name is None or name not in self.base:
                return []
            if found.conversion is None:
                places.append(Place(name))
                continue
            assembled = self._results(found.conversion)[found.name]
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
        name = self.prefix.to_base(found.name) or found.name
        if name not in self.base:
            return None
        stored = AssembledTensor.stored(name, self._stored_shape(name))
        if found.conversion is None:
            return stored
        assembled = self._results(found.conversion)[found.name]
        if assembled.shape == stored.shape and assembled.order == (0, 1, 2):
            return stored
        if assembled.shape == stored.shape and assembled.order == (0, 2, 1):  # which is its own inverse
            return stored.transposed(1, 2)
        raise NotExpressible("converts a stacked tensor")

    def _base_shape(self, name: str) -> tuple[int, ...] | None:
        spec = self.base.get(self.prefix.to_base(name) or name)
        return None if spec is None else spec.shape

    def misfits(self, spelled: Adapter) -> list[Misfit]:
        return missing_targets(replace(spelled, targets=tuple(sorted(self._targets_in_base()))), self.prefix, self.base)

    def _targets_in_base(self) -> set[str]:
        """The adapter's targets in the base's names: as they are, whole names of single layers, or the last part."""
        numbered = [name for name in self.adapter.targets if any(part.isdigit() for part in name.split("."))]
        tensors = [f"{name}.weight" for name in numbered if not isinstance(name, ParameterEnding)]
        loaded = LoadedNames(self.rules, tensors)
        found = {module_of_tensor(self.prefix.to_base(name) or name) for name in loaded}
        targets, of_one = set(self.adapter.targets), {*numbered, *self.adapter.pairs}
        for module in self.adapter.pairs:
            names = [module_of_tensor(split_part(tensor)[0]) for tensor in self.weights_of(module)]
            for target in targets.intersection(endings(module)):
                kept = {target for name in names if f".{name}".endswith(f".{target}")}
                found |= kept or {name if target in of_one else name.rpartition(".")[2] for name in names}
        return found


def converted_attempts(
    adapter: Adapter, base: BaseTensors, rules: ArchitectureRules | None, *, fits: bool
) -> list[ConvertedNames]:
    """The ways to read an adapter's names as others than the base's. `fits`: as those, all of them have a tensor."""
    attempts: list[ConvertedNames] = []
    if not fits:
        attempts += [AsOtherLayout(adapter, base, layout) for layout in other_layouts_of(base)]
    if rules is not None and (rules.own or not fits):
        attempts += [AsLoaded(adapter, base, rules), AsOriginal(adapter, base, rules)]
    return attempts


# --- Names ---


def other_layouts_of(base: BaseTensors) -> list[OtherLayout]:
    """The other layouts of a base, computed once for it."""
    if base.layouts is None:
        base.layouts = other_layouts(base)
    return base.layouts


def loaded_names(base: BaseTensors, rules: ArchitectureRules) -> LoadedNames:
    """The names of the base's tensors in the loaded model, computed once for a base."""
    if base.loaded is None or base.loaded.rules is not rules:
        # A stack whose experts have names of their own, as in a GGUF file, is no tensor of transformers.
        stacks = {spec.stored_name for spec in base.values() if spec.region is not None}
        base.loaded = LoadedNames(rules, [name for name in base if name not in stacks])
    return base.loaded


def _loaded_spec(tensor: LoadedTensor, base: BaseTensors) -> TensorSpec:
    spec = replace(base[tensor.sources[0]], name=tensor.name)
    stacks = tensor.conversion is not None and tensor.conversion.stacks
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
        owner, indices = split_part(pair_weight(module, pair))
        if not indices:
            yield owner, shape_in_model(pair)
        elif (axes := adapter.experts.get(owner)) is not ExpertAxes.UNKNOWN:
            shape = shape_in_model(pair)
            yield owner, (experts[owner], *(shape[::-1] if axes is ExpertAxes.TRANSPOSED else shape))
    for module, change in adapter.biases.items():
        yield f"{module}.bias", change.shape
    for tensor, value in adapter.replaced.items():
        yield tensor, value.shape
    for tensor in adapter.token_rows:
        yield tensor, ()


# --- The tensors of experts that an adapter lacks beside those that it has, of one stack of the base ---
#
# An adapter may have pairs for some experts, or for the gate and not for the other half of a fused tensor. A converter
# of transformers needs every one of them to tell where each is in the stack. Those that are missing change nothing.

WITHOUT_OPERATORS = re.compile(r"[\w.*]+")  # a pattern whose only wildcards are `*`, an expert, and the dots


def with_missing_experts(
    shapes: Mapping[str, tuple[int, ...]], rules: ArchitectureRules, base_shape: Callable[[str], tuple[int, ...] | None]
) -> dict[str, tuple[int, ...]]:
    """The tensors of an adapter, and those of the same stacks that it lacks, with their shapes.

    `base_shape` has the shape of a stack of the base by its loaded name. A projection that the adapter has for no
    expert gets the shape of another one; whether it is right, the shape of the whole stack shows.
    """
    found = dict(shapes)
    for tensor in LoadedNames(rules, shapes).values():
        shape = base_shape(tensor.name)
        conversion = tensor.conversion
        if isinstance(conversion, Conversion) and shape is not None and conversion.stacks:
            for name, own in _expected(conversion, shapes, shape[0]):
                found.setdefault(name, own)
    return found


def _expected(
    conversion: Conversion, shapes: Mapping[str, tuple[int, ...]], experts: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a stack, by the names of those that the adapter has."""
    sources = conversion.rule.sources
    if not all(WITHOUT_OPERATORS.fullmatch(pattern) for pattern in sources):
        return
    for pattern, names in conversion.collected.items():
        found = re.search(pattern.replace(".", r"\.").replace("*", r"\d+"), names[0])
        if found is None:
            return
        before, after = names[0][: found.start()], names[0][found.end() :]
        for other in sources:
            own = shapes[conversion.collected.get(other, names)[0]]
            for expert in range(experts):
                yield f"{before}{other.replace('*', str(expert))}{after}", own
