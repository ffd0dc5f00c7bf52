"""An adapter under other names: of its base, of the base as transformers 5 loads it, or of a diffusion pipeline."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export import plan
from lora_export.artifacts.artifact import open_artifact
from lora_export.errors import InputRefused, MatchError, listed
from lora_export.formats.expert_layouts import projections_of
from lora_export.lora import Adapter, ExpertAxes, LoraPair, component_name, expert_name, split_part
from lora_export.names.diffusion_layouts import KNOWN_CLASSES, OtherLayout, other_layouts
from lora_export.names.families import joined_outputs
from lora_export.names.loaded_names import LoadedNames, TensorConversion
from lora_export.names.tensor_parts import AssembledTensor, NotExpressible
from lora_export.options.spelling import named
from lora_export.pairs.open_shape import OpenPair, known_shape, with_kernel_like
from lora_export.plan.attempts import module_of_tensor
from lora_export.plan.converted_attempts import loaded_names
from lora_export.plan.diffusion import (
    CLIP,
    SECOND_CLIP,
    Family,
    components_of,
    family_of_model,
    family_of_pipeline,
    joined_components,
    of_component,
)
from lora_export.plan.match_names import BaseTensors
from lora_export.plan.match_tensors import with_kernel_of
from lora_export.plan.spelling import respelled, spell
from lora_export.plan.ties import Tied, Ties, with_copies
from lora_export.plan.types import Plan, TensorSpec
from lora_export.weights.checkpoint import Checkpoint, open_checkpoint
from lora_export.weights.pipeline import is_pipeline, open_pipeline
from lora_export.weights.tied_tensors import ties_of
from lora_export.weights.weight_files import variant_like


def named_for(adapter: Adapter, names: str | None, base: Path, *, tied_ok: bool = False) -> Adapter:
    """The adapter under the names of a checkpoint on disk, or (transformers5) of the model that is loaded from it.

    None: those that the authors of the model and transformers give it on disk. With `tied_ok` it may change a tensor
    that the base ties to another one, and does not store. Reads headers only. Raises InputRefused (MatchError) where
    the adapter does not fit the base, where the base lacks the names that are wanted, and for pairs that have no place
    under them.
    """
    checkpoint = open_artifact(base).headers
    rules = checkpoint.rules
    if rules is None:
        raise InputRefused(f"{base} has no config.json with a model_type, which the names of its tensors depend on")
    ties = Ties()
    if tied_ok:
        with contextlib.suppress(InputRefused):  # which tensors are tied is not known
            ties = ties_of(checkpoint, Tied.UNTIE)
    specs = BaseTensors(with_copies(checkpoint.specs, ties))
    plan.make([adapter], specs.values(), may_add=True, identity_ok=True, unknown_layout_ok=True, rules=rules)
    spelled = spell(adapter, specs, rules)
    renamed = spelled.adapter.renamed(lambda name: spelled.prefix.to_base(name) or name, targets=())
    renamed = replace(
        renamed, pairs=dict(_placed(name, pair, specs, spelled.views) for name, pair in renamed.pairs.items())
    )
    loaded = loaded_names(specs, rules)
    if names == "transformers5":
        return _as_loaded(renamed, loaded, specs)
    may_lack = rules.are_undone if names is None else rules.own
    if may_lack and all(tensor.stored == tensor.name for tensor in loaded.values()):
        wants = "this format" if names is None else named("names", names)
        raise InputRefused(
            f"{base} has the names of the model as transformers 5 loads it, and {wants} needs those of the original "
            f"checkpoint. Give that one as {named('base')}"
        )
    return renamed


def with_shapes_of_base(adapter: Adapter, base: Path, layout: Mapping[str, str] | None = None) -> Adapter:
    """The adapter with the shapes of its base's weights, where its file does not record them. Raises as `plan.make`.

    Such an adapter gets the names of the base where these differ from its own.
    """
    if not any(isinstance(pair, OpenPair) for pair in adapter.pairs.values()):
        return adapter
    checkpoint = open_artifact(base).headers
    how: dict[str, Any] = {"may_add": True, "identity_ok": True, "layout": layout, "rules": checkpoint.rules}
    (laid,) = plan.make([adapter], checkpoint.specs, **how).adapters
    return replace(adapter, pairs=laid.pairs) if laid.pairs.keys() == adapter.pairs.keys() else laid


def with_kernels_of(adapter: Adapter, base: Path) -> Adapter:
    """The adapter, whose pairs have the kernels of its base's weights: linear layers have none.

    Of a pair with kernels of 1, and of a flat one whose kind has no kernels in its file (LoHa, LoKr). An adapter
    without such pairs needs no base, and several models are not searched. What does not fit the base stays as it is,
    and so do flat pairs where only the config of the base can be read.
    """
    pairs = adapter.pairs.values()
    has_ones = any({*known_shape(pair)[2:]} == {1} for pair in pairs)
    is_flat = any(pair.is_structured and len(known_shape(pair)) == 2 for pair in pairs)
    if is_pipeline(base) or not (has_ones or (is_flat and _names_in(base))):
        return adapter
    checkpoint = open_checkpoint(base, dequantise=True, variant=variant_like(base))
    how: dict[str, Any] = {"may_add": True, "identity_ok": True, "unknown_layout_ok": True, "rules": checkpoint.rules}
    pairs_alone = replace(adapter, replaced={}, biases={}, added={}, token_rows={}, targets=())
    try:
        return _with_kernels(adapter, plan.make([pairs_alone], checkpoint.specs, **how))
    except MatchError as error:
        others = {misfit.key for misfit in error.misfits}
    fitting = {name: pair for name, pair in adapter.pairs.items() if adapter.spelled(name) not in others}
    if len(fitting) in (0, len(adapter.pairs)):  # nothing fits, or a tensor is refused that has another name, too
        return adapter
    return _with_kernels(adapter, plan.make([replace(pairs_alone, pairs=fitting)], checkpoint.specs, **how))


def _with_kernels(adapter: Adapter, laid: Plan) -> Adapter:
    """The adapter, whose pairs have the kernels of the weights that they change in its plan."""
    (spelled,) = laid.adapters  # under the names of the base
    specs = {spelled.spelled(term.module): step.spec for step in laid.low_rank for term in step.terms}
    keys = {name: adapter.spelled(name) for name in adapter.pairs}
    kernels = {name: with_kernel_of(specs[key], adapter.pairs[name]) for name, key in keys.items() if key in specs}
    return replace(adapter, pairs={**adapter.pairs, **kernels})


def with_dots_of(adapter: Adapter, base: Path) -> Adapter:
    """The adapter, whose names have `_` in place of the dots, under those of the model that is loaded from the base.

    Raises as `named_for`.
    """
    checkpoint = open_checkpoint(base, dequantise=True, variant=variant_like(base))
    if checkpoint.rules is not None:
        return named_for(adapter, "transformers5", base)
    (named,) = respelled([adapter], checkpoint.specs, None)  # of diffusers, which renames nothing; or of a bare file
    return named


def has_other_experts(adapter: Adapter, base: Path) -> bool:
    """Whether stacked experts have names that their base, which numbers them, lacks: mlx-lm calls w1 gate_proj.

    False for a base of which only the config can be read: its weights may be missing or pickled.
    """
    experts = _first_experts(adapter)
    known = _names_in(base) if experts else ()
    return any(
        f"{first}{last}.weight" not in known and any(name.startswith(first) for name in known)
        for first, last in experts
    )


def notes_on_experts(adapter: Adapter, base: Path | None) -> list[str]:
    """The note on experts that have names of mlx-lm or SGLang, unless the base has these names, too."""
    experts = _first_experts(adapter)
    known = () if base is None or not experts else _names_in(base)
    if all(f"{first}{last}.weight" in known for first, last in experts):
        return []
    return [
        f"the experts have names ({experts[0][1]}) that some models lack: w1 of Mixtral is gate_proj elsewhere. PEFT "
        "loads an adapter with other names without its experts, in silence. "
        f"{named('base', 'CHECKPOINT')} gives the names of the model"
    ]


def _first_experts(adapter: Adapter) -> list[tuple[str, str]]:
    """The module of the first expert, and its projection, of each stack whose experts `convert` writes one by one."""
    return [(f"{module}.0.", last) for module, _, last in (owner.rpartition(".") for owner in projections_of(adapter))]


def _names_in(base: Path) -> Collection[str]:
    """The names of the tensors of a base; none where its weights are missing or pickled."""
    try:
        return {spec.name for spec in open_checkpoint(base, dequantise=True, variant=variant_like(base)).specs}
    except InputRefused:
        return ()


def without_repeated_tables(adapter: Adapter, base: Path) -> Adapter:
    """The adapter, with the names of its base, without the whole tensors that are the base's own.

    PEFT saves the tables of embeddings beside their pairs, in the type that the loaded model had.
    """
    repeated = repeated_tables(adapter, open_artifact(base).headers, {})
    replaced = {name: table for name, table in adapter.replaced.items() if name not in repeated}
    notes = [f"{name} is saved whole, and is the base's own: it is left out" for name in repeated]
    return replace(adapter, replaced=replaced, notes=(*adapter.notes, *notes))


def repeated_tables(adapter: Adapter, base: Checkpoint, copies: Mapping[str, str]) -> list[str]:
    """The tensors that an adapter saves whole, and that are the base's own, of the names of the base.

    `copies` are tensors that the base ties, each with the one that is stored.
    """
    files = {spec.name: spec.file for spec in base.specs if spec.name not in base.quantised}
    repeated = []
    for name, table in adapter.replaced.items():
        stored = copies.get(name, name)
        with np.errstate(over="ignore"):  # an infinity is no equal value
            if stored in files and np.array_equal(base.shards[files[stored]].read(stored).astype(table.dtype), table):
                repeated.append(name)
    return repeated


def _placed(name: str, pair: LoraPair, base: BaseTensors, views: Mapping[str, TensorSpec]) -> tuple[str, LoraPair]:
    """The name and the pair of a part: of an expert as it is stored, and of a part with a tensor of its own."""
    owner, index = split_part(name)
    if index.isdecimal():
        view = views.get(name)
        own = pair.transposed if view is not None and view.layout.is_transposed else pair
        return expert_name(owner.removesuffix(".weight"), int(index)), replace(own, as_stored=True)
    spec = base.get(f"{name}.weight")
    if spec is None or index:
        return name, pair
    return name, with_kernel_of(spec, pair.of_layer(transposed=spec.layout.is_transposed, embedding=False))


def _as_loaded(adapter: Adapter, loaded: LoadedNames, base: BaseTensors) -> Adapter:
    """The adapter under the names of the loaded model. The pairs of single experts become those of a stacked tensor."""
    pairs: dict[str, LoraPair] = {}
    converted: dict[str, tuple[TensorConversion, dict[str, LoraPair]]] = {}
    new_names: dict[str, str] = {}
    for module, pair in adapter.pairs.items():
        owner, index = split_part(module)
        stored = (owner, f"{owner}.weight") if pair.as_stored else (f"{module}.weight",)
        found = next((loaded.by_stored[name] for name in stored if name in loaded.by_stored), [])
        if len(found) == 1 and found[0].conversion is None:
            new = found[0].name if pair.as_stored else module_of_tensor(found[0].name)
            new_names[module] = f"{new}[{index}]" if index else new
            pairs[new_names[module]] = pair
        elif len(found) == 1 and found[0].conversion is not None and not index:
            conversion = found[0].conversion
            converted.setdefault(found[0].name, (conversion, {}))[1][f"{module}.weight"] = pair
        elif not found:
            pairs[module] = pair  # a name that no rule changes
        else:
            raise InputRefused(f"{module}: transformers splits it, and its pair has no place in the loaded model")
    for name, (conversion, parts) in converted.items():
        try:
            pairs |= _stacked(name, conversion, parts, base)
        except NotExpressible as problem:
            raise InputRefused(f"{name}: transformers makes it of several tensors: it {problem}") from problem
    stacks = {split_part(name)[0] for name in pairs if split_part(name)[1]}

    def name_of(name: str) -> str:
        whole = loaded.by_stored.get(name, [])
        if len(whole) == 1 and whole[0].conversion is None:
            return whole[0].name
        return new_names.get(name, name)

    experts = dict.fromkeys(stacks, ExpertAxes.STORED)
    return replace(replace(adapter, pairs={}).renamed(name_of, targets=()), pairs=pairs, experts=experts)


def _stacked(
    name: str, conversion: TensorConversion, parts: Mapping[str, LoraPair], base: BaseTensors
) -> dict[str, LoraPair]:
    """The pair of each expert of a stacked tensor, of the pairs of the tensors that it is made of."""
    tensor = conversion.assembled(lambda each: base[each].shape)[name]
    rows: dict[int, dict[int, tuple[str, int]]] = {}  # expert -> first row -> (source, number of rows)
    for piece in tensor.pieces:
        if len(piece.positions) != 3 or piece.axes[0] is not None or piece.axes[1:] != (0, 1):
            raise NotExpressible("does more than to stack them")
        (expert,) = piece.positions[0].tolist()
        rows.setdefault(expert, {})[int(piece.positions[1][0])] = piece.source, len(piece.positions[1])
    result = {}
    for expert, by_row in sorted(rows.items()):
        ordered = [by_row[first] for first in sorted(by_row)]
        own = {number: parts[source] for number, (source, _) in enumerate(ordered) if source in parts}
        if not own:
            raise NotExpressible(f"stacks {len(rows)} experts, and the adapter has no pair for expert {expert}")
        pair = joined_outputs(own, [size for _, size in ordered])
        result[expert_name(name, expert)] = replace(pair, as_stored=True)
    return result


OF_CLIP = "text_model."  # what transformers 5 leaves out before the names of a text encoder, and no other program does


def family_of_base(base: Path) -> Family:
    """The family of a pipeline, or of the pipelines that one model belongs to."""
    if is_pipeline(base):
        return family_of_pipeline(open_pipeline(base).class_name)
    return family_of_model(open_checkpoint(base, variant=variant_like(base)).config)


def named_for_pipeline(adapter: Adapter, base: Path, to: str) -> Adapter:
    """The adapter under the names that a format has for a pipeline, or for the one model at `base`.

    Each name begins with its component. ComfyUI has the names of the models' authors, and kohya's scripts have them for
    most models; pairs that are parts of one weight of theirs become one. Reads headers only. Raises InputRefused
    (MatchError) where the adapter does not fit, and for changes that the names of the authors cannot express.
    """
    parts = []
    components = components_of(adapter)
    for component in components:
        folder = _folder_of(base, component, components)
        checkpoint = open_checkpoint(folder, variant=variant_like(folder))
        part = of_component(adapter, component)
        how: dict[str, Any] = {"identity_ok": True, "unknown_layout_ok": True, "rules": checkpoint.rules}
        part = _with_kernels(part, plan.make([part], checkpoint.specs, **how))
        (named,) = respelled([part], checkpoint.specs, checkpoint.rules)
        if component in (CLIP, SECOND_CLIP):
            named = named.renamed(_with_text_model)
        elif to == "comfyui" or (to == "kohya" and _has_names_of_authors(checkpoint.config)):
            named = _under_names_of_authors(named, checkpoint, to)
        parts.append(named.renamed(functools.partial(component_name, component)))
    return joined_components(adapter, parts)


def _folder_of(base: Path, component: str, components: list[str]) -> Path:
    if is_pipeline(base):
        pipeline = open_pipeline(base)
        return pipeline.models[pipeline.folder_of(component, components)]
    if len(components) > 1:
        raise InputRefused(
            f"{base} is one model, and the adapter changes several. Give the folder of the pipeline as {named('base')}"
        )
    return base


def _with_text_model(name: str) -> str:
    return name if name.startswith(OF_CLIP) or not name.startswith("encoder.layers.") else OF_CLIP + name


def _has_names_of_authors(config: Mapping[str, Any]) -> bool:
    """Whether kohya's scripts and musubi-tuner train a model under the names of its authors."""
    return family_of_model(config) is not Family.SD and config.get("_class_name") != "ZImageTransformer2DModel"


def _under_names_of_authors(adapter: Adapter, checkpoint: Checkpoint, to: str) -> Adapter:
    """The adapter under the names of the model's authors; itself where the model has only one kind of names."""
    shapes = {spec.name: spec.shape for spec in checkpoint.specs}
    diffusers_class = checkpoint.config.get("_class_name")
    layout = _layout_of_authors(shapes, diffusers_class)
    if layout is None:
        if diffusers_class is not None and diffusers_class not in KNOWN_CLASSES:
            raise InputRefused(
                f"what the authors of {diffusers_class} call its layers is not known, and files for {to} have "
                f"their names. {named('to', 'diffusers')} keeps those of diffusers"
            )
        return adapter
    names = _NamesOfAuthors(adapter, shapes)
    for name, tensor in layout.tensors.items():
        if tensor.conversion is None:
            names.add_rename(name, tensor.sources[0])
        else:
            names.add(name, list(tensor.sources), tensor.conversion.assembled(shapes.__getitem__)[name])
    if names.problems:
        raise InputRefused(
            f"the format {to} cannot express everything in {adapter.name}:",
            listed(names.problems, len(names.problems)),
        )
    return names.result()


def _layout_of_authors(names: Iterable[str], diffusers_class: object) -> OtherLayout | None:
    """The layout of the authors, for a model of diffusers whose class has one. Two families may share many names."""
    layouts = [layout for layout in other_layouts(names) if layout.is_original]
    return next((layout for layout in layouts if diffusers_class in layout.diffusers_classes), None)


class _NamesOfAuthors:
    """An adapter on its way to the names of the authors, tensor after tensor of the authors' model."""

    def __init__(self, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]):
        self.adapter, self.shapes = adapter, shapes
        self.new_names: dict[str, str] = {}  # of modules and of tensors
        self.pairs: dict[str, LoraPair] = {}  # those that are no longer the adapter's own
        self.biases: dict[str, NDArray[np.float32]] = {}
        self.used: dict[str, str] = {}  # a module whose pair or bias is in these -> the module that has it
        self.problems: list[str] = []

    def add_rename(self, name: str, source: str) -> None:
        self.new_names |= {source: name, _module(source): _module(name)}

    def add(self, name: str, sources: list[str], whole: AssembledTensor) -> None:
        """A tensor of the authors that consists of rows of the sources."""
        order = self._order(sources, whole)
        if len(sources) == 1 and np.array_equal(order, np.arange(len(order))):
            self.add_rename(name, sources[0])
            return
        shapes = {_module(source): self.shapes[source] for source in sources}
        if name.endswith(".weight"):
            self._add_pairs(_module(name), shapes, order)
        else:
            self._add_biases(_module(name), shapes, order)
        self.problems += [f"{source}: a part of a vector" for source in sources if source in self.adapter.added]

    def _order(self, sources: list[str], whole: AssembledTensor) -> NDArray[np.int64]:
        """Which row of the sources, one after another, each row of the tensor is."""
        starts = dict(zip(sources, np.cumsum([0, *(self.shapes[source][0] for source in sources)]), strict=False))
        order = np.empty(whole.shape[0], np.int64)
        for piece in whole.pieces:
            order[piece.positions[0]] = starts[piece.source] + piece.indices[0]
        return order

    def _add_pairs(self, new: str, shapes: Mapping[str, tuple[int, ...]], order: NDArray[np.int64]) -> None:
        modules, sizes, changed = list(shapes), [shape[0] for shape in shapes.values()], self.adapter.pairs
        own = {n: with_kernel_like(shapes[m], changed[m]) for n, m in enumerate(modules) if m in changed}
        self.used |= {modules[number]: new for number in own}
        if others := [modules[number] for number, pair in own.items() if type(pair) is not LoraPair]:
            self.problems += [
                f"{module}: a part of a weight of the original model, and no pair of A and B" for module in others
            ]
        elif own:
            try:
                self.pairs[new] = joined_outputs(own, sizes).part(order, None)
            except InputRefused as error:
                named = ", ".join(modules[number] for number in own)
                self.problems.append(f"{named}: parts of one weight of the original model: {error}")

    def _add_biases(self, new: str, shapes: Mapping[str, tuple[int, ...]], order: NDArray[np.int64]) -> None:
        biases = self.adapter.biases
        if not biases.keys().isdisjoint(shapes):
            whole = [biases.get(module, np.zeros(size, np.float32)) for module, (size,) in shapes.items()]
            self.biases[new] = np.concatenate(whole)[order]
            self.used |= dict.fromkeys(shapes, new)

    def result(self) -> Adapter:
        def name_of(name: str) -> str | None:
            module, dot, what = name.rpartition(".")
            return self.new_names.get(name) or self.new_names.get(module, module) + dot + what

        renamed = self.adapter.renamed(lambda name: None if name in self.used else name_of(name))
        spelling = {new: self.adapter.spelled(old) for old, new in reversed(self.used.items())}
        return replace(
            renamed,
            pairs={**renamed.pairs, **self.pairs},
            biases={**renamed.biases, **self.biases},
            spelling={**renamed.spelling, **spelling},
        )


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]
