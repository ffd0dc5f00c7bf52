"""The weights of a module that are only multiplied by an input, so that each product can be observed by itself."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

from torch import Tensor, nn

from lora_export.layers.adapted_layers import attachment_of, is_attached
from lora_export.layers.module_tensors import CONVOLUTION_TYPES, conv1d, layout_of, tensor_name
from lora_export.layers.torch_internals import own_parameters
from lora_export.plan import Layout


class MatrixWeight(NamedTuple):
    """The weight W of a layer that returns x Wᵀ of one input, with a bias at most."""

    name: str
    owner: nn.Module  # the module that holds the tensor
    attribute: str
    layout: Layout
    attention: nn.MultiheadAttention | None = None  # the module that computes with W, if its owner is never called

    @property
    def tensor(self) -> Tensor:
        """The stored tensor, without adapters."""
        return cast(Tensor, own_parameters(self.owner)[self.attribute])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in), a convolution's kernel flattened."""
        first, *others = self.tensor.shape
        return (math.prod(others), first) if self.layout.is_transposed else (first, math.prod(others))

    @property
    def has_bias(self) -> bool:
        return own_parameters(self.owner).get(self._bias) is not None

    @property
    def bias(self) -> Tensor | None:
        """(out,), with the shift of the adapters."""
        return cast(Tensor, getattr(self.owner, self._bias)) if self.has_bias else None

    @property
    def _bias(self) -> str:
        return "in_proj_bias" if self.attribute == "in_proj_weight" else "bias"


def find_matrix_weights(module: nn.Module) -> list[MatrixWeight]:
    """The weights of linear layers, convolutions, embeddings and attention projections, attached or not.

    A tied tensor is listed once, under its first name. A subclass with a `forward` of its own is left out.
    """
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding, *CONVOLUTION_TYPES, *conv1d())
    known = {kind.forward for kind in kinds}
    parents = {child: parent for parent in module.modules() for child in parent.children()}
    found = []
    for path, owner in module.named_modules():
        original = attachment_of(owner).original if is_attached(owner) else type(owner)
        attention = owner if isinstance(owner, nn.MultiheadAttention) else parents.get(owner)
        attention = attention if isinstance(attention, nn.MultiheadAttention) else None
        attribute = "in_proj_weight" if attention is owner else "weight"
        if (attention is owner or original.forward in known) and own_parameters(owner).get(attribute) is not None:
            layout = layout_of(owner, attribute)
            found.append(MatrixWeight(tensor_name(path, attribute), owner, attribute, layout, attention))
    return found
