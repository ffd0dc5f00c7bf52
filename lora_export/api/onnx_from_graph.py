"""An ONNX file from an existing graph: put adapters into it, and prove it against the graph or a PyTorch model."""

from __future__ import annotations

import difflib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lora_export import provenance
from lora_export.adapters.combine import combined_unless_exact
from lora_export.api.generation_files import copy_generation_files
from lora_export.api.load_model import resolve_model
from lora_export.api.onnx_request import OnnxRequest, OnnxResult
from lora_export.api.onnx_steps import Located, base_outputs, insert_and_save, locate_steps, prove_all, record_in
from lora_export.api.shared_head import stored_in_graph
from lora_export.errors import InputRefused, count, first_of, listed
from lora_export.graph.find_sites import Sites, find_sites, is_output_head
from lora_export.graph.insert.adapter_names import dotted, module_of
from lora_export.graph.insert.batch_axis import unclear_inputs
from lora_export.graph.merge.copy_parts import MergeRun
from lora_export.graph.merge.merge_graph import merge_report, write_merged
from lora_export.graph.onnx_file.reading import GraphFile, open_graph
from lora_export.graph.onnx_file.writing import MIN_EXTERNAL_BYTES, in_memory
from lora_export.graph.values import drop_tensors, initializers, refuse_old_ir, unused_name, value_names
from lora_export.options.combining import Combination
from lora_export.options.spelling import command, named
from lora_export.plan.spelling import respelled
from lora_export.provenance import ROW_ADAPTERS_KEY
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.ort_session import InMemoryGraph
from lora_export.runtime.runner import TIMEOUT, Arrays
from lora_export.storage import input_files
from lora_export.storage.hashes import FAST, file_hash
from lora_export.storage.store_path import place
from lora_export.verification.against_graph import GraphReferences
from lora_export.verification.inputs.graph_inputs import NoGeneratedInputs
from lora_export.verification.references import References
from lora_export.verification.references.base_graph import BaseGraph
from lora_export.weights.checkpoint import Checkpoint, open_checkpoint
from lora_export.weights.merge_report import MergeReport

SHOWN_LAYERS = 10  # layers that an error lists


def export_from_graph(options: OnnxRequest) -> OnnxResult:
    """See `export_onnx`."""
    path = place(str(options.model))
    with options.staged([path] if path.exists() else []) as folder, options.sharing(folder) as given:
        options.stage("reading the graph")
        report: MergeReport | None = None
        graph, names = _open(path, options.checkpoint)
        program = graph.model.clone()  # its large weights stay in their files
        program.metadata_props.pop(provenance.KEY, None)  # the new record contains its adapters
        options = _respelled(given, program, names)
        base = BaseGraph(graph.path, graph.model, names, options.provider, options.inputs, timeout=options.seconds)
        references = _references(base, options) if options.verify else None
        if options.ignore_head:
            found = find_sites(program, names)
            options = options.without_head(found.specs, stored_in_graph(found))
            del found
        before = base_outputs([program], references, options) if references else {}
        located = locate_steps(program, options, names, is_existing=True)
        if options.verify and options.reference is None:
            _refuse_other_labels(located)
        if located.plan:
            provenance.refuse_second_merge(given.adapters, graph.path, graph.history)
        if options.lora == "merged":
            assert located.plan is not None
            options.stage("folding the adapters in")
            run, companions, report = _merge(graph, program, located, folder, options)
            hashes = run.hashes
        else:
            refuse_old_ir(program)
            targets = _targets(located.sites, options)
            if options.by_row:
                _measure_unclear_shapes(program, located, targets, base, options)
            hashes, companions = {}, insert_and_save(program, located, options, targets, folder)
        companions += copy_generation_files(path, options.output, folder, options.on_message)
        plan = located.plan
        drop_tensors(program)  # a graph contains cycles: with them its weights would stay in memory during the proof
        del program, located
        written = folder / options.output.name
        proofs = prove_all(written, references, options, before, existing=path) if references else None
        record_in(written, _record(graph, hashes, given), proofs)
    files = (options.output, *(options.output.parent / name for name in companions))
    return OnnxResult(options.output, files, proofs, plan, merge=report)


def _respelled(options: OnnxRequest, program: ir.Model, names: Checkpoint | None) -> OnnxRequest:
    """The adapters under the names of the graph, where a checkpoint tells its model; combined, if that is an option."""
    adapters = options.adapters
    if names is not None and adapters:
        adapters = respelled(adapters, find_sites(program, names).specs, names.rules)
    adapters, weights = combined_unless_exact(adapters, options.weights, options.combined)
    return replace(options, adapters=adapters, weights=weights)


def _open(path: Path, checkpoint: Path | None) -> tuple[GraphFile, Checkpoint | None]:
    """Open the graph, and the checkpoint that names its weights.

    Raises InputRefused for a graph that has inputs for adapters already.
    """
    input_files.must_exist(path, "model")
    graph = open_graph(path)
    if graph.takes_adapters:
        raise InputRefused(f"{path} takes adapters already. {_way_on(graph)}")
    return graph, None if checkpoint is None else open_checkpoint(checkpoint)


def _way_on(graph: GraphFile) -> str:
    """How a graph that takes adapters gets one more."""
    if ROW_ADAPTERS_KEY in graph.model.metadata_props:
        return "Its rows choose among those in it. Give all of them, with the graph that it was made from"
    one_more = command("convert", "ADAPTER", output="OTHER.onnx_adapter", graph=graph.path.name)
    return f"One more needs a file alone (`{one_more}`). For anything else start from the graph that it was made from"


def _references(base: BaseGraph, options: OnnxRequest) -> References:
    """What the result is compared with: the PyTorch model, or where none was named, the graph itself."""
    if options.reference is None:
        options.stage("running the base")
        references = GraphReferences(base, options.lora, requantised=options.requantize)
        references.check()
        return references
    from lora_export.api.adapted_model import adapted_model
    from lora_export.verification.against_pytorch import PyTorchReferences

    options.stage("loading the model")
    model = resolve_model(options.reference, options.without_own_heads, dtype=options.dtype, inputs=options.inputs)
    applied = replace(options, combination=Combination())  # the adapters are combined already
    model = adapted_model(model, options.adapters, options.weights, applied, options.on_message).model
    return PyTorchReferences(
        model,
        user_inputs=options.inputs,
        device=options.provider,
        has_own_heads=options.has_own_heads,
        origin=base.path if options.requantize else None,
    )


def _measure_unclear_shapes(
    program: ir.Model, located: Located, targets: Sequence[str], base: BaseGraph, options: OnnxRequest
) -> None:
    """Set the shapes that tell which dimension of a layer's input is the batch, where only a run can tell it."""
    heads = {dotted(module_of(name.removesuffix(".bias")), "weight") for head in located.heads for name in head}
    planned = located.plan.low_rank if located.plan else ()
    changed = dict.fromkeys([*(step.weight for step in planned), *heads, *targets])
    sites = [site for name in changed for site in located.sites.by_name.get(name, ())]
    values = unclear_inputs(program, sites)
    if not values:
        return
    options.stage("measuring shapes")
    try:
        cases = base.inputs.cases
    except NoGeneratedInputs as refusal:
        options.on_message(f"note: the graph was not run to find the batch: {refusal.problem}")
        return
    set_measured_shapes(program, values, cases, timeout=options.seconds)


def _refuse_other_labels(located: Located) -> None:
    """Raise InputRefused for heads with other numbers of labels than the graph: it shows no reference for them."""
    shapes = {spec.name: spec.shape for spec in located.sites.specs}
    others = [
        f"{name}: {own.shape[0]} labels, the graph's has {shapes[name][0]}"
        for head in located.heads
        for name, own in head.items()
        if own.shape != shapes[name]
    ]
    if others:
        raise InputRefused(
            "the graph alone shows no reference for heads with other labels than its own:",
            listed(others),
            f"Name the PyTorch model that it was exported from ({named('reference', 'MODEL')})",
        )


def _targets(sites: Sites, options: OnnxRequest) -> list[str]:
    """The weights beside which inputs for future adapters are added.

    Raises InputRefused for a name that matches no linear layer, and for "all-linear" where layers have no name.
    """
    targets = options.targets
    if targets is None:
        return []
    linear = {site.name: site for site in sites.linear if len(site.shape) == 2}
    if isinstance(targets, str):
        unknown = [site.location for site in sites.unnamed if not site.equal_tensors and not is_output_head(site)]
        if unknown:
            nameless = count(len(unknown), "linear layer has", "linear layers have")
            raise InputRefused(
                f"{nameless} no certain name ({first_of(unknown, SHOWN_LAYERS)}). "
                f"{named('checkpoint', 'CHECKPOINT')}, from which the graph was exported, names them by content"
            )
        return [name for name, site in linear.items() if not is_output_head(site)]
    matched = {name: [weight for weight in linear if f".{module_of(weight)}".endswith(f".{name}")] for name in targets}
    if lost := [name for name, weights in matched.items() if not weights]:
        endings = sorted({module_of(weight).rpartition(".")[2] for weight in linear})
        near = [difflib.get_close_matches(name, endings, n=3, cutoff=0.5) or endings[:3] for name in lost]
        raise InputRefused(
            "; ".join(
                f"`{name}` matches no linear layer; the nearest: {', '.join(found) or 'none'}"
                for name, found in zip(lost, near, strict=True)
            )
        )
    return [weight for weight in linear if any(weight in weights for weights in matched.values())]


def _merge(
    graph: GraphFile, program: ir.Model, located: Located, folder: Path, options: OnnxRequest
) -> tuple[MergeRun, list[str], MergeReport | None]:
    """Copy the graph's files in blocks, W + ΔW in place of W.

    Returns what was done, the names of the files beside the graph, and the report of a merge into quantised weights.
    Raises as `merge_graph` does.
    """
    assert located.plan is not None
    for value in initializers(program):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes < MIN_EXTERNAL_BYTES:
            # onnxruntime reads no other file while it infers shapes.
            value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)
    name, begun = options.output.name, time.perf_counter()
    settings: dict[str, Any] = {"min_retention": options.min_retention, "requantise": options.requantize}
    run = MergeRun(file_name=name, shared=options.shared, external_data=options.external_data, **settings)
    write_merged(located.plan, replace(graph, model=program), located.sites, folder, run)
    report = merge_report(located.plan, graph, folder, run, time.perf_counter() - begun) if run.layers else None
    return run, [path.name for path in run.written(folder) if path.name != name], report


def _record(graph: GraphFile, hashes: Mapping[str, dict[str, str]], options: OnnxRequest) -> dict[str, Any]:
    """Where the graph comes from: the hashes of its files. Raises InputRefused where one has changed meanwhile."""
    base = {path.name: hashes.get(path.name) or {FAST: file_hash(path, FAST)} for path in graph.sources}
    for path in graph.changed():
        raise InputRefused(f"{path} changed while it was being read")
    settings = {**options.form_settings, **options.settings}
    settings |= {"requantize": True, "min_retention": options.min_retention} if options.requantize else {}
    return provenance.record(options.adapters, options.strengths, base, graph.history, settings, base_path=graph.path)


# --- shapes, measured in runs ---

SizesByCase = tuple[int, ...]  # of one dimension


def set_measured_shapes(
    model: ir.Model, values: Sequence[ir.Value], cases: Mapping[str, Arrays], *, timeout: float = TIMEOUT
) -> None:
    """Set the shapes and types of these results of the main graph's nodes to what the graph computes on the CPU.

    A dimension that has the size of one symbol of the graph's inputs in every case, and of no other, gets this symbol.
    One whose size is the same in all cases is that number. Any other is unknown. Sizes that do not differ between the
    cases say nothing: with less than two cases nothing is set.

    Raises RuntimeRefused where the graph does not run on the cases.
    """
    if len(cases) < 2:
        return
    measured, shapes = _with_shapes_as_outputs(model, values)
    graph = InMemoryGraph("the graph", *in_memory(measured))
    drop_tensors(measured)
    runner = OnnxRunner(graph, optimise=False, low_memory=True, timeout=timeout)
    types = {output.name: output.type for output in runner.session.get_outputs()}
    runs = [runner.run(arrays, shapes) for arrays in cases.values()]
    symbols = _symbols_by_sizes(model, list(cases.values()))
    for value, name in zip(values, shapes, strict=True):
        sizes = [run[name].tolist() for run in runs]
        if len({len(own) for own in sizes}) == 1:
            dimensions = zip(*sizes, strict=True)
            value.shape = ir.Shape(
                [own[0] if len(set(own)) == 1 else ir.SymbolicDim(symbols.get(own)) for own in dimensions]
            )
        value.type = ir.TensorType(ir.DataType[types[value.name].removeprefix("tensor(").removesuffix(")").upper()])


def _with_shapes_as_outputs(model: ir.Model, values: Sequence[ir.Value]) -> tuple[ir.Model, list[str]]:
    """A copy of the graph whose outputs are these values and their shapes; and the names of the shapes."""
    copy, used = model.clone(), value_names(model)
    results = {value.name: value for node in copy.graph for value in node.outputs}
    own = [results[value.name] for value in values]
    nodes = [ir.node("Shape", [value]) for value in own]
    shapes = [node.outputs[0] for node in nodes]
    for shape in shapes:
        shape.name = unused_name("shape", used)
    copy.graph.extend(nodes)
    copy.graph.outputs.clear()
    copy.graph.outputs.extend([*own, *shapes])
    return copy, [str(shape.name) for shape in shapes]


def _symbols_by_sizes(model: ir.Model, cases: Sequence[Arrays]) -> dict[SizesByCase, str | None]:
    """The symbol of the inputs' dimensions that has these sizes; None where several have them."""
    found: dict[SizesByCase, str | None] = {}
    for value in model.graph.inputs:
        arrays = [case[value.name] for case in cases if value.name in case]
        if value.shape is None or len(arrays) < len(cases):
            continue
        for axis, size in enumerate(value.shape):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                sizes = tuple(array.shape[axis] for array in arrays)
                found[sizes] = size.value if found.get(sizes, size.value) == size.value else None
    return found
