"""Experts whose weights are slices of one stacked parameter (experts, ., .), with adapters attached to the slices.

The module's own `forward` reads the parameter, and gets W + ΔW. It computes some of the experts only: those that the
router chose for a token.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from lora_export.layers.adapted_layers import (
    Attachment,
    Branch,
    adapted_weight,
    attachment_of,
    is_recording,
    record_branch,
)
from lora_export.layers.torch_internals import own_parameters, subclass

# The parameter of `forward` that has the chosen experts of each token, in all classes of transformers.
CHOSEN_EXPERTS = ("top_k_index", "router_indices")


def adapted_experts_class(original: type[nn.Module], attributes: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of the class of experts. `attributes` are its stacked parameters."""
    properties = {name: property(functools.partial(_read, name)) for name in attributes}
    return subclass(f"Lora{original.__name__}", (_AdaptedExperts, original), properties)


def _read(attribute: str, owner: nn.Module) -> Tensor | None:
    return adapted_weight(owner, attribute)


class _AdaptedExperts(nn.Module):
    """For the `forward` of a module with stacked parameters."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if is_recording():
            for branch in _computed(self, args, kwargs):
                record_branch(branch)
        return super().forward(*args, **kwargs)


def _computed(owner: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Branch]:
    """The branches of the experts that get a token. Without chosen experts all of them do."""
    attachment: Attachment = attachment_of(owner)
    forward: Callable[..., Any] = attachment.original.forward
    given = inspect.signature(forward).bind(owner, *args, **kwargs).arguments
    chosen = next((given[name] for name in CHOSEN_EXPERTS if isinstance(given.get(name), Tensor)), None)
    reached = None if chosen is None else set(chosen.unique().tolist())
    for branch in attachment.branches if attachment.factor else ():
        if reached is None or expert_of(branch, owner) in reached:
            yield branch


def expert_of(branch: Branch, owner: nn.Module) -> int:
    """The expert whose weight the branch changes."""
    region, weight = branch.region, own_parameters(owner)[branch.weight]
    assert region is not None and weight is not None
    return int(region.rows.start * weight.shape[0] // region.shape[0])
