"""Runs of PyTorch as deployed: what the inputs reach in it, and how large its own error can be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from lora_export import layers
from lora_export.lora import Adapter
from lora_export.models.model import Model
from lora_export.plan import Plan
from lora_export.runtime.runner import Arrays
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.verification.candidate_outputs import OnProofStep, kept
from lora_export.verification.inputs.coverage import RowCoverage, coverage_of_pairs
from lora_export.verification.module_copies import is_large
from lora_export.verification.references import FurtherPeer, quantisation_error
from lora_export.verification.references.attached_module import AttachedModule
from lora_export.verification.references.deployed_module import merged_module, moved_module, on_device
from lora_export.verification.references.quantised_weights import DequantisedWeight

MERGED_MODULE = (
    "PyTorch was measured with its adapters merged, too; the larger error counts: they are large beside the weights"
)
MOVED_WEIGHTS = (
    "PyTorch was measured with each weight moved to a neighbouring number in fp32, too; the largest error counts: the "
    "order of its sums alone was a lucky one"
)
DRAWS_OF_ROUNDING = 4  # runs with moved weights, at most


class ObservedRun(NamedTuple):
    """The outputs of PyTorch, and what these inputs could not show."""

    outputs: dict[str, Arrays]  # by case
    doubts: tuple[str, ...]  # pairs and rows that no input reaches
    not_judged: tuple[str, ...]
    unreached: tuple[str, ...]  # the pairs among them, by the adapter's names of their modules
    quantisation: quantisation_error.Findings  # what the quantised weights cost in these runs


def run_observed(
    deployed: ModuleRunner,
    attached: nn.Module,
    cases: Mapping[str, Arrays],
    model: Model,
    adapters: Sequence[Adapter],
    quantised: Mapping[str, DequantisedWeight],
) -> ObservedRun:
    """Run all cases, and observe which pairs and rows of the adapters they reach, and what the quantisation costs.

    `attached` is the module with the adapters attached, whose branches show what is reached.
    """
    rows = RowCoverage(deployed.module, model, adapters)
    errors = {name: weight.error for name, weight in quantised.items() if weight.error is not None}
    with layers.recorded_branches() as computed, quantisation_error.output_errors(deployed.module, errors) as layer:
        outputs = {name: kept(deployed.run(arrays)) for name, arrays in cases.items()}
    doubts, not_judged = rows.doubts, rows.not_judged  # read here: runs on other inputs would add to them
    pairs = coverage_of_pairs(attached, cases, computed)
    found = quantisation_error.findings_on(errors, layer)
    return ObservedRun(outputs, (*doubts, *pairs.doubts), tuple(not_judged), pairs.unreached, found)


def run_further_peers(
    deployed: Callable[[], ModuleRunner],
    attached: AttachedModule,
    changes: Plan | None,
    cases: Mapping[str, Arrays],
    *,
    device: str,
    seed: int,
    is_quantised: bool,
    step: OnProofStep,
) -> Iterator[FurtherPeer]:
    """Run PyTorch in fp32 with its adapters merged, and then with moved weights.

    The error of one run is one draw of what rounding does. A sum in another order has another error, and a weight
    moved by one rounding changes the outputs as much as that. `deployed` returns the runner of PyTorch as deployed; it
    is not called for a large model.
    """
    if not is_quantised and changes is not None and attached.has_pairs and not attached.rounding:
        step("PyTorch, the adapters merged")
        merged = on_device(merged_module(attached.module, changes), device)
        yield _peer(merged, device, cases, MERGED_MODULE)
        del merged
    if is_large(attached.module):
        return
    for number in range(DRAWS_OF_ROUNDING):
        step("PyTorch, its weights moved by a rounding")
        yield _peer(moved_module(deployed().module, seed + number), device, cases, MOVED_WEIGHTS)


def _peer(module: nn.Module, device: str, cases: Mapping[str, Arrays], note: str) -> FurtherPeer:
    peer = ModuleRunner(module, device)
    return FurtherPeer({name: peer.run(arrays) for name, arrays in cases.items()}, note)
