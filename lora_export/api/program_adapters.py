"""Adapters as inputs of a program for ExecuTorch: at its export, in its proof, and for a program that exists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from lora_export import layers
from lora_export.api.onnx_request import name_of_file
from lora_export.api.publish import ExportProofs, require_same, stage_of_proof
from lora_export.errors import InputRefused, OutputFailed
from lora_export.formats import onnx_adapter, program_adapter
from lora_export.formats.contract import AdapterPlace, Contract
from lora_export.formats.program_adapter import SUFFIX
from lora_export.graph.insert.adapter_names import CONVENTIONS, LORA_A, LORA_B, module_of
from lora_export.graph.refusals import refuse_full_rank, refuse_transforms
from lora_export.layers.attachments import attachment_of, is_attached
from lora_export.layers.module_tensors import tensor_name
from lora_export.lora import Adapter, LoraPair
from lora_export.options.spelling import named
from lora_export.plan import Plan, Step, Term
from lora_export.runtime.registered.runner import RegisteredRunner
from lora_export.runtime.runner import Runner
from lora_export.storage import atomic_output
from lora_export.storage.store_path import StorePath
from lora_export.verification.proof import Proof, prove
from lora_export.verification.references import References
from lora_export.verification.row_proofs import BASE


def attach_inputs(module: nn.Module, steps: Plan, max_rank: int | None) -> Contract:
    """Attach a pair of zeros, of one rank, to each layer that the plan changes, in place: parameters, for inputs.

    The rank is `max_rank`, or the largest of the adapters. Raises InputRefused for changes that are no inputs of a
    program, and as `layers.attach` does. The returned contract has no fingerprint of the base yet.
    """
    refuse_transforms(steps)
    refuse_full_rank(steps)
    program_adapter.refuse_kinds(steps)
    rank = max_rank or max(map(_largest_rank, steps.low_rank))
    onnx_adapter.refuse_larger_ranks(steps, {step.weight: rank for step in steps.low_rank}, "program")
    blank = Adapter(name="adapter", format="", pairs={})
    attached = tuple(replace(step, terms=(_blank_term(step, rank, blank.name),)) for step in steps.low_rank)
    layers.attach(module, replace(steps, adapters=(blank,), strengths=(1.0,), steps=attached))
    places = [_place(step, rank) for step in attached]
    return Contract("", "", tuple(places), required=True)


def _largest_rank(step: Step) -> int:
    """The rank of the pairs of one adapter together, of the adapter where it is largest."""
    ranks: Counter[str] = Counter()
    for term in step.terms:
        ranks[term.adapter] += term.pair.rank
    return max(ranks.values())


def _blank_term(step: Step, rank: int, adapter: str) -> Term:
    out, inner, *kernel = step.spec.matrix
    a = np.zeros((rank, inner, *kernel), np.float32)
    b = np.zeros((out, rank, *[1] * len(kernel)), np.float32)
    return Term(adapter, module_of(step.weight), LoraPair(a, b, 1.0))


def _place(step: Step, rank: int) -> AdapterPlace:
    dtype = "float64" if step.spec.dtype == "float64" else "float32"  # as `layers.attach` stores A and B
    a, b = _names(step.weight)
    return AdapterPlace(step.weight, a, b, step.spec.matrix, dtype, digest="", max_rank=rank, out_in=True)


def _names(weight: str) -> list[str]:
    """The inputs for A and B beside a weight."""
    return [CONVENTIONS["peft"](module_of(weight), part, False) for part in (LORA_A, LORA_B)]


def parameters_by_input(module: nn.Module) -> dict[str, str]:
    """The parameters that `attach_inputs` made: name -> that of the program's input, in the order of the inputs."""
    found: dict[str, str] = {}
    for path, owner in module.named_modules():
        for branch in attachment_of(owner).branches if is_attached(owner) else ():
            parameters = (tensor_name(path, f"{part}.{branch.parameter}") for part in (LORA_A, LORA_B))
            found |= dict(zip(parameters, _names(tensor_name(path, branch.weight)), strict=True))
    return found


def refuse_files_beside(output: Path, adapters: Sequence[Adapter], sources: Sequence[Path], *, overwrite: bool) -> None:
    """Check where `write_files` will write beside a program, before there is anything to write.

    Raises InputRefused for the name of an adapter that is no file's; OutputFailed for a file that is one of the
    `sources`, and without `overwrite` for one that is there already, and is not of the same trained adapter.
    """
    for adapter in adapters:
        path = output.with_name(name_of_file(adapter) + SUFFIX)
        if any(_is_same(path, source) for source in sources):
            raise OutputFailed(
                f"{path} is an input, and would be replaced by the file of the adapter {adapter.name}. Name the "
                f"adapter otherwise ({named('adapters', f'other={path.name}')}), or choose another folder"
            )
        if not overwrite and path.exists() and not _is_of(path, adapter):
            raise atomic_output.other_contents(path)


def _is_same(path: Path, source: Path) -> bool:
    """Whether two names are of one file; on the disk also through a link, or by letters of another case."""
    if isinstance(path, StorePath) or isinstance(source, StorePath):
        return path == source
    return path.exists() and source.exists() and path.samefile(source)


def _is_of(path: Path, adapter: Adapter) -> bool:
    """Whether a file was made from a trained adapter: only then can it be equal to the one that will be written."""
    try:
        return program_adapter.adapter_sha256(path) == adapter.sha256
    except InputRefused:
        return False


def write_files(folder: Path, contract: Contract, steps: Plan) -> list[Path]:
    """Write the file of each adapter of a plan, NAME.safetensors, and return their paths."""
    paths = []
    for adapter in steps.adapters:
        paths.append(folder / (name_of_file(adapter) + SUFFIX))
        arrays = program_adapter.values(contract, steps, adapter.name)
        program_adapter.write(paths[-1], arrays, contract, sha256=adapter.sha256)
    return paths


def prove_inputs(
    runner: Runner, references: References, steps: Plan, files: Sequence[Path], stage: Callable[[str], None]
) -> ExportProofs:
    """Prove a program with zeros, which is the base, and with the file of each adapter.

    Raises Different or Undecided unless every proof is `same`.
    """

    assert isinstance(runner, RegisteredRunner)

    def proof(own: RegisteredRunner, references: References, what: str) -> Proof:
        return require_same(prove(own, references, step=stage_of_proof(stage, what)), what)

    whole, adapters = proof(runner, references.with_adapters(()), BASE), {}
    for adapter, strength, file in zip(steps.adapters, steps.strengths, files, strict=True):
        own = references.with_adapters([adapter], [strength])
        adapters[adapter.name] = proof(runner.with_adapter(file), own, adapter.name)
    return ExportProofs(whole, adapters)


def with_values_of_adapters(
    runner: RegisteredRunner, adapters: Sequence[Adapter], strengths: Sequence[float] | None
) -> RegisteredRunner:
    """The runner of a program with the values of an adapter in its inputs; with zeros, where there is none.

    Raises InputRefused as `program_adapter.plan_for` does.
    """
    contract = runner.contract
    if contract is None or not adapters:
        return runner
    steps = program_adapter.plan_for(contract, adapters, strengths or [1.0] * len(adapters), runner.path)
    values = program_adapter.values(contract, steps, adapters[0].name)
    return runner.with_values(values, f"its adapter inputs have {adapters[0].name}")
