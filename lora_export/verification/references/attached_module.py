"""A module with its adapters attached as branches: the reference in fp64, and the controls.

No adapter is merged, so that the reference shares no arithmetic with what it judges.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import nn

from lora_export import layers, plan
from lora_export.errors import InputRefused
from lora_export.layers.attachments import Branch
from lora_export.layers.module_tensors import named_tensors, tensor_registry
from lora_export.lora import Adapter
from lora_export.models.model import Model
from lora_export.models.stored_parameter import StoredParameter
from lora_export.plan.own_heads import with_labels_of
from lora_export.runtime.runner import Arrays
from lora_export.runtime.runs_in_step import MOST_IN_STEP
from lora_export.runtime.torch_runners import Fp64Runner, run_all_in_step
from lora_export.verification import parity
from lora_export.verification.candidate_outputs import kept
from lora_export.verification.compare_outputs import LARGEST_DEVIATION, distance
from lora_export.verification.module_copies import is_large, shared_copy

RolesAndCases = Mapping[tuple[str, str], Fp64Runner]  # by role and case
FACTORS = {"base": 0.0, "scaled": parity.CONTROL_SCALE}  # on every scale, of the roles that are controls


def attach_adapters(module: nn.Module, adapters: Sequence[Adapter], strengths: Sequence[float] | None) -> nn.Module:
    """Attach adapters to a module, in place, and set it to eval mode. Raises MatchError where they do not fit."""
    if strengths and not adapters:
        raise InputRefused("strengths are given, and no adapters that they belong to")
    if adapters:
        layers.attach(module, plan.make(adapters, layers.specs(module), strengths=strengths))
    return module.eval()


class RoleOutputs(NamedTuple):
    """The outputs in fp64 by case, and the operators that computed in less than fp64."""

    by_case: Mapping[str, Arrays]
    narrow_operators: frozenset[str]


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
    computed: set[Branch] = field(default_factory=set)  # that `attached` computed for these cases
    growth: float | None = None  # see `_growth`, once it is known: runs that are not what they are alone stay alone

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The roles that `run` takes, those together that read the same weights.

        `attached` is the reference without rounding, where weights are rounded.
        """
        return (
            (("reference",), ("scaled",), ("base", "attached")) if self.rounding else (("reference", "base", "scaled"),)
        )

    def run(self, roles: Sequence[str], cases: Mapping[str, Arrays]) -> dict[str, RoleOutputs]:
        """Run the cases in fp64 in some roles; those of a large module at the same time.

        Fast where the module is `widened` meanwhile.
        """
        if not is_large(self.module) and len(roles) > 1:
            return {role: found for one in roles for role, found in self.run([one], cases).items()}
        with contextlib.ExitStack() as scaled:
            modules = {role: scaled.enter_context(self._in_role(role, copied=len(roles) > 1)) for role in roles}
            narrow: dict[str, set[str]] = {role: set() for role in roles}
            runs = {(role, case): Fp64Runner(modules[role], narrow[role]) for role in roles for case in cases}
            if "attached" in roles:  # not while rounded weights are made, which needs every pair
                self.computed = scaled.enter_context(layers.recorded_branches())
            found = self._run_all(runs, cases)
        return {
            role: RoleOutputs({case: found[role, case] for case in cases}, frozenset(narrow[role])) for role in roles
        }

    def _run_all(self, runs: RolesAndCases, cases: Mapping[str, Arrays]) -> dict[tuple[str, str], Arrays]:
        """The outputs of all runs. The weights of a large module are read once for many runs, where they allow it."""
        ordered = sorted(runs, key=lambda run: _size(cases[run[1]]))
        is_together = is_large(self.module) and len(runs) > 1
        if is_together and self.growth is None:
            self.growth = _growth(*((runs[run], cases[run[1]]) for run in ordered[:2]))
        most = MOST_IN_STEP / self.growth if is_together and self.growth else 0
        found: dict[tuple[str, str], Arrays] = {}
        while ordered:
            sizes = itertools.accumulate(_size(cases[run[1]]) for run in ordered)
            batch = ordered[: max(1, sum(size <= most for size in sizes))]
            own = [(runs[run], cases[run[1]]) for run in batch]
            outputs = run_all_in_step(own, kept) if len(own) > 1 else None
            found |= zip(batch, outputs or (kept(runner.run(arrays)) for runner, arrays in own), strict=True)
            del ordered[: len(batch)]
        return found

    @contextlib.contextmanager
    def _in_role(self, role: str, *, copied: bool) -> Iterator[nn.Module]:
        """The module as it is in a role; a copy, where it is to be in several roles at the same time."""
        factor = FACTORS.get(role, 1.0)
        if self.rounding and role != "attached" and not (role == "base" and self._is_stored_rounded):
            ready = self.ready if role == "reference" else None
            self.ready = None
            yield ready or self.rounded_module(factor)
        elif factor == 1.0:
            yield self.module
        else:
            # Where there are pairs, a replaced head stays: the control is about the effect of the pairs.
            module, by_pairs = shared_copy(self.module) if copied else self.module, self.has_pairs
            with layers.scale_adapters(
                module, factor, keep_replaced=by_pairs, scale_replaced=not by_pairs, in_fp64=True
            ):
                yield module

    @property
    def _is_stored_rounded(self) -> bool:
        """Whether rounding changes nothing in the module without its pairs: its weights are stored so."""
        return self.has_pairs and all(
            _is_rounded_to(tensor, self.rounding[name])
            for name, _, _, tensor in named_tensors(self.module)
            if name in self.rounding
        )

    def rounded_module(self, factor: float = 1.0) -> nn.Module:
        """The module with the weights that a candidate should store, summed in fp64. All other tensors are shared."""
        made = shared_copy(self.module)
        if factor == 1.0:
            layers.materialise(made, self.rounding, self.preferred)
        else:
            scale_replaced = not self.has_pairs
            layers.materialise(made, self.rounding, {}, factor=factor, scale_replaced=scale_replaced)
        return made


def _growth(*runs: tuple[Fp64Runner, Arrays]) -> float:
    """Bytes of the outputs for each number of the inputs; 0 where two runs in step are not what they are alone."""
    (runner, arrays), *_ = runs
    alone, together = runner.run(arrays), run_all_in_step(runs, dict)
    if together is None or distance(together[0], alone) > LARGEST_DEVIATION:
        return 0.0
    return _size(alone, "nbytes") / max(1, _size(arrays))


def _size(arrays: Arrays, of: str = "size") -> int:
    return sum(int(getattr(array, of)) for array in arrays.values())


def _is_rounded_to(tensor: torch.Tensor, rounding: layers.Rounding) -> bool:
    if not isinstance(rounding, str):
        return False
    dtype = getattr(torch, rounding)
    if isinstance(tensor, StoredParameter):
        return tensor.stored_dtype is dtype
    return torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)


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
