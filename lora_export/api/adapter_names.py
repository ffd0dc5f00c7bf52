"""An adapter under the names of its base, or of the base as transformers 5 loads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from lora_export import plan
from lora_export.errors import InputRefused
from lora_export.lora import Adapter, ExpertAxes, LoraPair, expert_name, split_part
from lora_export.names.families import joined_outputs
from lora_export.names.loaded_names import LoadedNames, TensorConversion
from lora_export.names.tensor_parts import NotExpressible
from lora_export.options.spelling import named
from lora_export.plan.attempts import module_of_tensor
from lora_export.plan.converted_attempts import loaded_names
from lora_export.plan.match_names import BaseTensors
from lora_export.plan.spelling import spell
from lora_export.plan.types import TensorSpec
from lora_export.weights.checkpoint import open_checkpoint

NAMES_OF = ("transformers4", "transformers5", "vllm", "sglang")  # whose names an adapter can get
_Value = TypeVar("_Value")


def named_for(adapter: Adapter, names: str, base: Path) -> Adapter:
    """The adapter under the names of a checkpoint on disk, or (transformers5) of the model that is loaded from it.

    Reads headers only. Raises InputRefused (MatchError) where the adapter does not fit the base, where the base lacks
    the names that are wanted, and for pairs that have no place under them.
    """
    checkpoint = open_checkpoint(base)
    rules = checkpoint.rules
    if rules is None:
        raise InputRefused(f"{base} has no config.json with a model_type, which the names of its tensors depend on")
    specs = BaseTensors(checkpoint.specs)
    plan.make([adapter], specs.values(), may_add=True, identity_ok=True, unknown_layout_ok=True, rules=rules)
    spelled = spell(adapter, specs, rules)
    renamed = spelled.adapter.renamed(lambda name: spelled.prefix.to_base(name) or name, targets=())
    renamed = replace(
        renamed, pairs=dict(_placed(name, pair, specs, spelled.views) for name, pair in renamed.pairs.items())
    )
    loaded = loaded_names(specs, rules)
    if names == "transformers5":
        return _as_loaded(renamed, loaded, specs)
    if rules.own and all(tensor.stored == tensor.name for tensor in loaded.values()):
        raise InputRefused(
            f"{base} has the names of the model as transformers 5 loads it, and {named('names', names)} needs those of "
            f"the original checkpoint. Give that one as {named('base')}"
        )
    return renamed


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
    return name, pair.of_layer(transposed=spec.layout.is_transposed, embedding=False)


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
