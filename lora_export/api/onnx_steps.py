"""Put adapters into a graph, write it, and prove it before it is published.

Where its adapters are swapped, it is proven without any, with each, and mixed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir

from lora_export import provenance
from lora_export.api.adapter_values import generated_adapters, with_filled_slots
from lora_export.api.generation_task import graph_files
from lora_export.api.onnx_request import OnnxRequest, adapter_file
from lora_export.api.publish import ExportProofs, recorded_verdicts, require_same, stage_of_proof
from lora_export.callbacks import note_each
from lora_export.formats import onnx_adapter
from lora_export.formats.onnx_adapter import SUFFIX
from lora_export.graph.find_sites import Sites, find_sites
from lora_export.graph.insert.adapter_inputs import contract_dora_factors, insert_inputs
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.graph.insert.adapter_rows import insert_rows
from lora_export.graph.insert.adapter_slots import head_values, insert_slots
from lora_export.graph.merge.fold import without_unchanged_tables
from lora_export.graph.onnx_file.writing import append_metadata, in_memory, save_graph
from lora_export.graph.refusals import base_as_remedy, checkpoint_as_remedy, refuse_full_rank, refuse_lost_biases
from lora_export.graph.tied_tables import tie_notes, with_rows_of_equal_tables, without_unread_rows
from lora_export.plan import Plan, Step, TensorSpec
from lora_export.plan.own_heads import Head, own_heads
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.ort_session import InMemoryGraph
from lora_export.runtime.several_graphs import SeveralGraphs
from lora_export.runtime.three_graphs import runner_of
from lora_export.verification.candidate_outputs import OutputsByCase
from lora_export.verification.compare_outputs import bits_that_differ
from lora_export.verification.parity import Outcome
from lora_export.verification.proof import Proof, prove, prove_by_origin
from lora_export.verification.references import References
from lora_export.verification.row_proofs import (
    BASE,
    MIXED,
    MOVED,
    SEVERAL,
    STRENGTHS,
    prove_batches,
    prove_strengths,
)
from lora_export.weights.checkpoint import Checkpoint


class Located(NamedTuple):
    """Where the weights of a graph are read, and which of them the adapters change; None without adapters."""

    sites: Sites
    plan: Plan | None
    heads: Sequence[Head] = ()  # the layers that each adapter brings whole, where rows choose them
    targets: Sequence[str] = ()  # the weights beside which future adapters may be
    elsewhere: Sequence[Step] = ()  # what the adapters do to weights of the model that the graph lacks


def locate_steps(
    program: ir.Model,
    options: OnnxRequest,
    checkpoint: Checkpoint | None,
    *,
    is_existing: bool = False,
    whole: Sequence[TensorSpec] = (),
) -> Located:
    """Find the weights of a graph and lay the adapters against them. Raises MatchError with every misfit.

    `checkpoint` is what an existing graph was exported from, and `whole` are the weights of the model that another one
    was exported from: what the adapters do to those that it lacks is in `elsewhere`.
    """
    options.stage("finding its weights")
    sites = find_sites(program, checkpoint)
    if not is_existing and not options.has_parts:  # the model's ties are known: the adapters have rows for each name
        options = replace(options, adapters=[without_unread_rows(one, sites.by_name) for one in options.adapters])
    helped = base_as_remedy(sites) if is_existing and checkpoint is None else contextlib.nullcontext()
    with checkpoint_as_remedy(options.adapters, has_checkpoint=checkpoint is not None), helped:
        steps, elsewhere = laid(options.plan, sites, whole) if options.adapters else (None, [])
    if steps and is_existing:
        alone, steps = steps, with_rows_of_equal_tables(steps, sites, checkpoint)
        note_each(options.on_message, tie_notes(alone, steps))
    if steps:
        refuse_lost_biases(steps, sites)
    if steps and options.lora != "merged":
        steps = without_unchanged_tables(steps, sites)
        refuse_full_rank(steps, but_kronecker=options.lora == "nodes")
    if steps and options.is_swapped:
        onnx_adapter.refuse_new_tables(steps)
    notes = [note for adapter in options.adapters for note in adapter.notes]
    note_each(options.on_message, [*notes, *(steps.notes if steps else ()), *sites.notes])
    heads = own_heads(options.adapters, sites.specs) if options.has_own_heads else ()
    return Located(sites, steps, heads, elsewhere=elsewhere)


def laid(
    make: Callable[[Sequence[TensorSpec]], Plan], sites: Sites, whole: Sequence[TensorSpec]
) -> tuple[Plan, list[Step]]:
    """The plan over the weights of a graph, and the steps on those of the whole model that the graph lacks.

    They are planned together: a name that the graph lacks would be resolved to another layer's.
    """
    elsewhere = [spec for spec in whole if sites.by_name.keys().isdisjoint((spec.name, *spec.aliases))]
    steps = make([*sites.specs, *elsewhere])
    others = {spec.name for spec in elsewhere}
    own = tuple(step for step in steps.steps if step.spec.stored_name not in others)
    return replace(steps, steps=own), [step for step in steps.steps if step.spec.stored_name in others]


def insert_and_save(
    program: ir.Model, located: Located, options: OnnxRequest, targets: Sequence[str], folder: Path
) -> list[str]:
    """Insert the adapters in their mode, and write the graph; return the names of the files beside it.

    `targets` are weights beside which inputs for future adapters are added. The graph is changed.
    """
    if options.lora in ("inputs", "slots"):
        return _with_inputs(program, located, options, targets, folder)
    assert located.plan is not None
    options.stage("inserting the adapters")
    if options.lora == "rows":
        insert_rows(
            program, located.sites, located.plan, max_rank=options.rank, heads=located.heads, per_row=options.per_row
        )
    else:
        insert_nodes(program, located.sites, located.plan, strength_input=options.strength_input)
    return write_graph(program, options, folder)


def _with_inputs(
    program: ir.Model, located: Located, options: OnnxRequest, targets: Sequence[str], folder: Path
) -> list[str]:
    options.stage("inserting inputs for adapters")
    sites, steps = located.sites, located.plan
    changed = {step.weight: step.has_dora for step in (steps.steps if steps else ())}
    scalings = [
        (step.weight, scaling)
        for step in (steps.low_rank if steps else ())
        for term in step.terms
        if (scaling := term.pair.scaling()) is not None
    ]
    changed |= {weight: True for weight, scaling in scalings if not scaling.of_inputs}
    wanted = changed.keys() | set(targets)
    dora = wanted if options.dora else {weight for weight, has_dora in changed.items() if has_dora}
    parts = [name for name in changed if name not in sites.by_name]
    weights = [*(name for name in sites.by_name if name in wanted), *parts]
    scaled = [weight for weight, scaling in scalings if scaling.of_inputs]
    common: dict[str, Any] = {"names": options.names, "dora": dora, "scaled": scaled, "max_rank": options.rank}
    if options.lora == "slots":
        taken: dict[str, Any] = {"slots": options.slots, "heads": located.heads, "per_row": options.per_row}
        contract = insert_slots(program, sites, weights, steps, **common, **taken)
    else:
        more: dict[str, Any] = {"required": options.required_inputs, "strength_input": options.strength_input}
        contract = insert_inputs(program, sites, weights, **common, **more)
    names = []
    for number, adapter in enumerate(options.adapters):
        assert steps is not None
        factors = contract_dora_factors(program, contract, steps, adapter.name)
        # One of several graphs may have nothing of this adapter. Its file then has a pair of zeros.
        parameters = onnx_adapter.input_values(contract, steps, adapter.name, factors) or contract.places[0].zeros()
        for head in located.heads[number : number + 1]:
            parameters |= head_values(contract, located.sites, adapter.name, head)
        path = folder / adapter_file(adapter, options)
        onnx_adapter.write(path, parameters, contract, sha256=adapter.sha256)
        names.append(path.name)
    return [*names, *write_graph(program, options, folder)]


def write_graph(program: ir.Model, options: OnnxRequest, folder: Path) -> list[str]:
    """Write the graph; return the names of the files beside it."""
    if options.fuse:
        from lora_export.models.fused_operators import fuse_operators  # a graph alone needs no PyTorch

        options.stage(f"fusing operators for {options.fuse}")
        fuse_operators(program, options.fuse)
    options.stage("writing")
    own: dict[str, Any] = {"shared": options.shared, "external_data": options.external_data}
    *beside, _ = save_graph(program, folder, options.output.name, **own)
    return [path.name for path in beside]


Graphs = OnnxRunner | SeveralGraphs


def base_outputs(programs: Sequence[ir.Model], references: References, options: OnnxRequest) -> OutputsByCase:
    """The outputs of the graphs before anything is put into them; nothing where no proof compares them."""
    if not options.verify or not options.is_swapped:
        return {}
    options.stage("running the base")
    graphs = [
        OnnxRunner(InMemoryGraph(BASE, *in_memory(program)), options.provider, timeout=options.seconds)
        for program in programs
    ]
    files = graph_files(options.task)
    return _outputs(runner_of(files).of(Path(BASE), graphs) if files else graphs[0], references)


def prove_all(
    path: Path, references: References, options: OnnxRequest, before: OutputsByCase, *, existing: Path | None = None
) -> ExportProofs:
    """Prove the file; the first of three graphs with the two beside it.

    `before` has the outputs of the graph without adapters, `existing` is the graph that it was.

    Raises Different or Undecided unless every proof is `same`.
    """
    runner: Graphs
    if files := graph_files(options.task):
        runner = runner_of(files).open(path.parent, options.provider, timeout=options.seconds)
    else:
        runner = OnnxRunner(path, options.provider, timeout=options.seconds)
    if options.lora == "slots":
        options, runner = _with_slots(options, runner)
    if not options.is_swapped:
        own = references.with_adapters(options.adapters, options.weights)
        whole = require_same(_prove(runner, own, options, ""))
        return ExportProofs(whole, strengths=_prove_strengths(runner, own, options, "all"))
    without, *runners = _by_adapter(runner, options)
    whole = _prove_base(without, references.with_adapters(()), options, existing)
    unlike = bits_that_differ(before, _outputs(without, references))
    if unlike:
        options.on_message(
            "note: without an adapter the graph is the base, but not to the last bit: onnxruntime computes it in "
            f"another order ({unlike[0]})"
        )
    adapters, strengths = {}, dict[str, Proof]()
    for own_runner, adapter, strength in zip(runners, options.adapters, options.strengths, strict=True):
        own = references.with_adapters([adapter], [strength])
        adapters[adapter.name] = require_same(_prove(own_runner, own, options, adapter.name), adapter.name)
        strengths |= _prove_strengths(own_runner, own, options, adapter.name)
    batches: dict[str, Proof] = {}
    if options.by_row:
        alone = [whole, *adapters.values()]
        own = references.with_adapters(options.adapters, options.strengths) if options.per_row > 1 else references
        for role, proof in prove_batches(runner, own, alone, step=lambda step: options.stage(f"verifying {step}")):
            batches[role] = require_same(proof, role)
    mixed, several, moved = map(batches.get, (MIXED, SEVERAL, MOVED))
    return ExportProofs(whole, adapters, mixed, unlike, several, moved, strengths)


def _with_slots(options: OnnxRequest, runner: Graphs) -> tuple[OnnxRequest, Graphs]:
    """The adapters of the request in slots, by their files; without any, generated ones."""
    if not options.adapters:
        options = replace(options, adapters=generated_adapters(runner.path))
        return options, with_filled_slots(runner, options.adapters, None)

    names = [adapter.name for adapter in options.adapters]
    if isinstance(runner, SeveralGraphs):
        return options, runner.with_slot_files(names)
    return options, runner.with_slot_files({name: runner.path.with_name(name + SUFFIX) for name in names})


def _prove(runner: Graphs, references: References, options: OnnxRequest, what: str) -> Proof:
    return prove(references.as_run(runner), references, step=stage_of_proof(options.stage, what))


def _prove_strengths(runner: Graphs, references: References, options: OnnxRequest, name: str) -> dict[str, Proof]:
    """The proof at other strengths than the default, by this name; none for a graph without such an input."""
    if not options.strength_input or not isinstance(runner, OnnxRunner):
        return {}
    proof = prove_strengths(runner, references, step=stage_of_proof(options.stage, f"{name}, {STRENGTHS}"))
    return {} if proof is None else {name: require_same(proof, f"{name}, {STRENGTHS}")}


def _prove_base(runner: Graphs, references: References, options: OnnxRequest, existing: Path | None) -> Proof:
    """Prove the graph without an adapter; where fp64 cannot decide it, against the graph that it was made from."""
    proof = _prove(runner, references, options, BASE)
    if proof.verdict.outcome is Outcome.UNDECIDED and existing is not None and isinstance(runner, OnnxRunner):
        options.stage("verifying the base, the graph that it was made from")
        proof = prove_by_origin(proof, runner, existing, references.as_run)
    return require_same(proof, BASE)


def _by_adapter(runner: Graphs, options: OnnxRequest) -> list[Graphs]:
    """The graph without an adapter, and with each."""
    if options.by_row:
        return [runner.with_rows([number]) for number in range(len(options.adapters) + 1)]
    if isinstance(runner, SeveralGraphs):
        return [runner, *(runner.with_adapter(adapter.name) for adapter in options.adapters)]
    files = [runner.path.with_name(adapter_file(adapter, options)) for adapter in options.adapters]
    return [runner, *(runner.with_adapter(file) for file in files)]


def _outputs(runner: Graphs, references: References) -> OutputsByCase:
    graph = references.as_run(runner)
    return {case: graph.run(arrays) for case, arrays in references.inputs(graph).cases.items()}


def record_in(path: Path, record: dict[str, Any], proofs: ExportProofs | None) -> None:
    """Store in the file where it comes from and what was proven of it."""
    append_metadata(path, {provenance.KEY: json.dumps(record | {"verdict": recorded_verdicts(proofs)})})
