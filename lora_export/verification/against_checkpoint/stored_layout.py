"""How a changed matrix is stored, decided without the code that decides it for a merge.

The evidence, in this order: an embedding's own pair; the shape; the user; the type of the model, unless the biases of
modules of the same name contradict it; the adapters, other matrices of the file, and names, which have to agree. Where
there is none, the layout is unknown.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lora_export.names.diffusion_layouts import other_layouts
from lora_export.names.table import CONV1D_MODULES, KNOWN_MODEL_TYPES, LINEAR_MODULES, LINEAR_NAMES
from lora_export.plan import Layout, Plan, Step
from lora_export.weights.checkpoint import Checkpoint

WEIGHT = ".weight"


@dataclass(frozen=True)
class StoredLayouts:
    """The layouts of the weights that a plan changes."""

    by_weight: Mapping[str, Layout]  # UNKNOWN where there is no evidence, or where it disagrees

    @classmethod
    def of(cls, plan: Plan, base: Checkpoint, stated: Mapping[str, str]) -> StoredLayouts:
        """Decide the layout of each weight with terms. Reads the headers and the config of the base only."""
        changed = [step for step in plan.steps if step.terms]
        shown = {step.weight: _shown_by_pair(step) for step in changed}
        shapes = {name: entry.shape for shard in base.shards for name, entry in base.entries(shard).items()}
        of_model = functools.cache(functools.partial(_of_model, shapes=shapes, model_types=_model_types(base.config)))
        unreliable = {adapter for step in changed for adapter in _contradicted(step, plan, shown[step.weight], stated)}
        file, layouts = _FileOfUnknownModel(shapes, shown), {}
        for step in changed:
            # Only the converter that cuts a part of a stored tensor tells whether it transposes it.
            of_part = step.spec.layout if step.spec.region is not None else None
            layout = shown[step.weight] or of_part or _stated(step.weight, stated)
            layout = layout or of_model(step.weight.removesuffix(WEIGHT).rpartition(".")[2])
            if layout is None:
                found = {own for adapter, own in _recorded(step, plan) if adapter not in unreliable}
                found.update(file.layouts_of(step.weight))
                layout = found.pop() if len(found) == 1 else Layout.UNKNOWN
            layouts[step.weight] = layout
        return cls(layouts)

    def stored_as(self, step: Step) -> Step:
        """The step on a weight of the layout that was decided here."""
        layout = self.by_weight.get(step.weight)
        return step if layout is None else replace(step, spec=replace(step.spec, layout=layout))


def _shown_by_pair(step: Step) -> Layout | None:
    """The layout that the pair and the shape show: of an embedding, a convolution, and what is not square."""
    pair, shape = step.terms[0].pair, step.spec.shape
    if pair.embedding:
        return Layout.EMBEDDING
    if len(shape) != 2:
        return Layout.OUT_IN
    if shape[0] == shape[1]:
        return None
    return Layout.OUT_IN if shape[0] == pair.shape[0] else Layout.IN_OUT


def _stated(weight: str, stated: Mapping[str, str]) -> Layout | None:
    found = None
    for pattern, layout in stated.items():
        for name in (weight, weight.removesuffix(WEIGHT)):
            if name == pattern or fnmatch.fnmatchcase(name, pattern):
                found = Layout(layout)
    return found


def _model_types(config: Mapping[str, Any]) -> set[str]:
    """The types of a model and of its parts; empty where one of them is unknown."""
    found, parts = set(), [config]
    while parts:
        part = parts.pop()
        if part.get("model_type"):
            found.add(str(part["model_type"]))
        parts.extend(value for key, value in part.items() if isinstance(value, dict) and key != "id2label")
    return found if "model_type" in config and not found - KNOWN_MODEL_TYPES else set()


def _of_model(module: str, shapes: Mapping[str, tuple[int, ...]], model_types: set[str]) -> Layout | None:
    """The layout by the type of the model and a module's last name; UNKNOWN where shapes in the file contradict it."""
    if not model_types:
        return None
    in_out = {name for name in model_types if module in CONV1D_MODULES.get(name, ())}
    if in_out and any(module in LINEAR_MODULES.get(name, ()) for name in model_types):
        return None
    layout = Layout.IN_OUT if in_out else Layout.OUT_IN
    return layout if set(_of_namesakes(module, shapes)) <= {layout} else Layout.UNKNOWN


def _of_namesakes(module: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Layout]:
    """The layouts of matrices with this last name that are not square: a bias has one entry for each output."""
    for name, shape in shapes.items():
        if name.endswith(f"{module}{WEIGHT}") and name.removesuffix(WEIGHT).rpartition(".")[2] == module:
            outputs = shapes.get(f"{name.removesuffix(WEIGHT)}.bias")
            if len(shape) == 2 and shape[0] != shape[1] and outputs in ((shape[0],), (shape[1],)):
                yield Layout.OUT_IN if outputs == (shape[0],) else Layout.IN_OUT


def _recorded(step: Step, plan: Plan) -> Iterator[tuple[str, Layout]]:
    """Each adapter on this weight that records its layout, and that layout."""
    by_name = {adapter.name: adapter for adapter in plan.adapters}
    for term in step.terms:
        layout = by_name[term.adapter].layouts.get(term.module)
        if layout is not None:
            yield term.adapter, Layout(layout)


def _contradicted(step: Step, plan: Plan, shown: Layout | None, stated: Mapping[str, str]) -> Iterator[str]:
    """The adapters whose record for this weight is wrong: their other records are no evidence then."""
    known = shown or _stated(step.weight, stated)
    for adapter, layout in _recorded(step, plan):
        if known in (Layout.OUT_IN, Layout.IN_OUT) and layout is not known and len(step.spec.shape) == 2:
            yield adapter


CONV1D = frozenset(name for modules in CONV1D_MODULES.values() for name in modules)


@dataclass(frozen=True, eq=False)
class _FileOfUnknownModel:
    """What a file whose model is unknown shows. Each of its evidence is read from all shapes once."""

    shapes: Mapping[str, tuple[int, ...]]
    shown: Mapping[str, Layout | None]

    def layouts_of(self, weight: str) -> Iterator[Layout]:
        """The layouts of a square matrix by other matrices, and by its name."""
        module = weight.removesuffix(WEIGHT)
        last = module.rpartition(".")[2]
        yield from (layout for name, layout in self.oblong.items() if _are_alike(name.removesuffix(WEIGHT), module))
        may_be_linear = last not in CONV1D and not self.has_other_in_out
        if may_be_linear and ((last in LINEAR_NAMES and self.has_stack) or self.is_of_diffusion):
            yield Layout.OUT_IN

    @functools.cached_property
    def oblong(self) -> dict[str, Layout]:
        return dict(_oblong(self.shapes, self.shown))

    @functools.cached_property
    def has_other_in_out(self) -> bool:
        """Whether a matrix is stored (in, out) that has no name of such a class."""
        return any(
            layout is Layout.IN_OUT and name.split(".")[-2] not in CONV1D for name, layout in self.oblong.items()
        )

    @functools.cached_property
    def has_stack(self) -> bool:
        """Whether a matrix is the weight of a layer of nn.Linear, by its name, below a number."""
        parts = (name.removesuffix(WEIGHT).split(".") for name, shape in self.shapes.items() if len(shape) == 2)
        return any(last in LINEAR_NAMES and any(part.isdecimal() for part in outer) for *outer, last in parts)

    @functools.cached_property
    def is_of_diffusion(self) -> bool:
        return bool(other_layouts(self.shapes))


def _oblong(shapes: Mapping[str, tuple[int, ...]], shown: Mapping[str, Layout | None]) -> Iterator[tuple[str, Layout]]:
    """The matrices that are not square, each with the layout that its pair shows, else its bias."""
    for name, shape in shapes.items():
        if name.endswith(WEIGHT) and len(shape) == 2 and shape[0] != shape[1]:
            outputs = shapes.get(f"{name.removesuffix(WEIGHT)}.bias")
            by_bias: dict[tuple[int, ...], Layout] = {shape[:1]: Layout.OUT_IN, shape[1:]: Layout.IN_OUT}
            layout = shown.get(name) or by_bias.get(outputs or ())
            if layout in (Layout.OUT_IN, Layout.IN_OUT):
                yield name, layout


def _are_alike(one: str, other: str) -> bool:
    """Whether two modules are of one class by their names: the last parts, and all that precedes a number."""
    (*first, last), (*second, its) = one.split("."), other.split(".")
    if last in CONV1D:
        return its in CONV1D
    parts = zip(first, second, strict=False)
    same_place = len(first) == len(second) and all(a == b or (a + b).isdecimal() for a, b in parts)
    return last == its and (not last.isdecimal() or same_place)
