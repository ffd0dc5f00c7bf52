"""A module with its adapters attached as branches: the reference in fp64, and the controls.

No adapter is merged, so that the reference shares no arithmetic with what it judges.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from lora_export import layers, plan
from lora_export.errors import InputRefused
from lora_export.layers.module_tensors import named_tensors, tensor_registry
from lora_export.lora import Adapter
from lora_export.models.model import Model
from lora_export.plan.own_heads import with_labels_of
from lora_export.runtime.runner import Arrays
from lora_export.runtime.torch_runners import Fp64Runner
from lora_export.verification import parity
from lora_export.verification.candidate_outputs import kept
from lora_export.verification.module_copies import shared_copy

FACTORS = {"base": 0.0, "scaled": parity.CONTROL_SCALE}  # on every scale, of the roles that are controls


def attached_copy(model: Model, adapters: Sequence[Adapter], strengths: Sequence[float] | None = None) -> nn.Module:
    """A copy of the model's module with adapters attached. Raises MatchError where they do not fit."""
    return attach_adapters(copy.deepcopy(model.module), adapters, strengths)


def attach_adapters(module: nn.Module, adapters: Sequence[Adapter], strengths: Sequence[float] | None) -> nn.Module:
    """Attach adapters to a module, in place, and set it to eval mode. Raises MatchError where they do not fit."""
    if strengths and not adapters:
        raise InputRefused("strengths are given, and no adapters that they belong to")
    if adapters:
        layers.attach(module, plan.make(adapters, layers.specs(module), strengths=strengths))
    return module.eval()


@dataclass(eq=False)
class AttachedModule:
    """A module with adapters attached, run in several roles.

    `rounding` are the weights that the candidate stores rounded. `preferred` are its values of them: they decide where
    two rounded values are equally near. Every role rounds its own weights, the base too. Beside a base in full
    precision, rounding alone would pass for an adapter.
    """

    module: nn.Module
    rounding: Mapping[str, layers.Rounding] = field(default_factory=dict)
    preferred: Mapping[str, torch.Tensor] = field(default_factory=dict)
    has_pairs: bool = True  # False: the adapters have whole tensors alone
    ready: nn.Module | None = None  # the rounded module of the reference, where PyTorch ran with the same weights

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that `run` takes. `attached` is the reference without rounding, where weights are rounded."""
        return ("reference", "base", "scaled", *(["attached"] if self.rounding else []))

    def run(self, role: str, cases: Mapping[str, Arrays], narrow_operators: set[str]) -> dict[str, Arrays]:
        """Run the cases in fp64, and return their outputs. Fast where the module is `widened` meanwhile.

        Adds the operators that computed in less than fp64 to `narrow_operators`. Rounded weights are made for one role
        at a time.
        """
        factor = FACTORS.get(role, 1.0)
        if self.rounding and role != "attached":
            ready = self.ready if role == "reference" else None
            self.ready = None
            return _run_all(Fp64Runner(ready or self.rounded_module(factor), narrow_operators), cases)
        runner = Fp64Runner(self.module, narrow_operators)
        if factor == 1.0:
            return _run_all(runner, cases)
        # Where there are pairs, a replaced head stays: the control is about the effect of the pairs.
        by_pairs = self.has_pairs
        with layers.scale_adapters(
            self.module, factor, keep_replaced=by_pairs, scale_replaced=not by_pairs, in_fp64=True
        ):
            return _run_all(runner, cases)

    def rounded_module(self, factor: float = 1.0) -> nn.Module:
        """The module with the weights that a candidate should store, summed in fp64. All other tensors are shared."""
        made = shared_copy(self.module)
        if factor == 1.0:
            layers.materialise(made, self.rounding, self.preferred, in_fp64=True)
        else:
            scale_replaced = not self.has_pairs
            layers.materialise(made, self.rounding, {}, factor=factor, scale_replaced=scale_replaced, in_fp64=True)
        return made


def _run_all(runner: Fp64Runner, cases: Mapping[str, Arrays]) -> dict[str, Arrays]:
    return {name: kept(runner.run(arrays)) for name, arrays in cases.items()}


def with_labels(model: Model, adapters: Sequence[Adapter]) -> Model:
    """The model with as many labels as the heads of the adapters have; itself where it has as many.

    All other tensors are shared. The rows of its own head are repeated: they are what the control without adapters
    computes with. Raises InputRefused where the model lacks a layer of a head.
    """
    before = layers.specs(model.module)
    after = before
    for adapter in adapters:
        after = with_labels_of(adapter, after)
    shapes = {new.name: new.shape for old, new in zip(before, after, strict=True) if old.shape != new.shape}
    if not shapes:
        return model
    module = shared_copy(model.module)
    for name, owner, attribute, tensor in list(named_tensors(module)):
        if name in shapes:
            rows = tensor.detach()[torch.arange(shapes[name][0]) % len(tensor)].clone()
            tensor_registry(owner, attribute)[attribute] = nn.Parameter(rows, requires_grad=False)
            if isinstance(owner, nn.Linear):
                owner.out_features = len(rows)
    return replace(model, module=module)
