"""The weights of a module whose product with an input can be looked at by itself."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

from torch import Tensor, nn

from lora_export.layers.branched import STATE, attachment_of
from lora_export.layers.module_tensors import CONVOLUTIONS, conv1d, layout_of
from lora_export.plan import Layout


class Plain(NamedTuple):
    """A weight whose module makes x Wᵀ of one input, adds a bias at most, and hands that out."""

    name: str
    owner: nn.Module  # that holds the tensor
    attribute: str
    layout: Layout
    attention: nn.MultiheadAttention | None = None  # that computes with it, where its owner is never called

    @property
    def tensor(self) -> Tensor:
        """What is stored, without what is attached."""
        return cast(Tensor, self.owner._parameters[self.attribute])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in), a convolution's kernel flattened."""
        first, *others = self.tensor.shape
        return (math.prod(others), first) if self.layout.is_turned else (first, math.prod(others))

    @property
    def has_bias(self) -> bool:
        return self.owner._parameters.get(self._bias) is not None

    @property
    def bias(self) -> Tensor | None:
        """(out,), with what an adapter adds to it."""
        return cast(Tensor, getattr(self.owner, self._bias)) if self.has_bias else None

    @property
    def _bias(self) -> str:
        return "in_proj_bias" if self.attribute == "in_proj_weight" else "bias"


def plain(module: nn.Module) -> list[Plain]:
    """The weights of linear layers, convolutions and embeddings that compute nothing else, attached or not.

    Each tensor's first name; a subclass with a `forward` of its own is left out.
    """
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding, *CONVOLUTIONS, *conv1d())
    known = {kind.forward for kind in kinds}
    parents = {child: parent for parent in module.modules() for child in parent.children()}
    found = []
    for path, owner in module.named_modules():
        original = attachment_of(owner).original if STATE in owner.__dict__ else type(owner)
        attention = owner if isinstance(owner, nn.MultiheadAttention) else parents.get(owner)
        attention = attention if isinstance(attention, nn.MultiheadAttention) else None
        attribute = "in_proj_weight" if attention is owner else "weight"
        if (attention is owner or original.forward in known) and owner._parameters.get(attribute) is not None:
            name = f"{path}.{attribute}" if path else attribute
            found.append(Plain(name, owner, attribute, layout_of(owner, attribute), attention))
    return found
