"""The weights of a module that a new adapter changes: by names, by a regular expression, or every linear layer."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_export.errors import InputRefused, first_of
from lora_export.layers.frozen_linear import float_weight
from lora_export.layers.module_tensors import as_array, conv1d, named_tensors, oriented, specs, wide_dtype
from lora_export.plan import Layout, TensorSpec

NEAREST = 3  # names that a message shows


@dataclass(frozen=True, eq=False)
class AdaptableWeight:
    """A weight that can get a pair, or a stacked parameter whose slices (experts) can."""

    spec: TensorSpec
    owner: nn.Module
    tensor: Tensor

    @property
    def name(self) -> str:
        """The name of its pair: its module's, or its own where a module has several."""
        return self.spec.name.removesuffix(".weight").removesuffix(".in_proj_weight")

    @property
    def values(self) -> Tensor:
        """The weight without gradients, as floats where it is in 4 bits."""
        return float_weight(self.tensor).detach()

    @property
    def takes_pair(self) -> bool:
        """Whether it is that of a linear layer, a convolution, an embedding or a packed attention projection."""
        is_product = self.spec.layout in (Layout.OUT_IN, Layout.IN_OUT) and 2 <= len(self.spec.shape) <= 5
        return is_product or self.spec.layout is Layout.EMBEDDING

    @property
    def is_linear(self) -> bool:
        """Whether it is the matrix of a linear layer or of a packed attention projection."""
        return self.spec.layout in (Layout.OUT_IN, Layout.IN_OUT) and len(self.spec.shape) == 2

    @property
    def stored_layout(self) -> str:
        """The layout in the files of a model. transformers makes a Linear4bit, (out, in), of a Conv1D, (in, out)."""
        return (Layout.IN_OUT if getattr(self.owner, "source_cls", None) in conv1d() else self.spec.layout).value

    @property
    def lengths(self) -> NDArray[np.float32]:
        """The norm of each output of the weight, (out,)."""
        weight = oriented(self.values, self.spec.layout).to(wide_dtype(self.tensor.dtype))
        return as_array(torch.linalg.vector_norm(weight.flatten(1), dim=1)).astype(np.float32)

    @property
    def is_stacked(self) -> bool:
        """Whether it is a bare parameter (experts, ., .)."""
        return self.spec.layout is Layout.OTHER


class AdaptableWeights:
    """The weights of one module that can get pairs, and its modules by name."""

    def __init__(self, module: nn.Module):
        self.modules = [path for path, _ in module.named_modules() if path]
        tensors = zip(named_tensors(module), specs(module), strict=True)
        found = [AdaptableWeight(spec, entry.owner, entry.tensor) for entry, spec in tensors]
        self.layers = {one.name: one for one in found if one.takes_pair}
        self.linear = {name: one for name, one in self.layers.items() if one.is_linear}
        self.stacked = {
            one.name: one
            for one in found
            if one.is_stacked and len(one.spec.shape) == 3 and isinstance(one.tensor, nn.Parameter)
        }
        self._left_out = _left_out_of_all_linear(module)

    def chosen(
        self,
        targets: Literal["all-linear"] | Sequence[str],
        pattern: str,
        parameters: Sequence[str],
        *,
        linear_only: bool = False,
    ) -> dict[str, AdaptableWeight]:
        """The weights that endings of names, a regular expression for whole names, and parameters choose.

        Raises InputRefused with everything that matches nothing, and the nearest names.
        """
        layers, what = (self.linear, "linear layer") if linear_only else (self.layers, "layer to adapt")
        names = () if targets == "all-linear" else tuple(targets)
        self.refuse_unmatched(names, layers, what)
        self.refuse_unmatched(parameters, self.stacked, "stacked parameter of experts")
        matched = [name for name in layers if matches_ending(name, names)]
        if targets == "all-linear":
            matched = [name for name in self.linear if name not in self._left_out]
        if pattern:
            matched += [name for name in self._matching(pattern, layers) if name not in matched]
        chosen = set(matched)
        stacked = {name: one for name, one in self.stacked.items() if matches_ending(name, parameters)}
        return {name: one for name, one in layers.items() if name in chosen} | stacked

    def _matching(self, pattern: str, layers: Mapping[str, AdaptableWeight]) -> list[str]:
        try:
            whole = re.compile(pattern)
        except re.error as error:
            raise InputRefused(f"`{pattern}` is not a regular expression: {error}") from error
        found = [name for name in layers if whole.fullmatch(name)]
        if not found:
            raise InputRefused(
                f"the pattern `{pattern}` matches the whole name of no layer to adapt; "
                f"the nearest: {nearest(pattern, layers)}"
            )
        return found

    def refuse_unmatched(self, names: Iterable[str], paths: Iterable[str], what: str) -> None:
        """Raise InputRefused with all names that are the end of no path, and the nearest."""
        paths = list(paths)
        problems = []
        for name in names:
            if any(matches_ending(path, [name]) for path in paths):
                continue
            exists = "is no" if any(matches_ending(path, [name]) for path in self.modules) else "matches no"
            inside = [path for path in paths if f".{name}." in f".{path}"]
            near = f"in it are: {first_of(inside, NEAREST)}" if inside else f"the nearest: {nearest(name, paths)}"
            problems.append(f"`{name}` {exists} {what}; {near if paths else 'the model has none'}")
        if problems:
            raise InputRefused("; ".join(problems))


def nearest(name: str, paths: Iterable[str]) -> str:
    """The names or endings that are the most like this one, in words."""
    paths = list(paths)
    endings = sorted({path.rpartition(".")[2] for path in paths} | set(paths))
    close = difflib.get_close_matches(name, endings, n=NEAREST, cutoff=0.5)
    found = close or difflib.get_close_matches(name, endings, n=NEAREST, cutoff=0)
    return ", ".join(found) or "none"


def matches_ending(path: str, names: Iterable[str]) -> bool:
    """Whether one of the names is the path or its end after a dot."""
    return any(f".{path}".endswith(f".{name}") for name in names)


# Where PEFT refuses a pair for `out_proj`: the kernels of these models read its weight themselves.
MODELS_WITH_KERNELS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")


def _left_out_of_all_linear(module: nn.Module) -> set[str]:
    """The names of linear layers that "all-linear" leaves out, as PEFT does or must.

    They are a Hugging Face model's output embeddings, routers (Llama 4's returns two tensors, to which PEFT adds
    nothing), and layers that PEFT refuses.
    """
    model: Any = module
    head = model.get_output_embeddings() if callable(getattr(module, "get_output_embeddings", None)) else None
    has_kernels = getattr(getattr(module, "config", None), "model_type", None) in MODELS_WITH_KERNELS
    return {
        path
        for path, child in module.named_modules()
        if (head is not None and child is head)
        or type(child).__name__.endswith("Router")
        or (has_kernels and path.endswith("out_proj"))
    }
