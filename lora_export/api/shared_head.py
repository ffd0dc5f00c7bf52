"""A task head that adapters save whole, and that all of them share with the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export import plan
from lora_export.errors import InputRefused, listed
from lora_export.lora import Adapter
from lora_export.options.spelling import command, named
from lora_export.plan import TensorSpec
from lora_export.plan.own_heads import without_whole_tensors

if TYPE_CHECKING:
    from torch import nn

    from lora_export.graph.find_sites import Sites

ROUNDED_HEADS = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
BaseTensor = Callable[[str], NDArray[Any]]  # the base's tensor of a name


def without_shared_head(adapters: Sequence[Adapter], specs: Iterable[TensorSpec], stored: BaseTensor) -> list[Adapter]:
    """The adapters without the tensors that they save whole, which must be the base's own.

    A base in 16 bits has them rounded, as a merge wrote them, and a note names the type. Raises InputRefused, which
    lists every tensor that is not, and MatchError for adapters that do not fit the base.
    """
    specs = list(specs)
    types = [dict(_types_in_base(adapter, specs, stored)) for adapter in adapters]
    own = [f"{one.name}, {name}" for one, of in zip(adapters, types, strict=True) for name in of if not of[name]]
    if own:
        raise InputRefused(
            f"these tensors of adapters are not the model's own ({named('ignore_head')}):",
            listed(own),
            "Merge the head into the model first, and export that: "
            f"{command('merge', 'BASE', 'ADAPTER', output='with-head', only_head=True)}. A graph of "
            f"{named('lora', 'rows')} takes adapters whose heads differ, without {named('ignore_head')}.",
        )
    found = []
    for adapter, of in zip(adapters, types, strict=True):
        halves = sorted(ROUNDED_HEADS.keys() & of.values())
        notes = [f"the head of {adapter.name} is the model's, which has it rounded to {one}" for one in halves]
        found.append(replace(without_whole_tensors(adapter, adapter.replaced), notes=(*adapter.notes, *notes)))
    return found


def head_alone(adapter: Adapter) -> Adapter:
    """The tensors that an adapter saves whole, as an adapter. Without a hash: the adapter itself is not merged by it.

    Raises InputRefused for an adapter that saves no tensor whole.
    """
    if not adapter.replaced:
        raise InputRefused(f"{adapter.name} saves no tensor whole: it has no head to merge ({named('only_head')})")
    others: dict[str, Any] = {key: {} for key in ("pairs", "experts", "tied", "biases", "added", "token_rows")}
    return replace(adapter, **others, targets=(), sha256="", file_sha256="")


def stored_in_module(module: nn.Module) -> BaseTensor:
    """The tensors of a module, by name."""
    tensors = module.state_dict()
    return lambda name: np.asarray(tensors[name].detach().cpu().float().numpy())


def stored_in_graph(*graphs: Sites) -> BaseTensor:
    """The tensors of a model's graphs, by name. Quantised ones are dequantised."""
    from lora_export.graph.exporter_names import is_stored_transposed

    def read(name: str) -> NDArray[Any]:
        site = next(sites.by_name[name][0] for sites in graphs if name in sites.by_name)
        return site.array.T if is_stored_transposed(site) else site.array

    return read


def _types_in_base(adapter: Adapter, specs: Sequence[TensorSpec], stored: BaseTensor) -> Iterator[tuple[str, str]]:
    """Each tensor that an adapter saves whole, and the type in which the base has it; empty where it has another."""
    if not adapter.replaced:
        return
    for step in plan.make([adapter], specs, may_add=True, identity_ok=True).steps:
        if step.replace is None:
            continue
        value, found = None if step.added else stored(step.weight), ""
        if value is not None:
            types = {str(value.dtype): value.dtype, **ROUNDED_HEADS}
            with np.errstate(over="ignore"):  # an infinity is no equal value
                rounded = ((name, step.replace.astype(one).astype(value.dtype)) for name, one in types.items())
                found = next((name for name, own in rounded if np.array_equal(own, value)), "")
        yield step.weight, found
