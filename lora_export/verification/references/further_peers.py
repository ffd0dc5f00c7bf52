"""PyTorch once more in fp32, in other forms: what a right computation may make of the weights and inputs, too.

The error of one run is one draw of what rounding does. Adapters may be merged. A weight that is moved by one rounding
stands for sums in another order. A moved result of exp or sin stands for another library: no standard fixes how these
round, and the angle of a time step of 1000 is off by a thousand times the rounding of its frequency.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_export import layers
from lora_export.plan import Plan
from lora_export.runtime.runner import Arrays
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.verification.candidate_outputs import OnProofStep
from lora_export.verification.module_copies import converted_copy, shared_copy, to_single
from lora_export.verification.references import FurtherPeer
from lora_export.verification.references.deployed_module import on_device
from lora_export.verification.references.proof_weights import ProofWeights
from lora_export.verification.references.shared_choices import SharedChoices

MERGED_MODULE = (
    "PyTorch was measured with its adapters merged, too; the larger error counts: they are large beside the weights"
)
MOVED_WEIGHTS = (
    "PyTorch was measured with each weight moved to a neighbouring number in fp32, too; the largest error counts: the "
    "order of its sums alone was a lucky one"
)
MOVED_FUNCTIONS = (
    "PyTorch was measured with each weight and each result of exp, pow, sin and cos moved to a neighbouring number in "
    "fp32, too; the largest error counts: libraries round these functions in ways of their own"
)
DRAWS_OF_ROUNDING = 4  # runs of each kind, at most
# What angles are made of. Not log: T5 makes whole numbers of it, and a rounding chooses another row of a table.
LIBRARY_FUNCTIONS = frozenset({"cos", "exp", "exp2", "pow", "sin"})
# With moved functions, relative to the error without. What is further away has chosen another way at a threshold.
FARTHEST_MOVED = 10.0


def further_peers(
    weights: ProofWeights,
    deployed: Callable[[], ModuleRunner],
    cases: Mapping[str, Arrays],
    device: str,
    seed: int,
    step: OnProofStep,
    choices: SharedChoices | None = None,
) -> Iterator[FurtherPeer]:
    """Run PyTorch with its adapters merged, with moved weights, and with moved results of functions, too.

    There are no such runs in other precisions, and none where a graph rounds what enters its layers to int8: weights
    do not decide its error then. `deployed` returns PyTorch as it ran first. With `choices`, all choose as it did then.
    """
    in_form = functools.partial(peer_in_form, cases=cases, device=device, choices=choices)
    attached = weights.attached
    rounds_inputs = any(weight.activation_block for weight in weights.quantised.values())
    if rounds_inputs or weights.dtype != "float32":
        return
    is_merged = attached.has_pairs and not weights.quantised and not attached.rounding
    if weights.changes is not None and is_merged and not weights.depend_on_tokens:
        step("PyTorch, the adapters merged")
        yield in_form(on_device(merged_module(attached.module, weights.changes), device), MERGED_MODULE)
    if weights.is_large:
        return
    seeds = [seed + number for number in range(DRAWS_OF_ROUNDING)]
    moving = converted_copy(deployed().module, torch.Tensor.clone)
    for own in seeds:
        step("PyTorch, its weights moved by a rounding")
        move_weights(moving, deployed().module, own)
        yield in_form(moving, MOVED_WEIGHTS)
    for own in seeds:
        step("PyTorch, its weights and functions moved by a rounding")
        move_weights(moving, deployed().module, own)
        moved, outputs = MovedFunctions(own), dict[str, Arrays]()
        for name, arrays in cases.items():
            with moved:
                outputs |= in_form(moving, MOVED_FUNCTIONS, cases={name: arrays}).outputs
        if not moved.count:
            return
        yield FurtherPeer(outputs, MOVED_FUNCTIONS, FARTHEST_MOVED)


def peer_in_form(
    module: nn.Module, note: str, cases: Mapping[str, Arrays], device: str, choices: SharedChoices | None = None
) -> FurtherPeer:
    """The outputs of PyTorch in one form, and the note for a verdict that rests on them."""
    peer = ModuleRunner(module, device)
    if choices is not None:
        return FurtherPeer(choices.run_deployed(peer, cases), note)
    return FurtherPeer({name: peer.run(arrays) for name, arrays in cases.items()}, note)


def merged_module(module: nn.Module, changes: Plan) -> nn.Module:
    """A copy with the adapters merged: W + s·BA in fp64, rounded to fp32 once. Shares no arithmetic with a merge."""
    made = shared_copy(module)
    changed = {step.weight: "float32" for step in changes.steps if step.terms}
    layers.materialise(made, changed, {})
    return converted_copy(made, to_single)


def move_weights(moved: nn.Module, module: nn.Module, seed: int) -> None:
    """Set every finite fp32 parameter of a copy to the number next to that of the module, up or down."""
    generator = torch.Generator().manual_seed(seed)
    for parameter, own in zip(moved.parameters(), module.parameters(), strict=True):
        if own.dtype is torch.float32:
            parameter.data = _moved(own.data, generator)


class MovedFunctions(TorchDispatchMode):
    """While it is active, results of LIBRARY_FUNCTIONS in fp32 are moved to the next number; 0, 1 and -1 stay exact.

    Each `with` moves as the first did. `count` is that of the results of all.
    """

    def __init__(self, seed: int):
        super().__init__()  # type: ignore[no-untyped-call]
        self.seed, self.generator, self.count = seed, torch.Generator(), 0

    def __enter__(self) -> Any:
        self.generator.manual_seed(self.seed)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name.rstrip("_") in LIBRARY_FUNCTIONS and _is_fp32(result) and not _is_product(func, args):
            self.count += 1
            is_exact = (result == 0) | (result.abs() == 1)  # a mask, or the end of a function's range
            moved = torch.where(is_exact, result, _moved(result, self.generator))
            return result.copy_(moved) if name.endswith("_") else moved
        return result


def _is_fp32(result: Any) -> bool:
    return isinstance(result, Tensor) and result.dtype is torch.float32 and result.layout is torch.strided


def _is_product(func: Any, args: Any) -> bool:
    """Whether it is a power that libraries compute by products: x² and the like."""
    return func is torch.ops.aten.pow.Tensor_Scalar and float(args[1]).is_integer()


def _moved(values: Tensor, generator: torch.Generator) -> Tensor:
    """Each finite number's neighbour, up or down by chance. A number whose neighbour is not finite stays."""
    goes_up = torch.rand(values.shape, generator=generator).to(values.device) < 0.5
    moved = torch.nextafter(values, torch.where(goes_up, torch.inf, -torch.inf))
    return torch.where(torch.isfinite(moved) & torch.isfinite(values), moved, values)
