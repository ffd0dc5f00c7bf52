"""What a file without a config tells of how its square matrices are stored: by other matrices, and by names.

Two kinds of evidence. A matrix that is not square shows how it is stored, by its pair or by its bias, which has one
entry for each output; matrices of the same kind of name are of the same class. And only GPT-2's relatives have a
Conv1D, by few names: where the file has a stack of layers with names that transformers gives to nn.Linear alone, such
as `layers.0.q_proj`, each layer of such a name is one; so is each layer of a model for images that the tables of
diffusion models name. Names are no evidence in a file in which a matrix of another name than those of a Conv1D is
stored (in, out).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lora_export.lora import LoraPair
from lora_export.names.diffusion_layouts import other_layouts
from lora_export.names.table import CONV1D_NAMES, LINEAR_NAMES, OF_CONV1D, module_kind
from lora_export.pairs.open_shape import known_shape
from lora_export.plan.types import Layout, LayoutSource, TensorSpec

OF_A_STACK = re.compile(r"(.+\.)?\d+\..+")


@dataclass(frozen=True)
class LayoutEvidence:
    """The evidence in the names and shapes of a base. `pairs` has a pair for some of its matrices, by tensor."""

    base: Mapping[str, TensorSpec]
    pairs: Mapping[str, LoraPair]

    def of(self, weight: str) -> dict[Layout, LayoutSource]:
        """The layouts of a square matrix that something is evidence for, each with what that is; two disagree."""
        module = weight.removesuffix(".weight")
        found = dict.fromkeys(self._shown.get(module_kind(module), ()), LayoutSource.SIBLINGS)
        if self._is_linear(module):
            found.setdefault(Layout.OUT_IN, LayoutSource.NAME)
        return found

    def _is_linear(self, module: str) -> bool:
        last, others = module.rpartition(".")[2], (kind for kind in self._shown if kind != OF_CONV1D)
        if last in CONV1D_NAMES or any(Layout.IN_OUT in self._shown[kind] for kind in others):
            return False
        return (last in LINEAR_NAMES and self._has_stack) or self._is_diffusion_model

    @functools.cached_property
    def _has_stack(self) -> bool:
        """Whether a numbered layer of the file has a matrix with a name of nn.Linear."""
        modules = (name.removesuffix(".weight") for name, spec in self.base.items() if len(spec.shape) == 2)
        return any(name.rpartition(".")[2] in LINEAR_NAMES and OF_A_STACK.fullmatch(name) for name in modules)

    @functools.cached_property
    def _is_diffusion_model(self) -> bool:
        return bool(other_layouts(self.base))

    @functools.cached_property
    def _shown(self) -> dict[str, set[Layout]]:
        """The layouts that matrices of each kind of name show."""
        shown: dict[str, set[Layout]] = {}
        for name, spec in self.base.items():
            if len(spec.shape) == 2 and spec.layout is Layout.UNKNOWN and (layout := self._shown_by(spec)) is not None:
                shown.setdefault(module_kind(name.removesuffix(".weight")), set()).add(layout)
        return shown

    def _shown_by(self, spec: TensorSpec) -> Layout | None:
        """The layout that a matrix shows whose outputs its pair or its bias counts; None where it shows none."""
        bias, pair = self.base.get(f"{spec.name.removesuffix('.weight')}.bias"), self.pairs.get(spec.name)
        outputs = bias.shape if pair is None and bias is not None else () if pair is None else known_shape(pair)[:1]
        rows, columns = ((size,) for size in spec.shape)
        if rows == columns or outputs not in (rows, columns):
            return None
        return Layout.OUT_IN if outputs == rows else Layout.IN_OUT
