"""ONNX files from a PyTorch model: export the base, put the adapters into its graphs, prove them against PyTorch."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lora_export import layers, plan
from lora_export.api.adapted_model import adapted_model
from lora_export.api.genai_config import genai_config
from lora_export.api.generation_files import GENAI_CONFIG, shorten_genai_config, write_generation_files
from lora_export.api.generation_task import generating_model, graph_files
from lora_export.api.kept_graph import exported_once
from lora_export.api.load_model import model_paths, shared_model
from lora_export.api.memory_needs import is_large_folder, is_read_when_needed, require_memory_to_export
from lora_export.api.onnx_request import OnnxRequest, OnnxResult
from lora_export.api.onnx_steps import (
    Located,
    base_outputs,
    insert_and_save,
    laid,
    locate_steps,
    prove_all,
    record_in,
    write_graph,
)
from lora_export.api.publish import prove_trace, record_of_model
from lora_export.api.shared_head import stored_in_module
from lora_export.artifacts.files import EMBEDDING_FILE
from lora_export.callbacks import each_once, ignore, note_each
from lora_export.errors import MatchError, RuntimeRefused, first_line
from lora_export.graph.find_sites import find_sites
from lora_export.graph.interface import precision_of
from lora_export.graph.merge.fold import fold_graph
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.onnx_file.writing import append_metadata
from lora_export.graph.quantised.quantise import quantise_graph
from lora_export.graph.tied_tables import without_unread_rows
from lora_export.graph.unread_layers import not_in_graph, notes_on_unread
from lora_export.graph.values import drop_tensors
from lora_export.layers.module_tensors import dtype_name
from lora_export.lora import Adapter
from lora_export.models import export
from lora_export.models.cached_decoder import cache_as_remedy, export_decoder, takes_one_token
from lora_export.models.encoder_decoder import export_encoder_decoder
from lora_export.models.image_parts import image_parts, without_image_pairs
from lora_export.models.image_text import export_image_text
from lora_export.models.model import Model
from lora_export.models.stored_parameter import is_streamed
from lora_export.models.traced_lengths import OF_TEXTS, longest_traced
from lora_export.options.export import IMAGE_TEXT_TO_TEXT, TEXT_GENERATION
from lora_export.options.spelling import named
from lora_export.plan import Plan, TensorSpec
from lora_export.runtime.memory import release_memory
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.module_copies import fp64_bytes
from lora_export.verification.proof_session import ProofSession
from lora_export.weights.merge_report import MIN_RETENTION, refuse_below_rounding


def export_from_model(options: OnnxRequest) -> OnnxResult:
    """See `export_onnx`."""
    source = options.model
    with options.staged(model_paths(source)) as folder, options.sharing(folder) as given:
        require_memory_to_export(source, options.dtype)
        options.stage("loading the model")
        # The exported weights of a large folder are freed before the proof, which reads them.
        base = _model(None if is_large_folder(source) else options.session, options)
        if options.task:
            base = generating_model(base, options.task, options.on_message)
        adapted = adapted_model(base, given.adapters, given.weights, given, given.on_message)
        base, adapters = adapted.model, adapted.adapters
        if options.task == TEXT_GENERATION:
            base, adapters = without_image_pairs(base, adapters, given.on_message)
        options = replace(given, adapters=adapters, weights=adapted.strengths)
        del adapted  # it holds the weights
        options = options.without_head(layers.specs(base.module), stored_in_module(base.module))
        future = future_adapters(base, options)
        check_fit(base, options, future)
        base = without_changed_ties(base, options)
        options.stage("exporting the base")
        base, graphs, why_text_only = _exported(base, options)
        if options.lora != "merged":
            for name, program in graphs.items():
                quantise(program, replace(options, output=options.output.with_name(name)))
            del program
        references = PyTorchReferences(
            base,
            user_inputs=options.inputs,
            device=options.provider,
            has_own_heads=options.has_own_heads,
            session=options.session,
        )
        before = base_outputs(list(graphs.values()), references, options)
        if read := _read_when_needed(given, why_text_only):
            base = without_changed_ties(read, replace(options, on_message=ignore))
            references = replace(references, model=base)
            release_memory()  # of the weights that the graph does not share
        names = list(graphs)
        with _naming(why_text_only):
            plan, companions = write_graphs(base, graphs, options, future, folder)
        path = folder / options.output.name
        written = load_graph(path)
        beside = _write_generation_files(base, written, options, folder) if options.task else []
        precision = precision_of(find_sites(written))

        def state(properties: Mapping[str, str]) -> None:
            for name in names:
                append_metadata(folder / name, properties)
            shorten_genai_config(folder, longest_traced(references.model).get(OF_TEXTS))

        prove = functools.partial(prove_all, path, references, options, before) if options.verify else None
        proofs = prove_trace(references.model, prove, state, options.on_message)
        dtype = dtype_name(ModuleRunner(base.module).dtype)
        settings = {**options.form_settings, "opset": options.opset, "dtype": dtype, **options.settings}
        settings |= {"stored": precision.stored, "computed": precision.computed} if precision else {}
        chosen: dict[str, Any] = {"task": options.task, "fuse": options.fuse, "quantize": options.quantize}
        settings |= {name: value for name, value in chosen.items() if value}
        record = record_of_model(base, given.adapters, given.weights, settings)
        for name in names:
            record_in(folder / name, record, proofs)
    files = (options.output, *(options.output.parent / name for name in (*companions, *beside)))
    return OnnxResult(options.output, files, proofs, plan, precision)


def _model(session: ProofSession | None, options: OnnxRequest, *, streamed: bool = False) -> Model:
    """The model to export, or to prove against; that of the session, where there is one."""
    taken, dtype, inputs = options.without_own_heads, options.dtype, options.inputs
    return shared_model(session, options.model, taken, dtype=dtype, inputs=inputs, export=True, streamed=streamed)


def _read_when_needed(options: OnnxRequest, why_text_only: str) -> Model | None:
    """The model of a large folder for the proof, which only reads its weights; None for any other model.

    The one that was exported can then be freed, and each of its weights when the merged one takes its place.
    """
    if not options.verify or not is_large_folder(options.model):
        return None
    session = options.session if is_read_when_needed(options.model, options.dtype) else None
    base = _model(session, options, streamed=True)
    if not is_streamed(base.module):
        return None
    adapted = adapted_model(base, options.adapters, options.weights, options, ignore)
    if options.task:
        base = generating_model(adapted.model, options.task, ignore)
        return without_image_pairs(base, adapted.adapters, ignore)[0] if options.task == TEXT_GENERATION else base
    return adapted.model.without_images(why_text_only) if why_text_only else adapted.model


def _exported(base: Model, options: OnnxRequest) -> tuple[Model, dict[str, ir.Model], str]:
    """The model with the inputs of its graphs, and the graphs by the names of their files, the output's first.

    Where the exporter refuses the images of texts, they have none, and the third value is the reason.
    """
    name = options.output.name
    if files := graph_files(options.task):
        export_parts = export_image_text if options.task == IMAGE_TEXT_TO_TEXT else export_encoder_decoder
        graphs = _kept(base, options, lambda: export_parts(base, opset=options.opset))
        return base, dict(zip(files, graphs, strict=True)), ""
    if options.task:
        (graph,) = _kept(base, options, lambda: [export_decoder(base.module, opset=options.opset)])
        return base, {name: graph}, ""
    try:
        return base, {name: _graph_of(base, options)}, ""
    except RuntimeRefused as error:
        if base.text_only is None:
            raise
        why = first_line(error)
        base = base.without_images(why)
        options.on_message(f"note: the graph takes texts without images. With images, {why}")
    return base, {name: _graph_of(base, options)}, why


def _graph_of(base: Model, options: OnnxRequest) -> ir.Model:
    def exported() -> list[ir.Model]:
        with cache_as_remedy(base.module):
            return [export.to_onnx(base.module, base.example_inputs(), axes=base.axes, opset=options.opset)]

    (graph,) = _kept(base, options, exported)
    return graph


def _kept(base: Model, options: OnnxRequest, exported: Callable[[], Sequence[ir.Model]]) -> Sequence[ir.Model]:
    """The graphs of a model: exported, or kept from an export of the same one."""
    if options.graphs is None:
        return exported()
    return exported_once(options.graphs, base, [options.task, options.opset], exported)


def _write_generation_files(base: Model, written: ir.Model, options: OnnxRequest, folder: Path) -> list[str]:
    """Write what is needed to generate with the graphs, of which the first is given; return the names."""
    module: Any = base.module
    genai = None
    if not options.has_parts:
        may_share = options.fuse == "cpu"  # the only provider for which a fused graph was run with a shared buffer
        name = options.output.name
        genai = genai_config(written, module.config, module.generation_config, name, may_share=may_share)
        if takes_one_token(written):
            options.on_message(
                "note: the graph takes one token of each text in a run, also of a prompt: it keeps a state"
            )
    if genai is None and not options.has_parts:
        options.on_message(
            f"note: no {GENAI_CONFIG} is written: it cannot state such a cache, whose tensors have different sizes"
        )
    return write_generation_files(
        Path(base.source), options.output, folder, genai, options.on_message, overwrite=options.overwrite
    )


@contextlib.contextmanager
def _naming(why_text_only: str) -> Iterator[None]:
    """Add to a MatchError why the graph has no weights for images."""
    try:
        yield
    except MatchError as error:
        if not why_text_only:
            raise
        raise error.with_remedy(
            f"The graph takes texts without images, and lacks the weights for them: {why_text_only}"
        ) from error


def future_adapters(base: Model, options: OnnxRequest) -> list[Adapter]:
    """An adapter without effect at the layers of `target`; none where no layer was named."""
    targets: Any = options.targets
    if targets is None:
        return []
    linear: dict[str, Any] = {"rank": 1, "alpha": 1.0, "seed": 0, "name": "target", "linear_only": True}
    linear["exclude"] = image_parts(base)
    return [layers.create_adapter(base.module, targets=targets, **linear)]


def check_fit(base: Model, options: OnnxRequest, future: list[Adapter]) -> None:
    """Raise InputRefused for what cannot fit the graph because it does not fit the module."""
    specs = layers.specs(base.module)
    if options.adapters:
        layers.refuse_tied(base.module, options.plan(specs))
    if future:
        layers.refuse_tied(base.module, plan.make(future, specs, identity_ok=True))


def without_changed_ties(base: Model, options: OnnxRequest) -> Model:
    """The model with tensors of their own for names that adapters change otherwise: a graph stores tied ones once."""
    steps = options.plan(layers.specs(base.module)) if options.adapters else None
    if steps is None or not layers.has_changed_ties(base.module, steps):
        return base
    module = copy.deepcopy(base.module)
    untied = layers.untie(module, steps, keep_equal=True)
    if not untied:
        return base
    options.on_message(
        f"note: {', '.join(untied)} is tied to another tensor in the model, and a tensor of its own here"
    )
    return replace(base, module=module)


def write_graphs(
    base: Model, graphs: dict[str, ir.Model], options: OnnxRequest, future: list[Adapter], folder: Path
) -> tuple[Plan | None, list[str]]:
    """Write the graphs with their adapters; return where these landed, and the names of the files beside the output.

    Empties `graphs`, so that each is freed when it is written. Raises MatchError where no graph has a weight that
    the adapters change.
    """
    whole = layers.specs(base.module)
    options = replace(options, on_message=each_once(options.on_message))
    beside, found = [], set[str]()
    for name in list(graphs):
        own = replace(options, output=options.output.with_name(name))
        program = graphs.pop(name)
        located, files = write_with_adapters(program, own, future, folder, whole=whole)
        result = located.plan if located else None
        found.update(_changed(located) if located else ())
        beside += [*files, *([] if own.output == options.output else [name])]
        drop_tensors(program)
        del program, located  # the sites refer to the graph
        release_memory(of=fp64_bytes(base.module))
    if options.has_parts:
        options = replace(options, adapters=[without_unread_rows(one, found) for one in options.adapters])
        result = options.plan(whole) if options.adapters else None
        steps = [
            *(result.steps if result else ()),
            *(plan.make(future, whole, identity_ok=True).steps if future else ()),
        ]
        unread = [step for step in steps if found.isdisjoint((step.weight, *step.spec.aliases))]
        note_each(options.on_message, notes_on_unread(unread, planned=steps))
    return result, beside


def _changed(located: Located) -> list[str]:
    """The weights of a graph that adapters change, or future ones may."""
    return [*(step.weight for step in (located.plan.steps if located.plan else ())), *located.targets]


def _with_targets(
    located: Located, options: OnnxRequest, future: list[Adapter], whole: Sequence[TensorSpec]
) -> Located:
    """The same, with those weights beside which the graph takes future adapters."""
    if not future:
        return located
    steps, lost = laid(functools.partial(plan.make, future, identity_ok=True), located.sites, whole)
    if lost and not options.has_parts and options.targets != "all-linear":
        way = f"No output reads them for the inputs of the export: leave them out of {named('target')}"
        raise not_in_graph(lost, way, planned=[*steps.steps, *lost])
    return located._replace(targets=[step.weight for step in steps.steps])


def write_with_adapters(
    program: ir.Model, options: OnnxRequest, future: list[Adapter], folder: Path, *, whole: Sequence[TensorSpec] = ()
) -> tuple[Located | None, list[str]]:
    """Write the graph with its adapters; return where they landed, and the names of the files beside it.

    `whole` are the weights of the model, of which the graph may have some only.
    """
    located = locate_steps(program, options, None, whole=whole) if options.adapters or future else None
    if located is not None and located.plan is not None and not options.has_parts:
        planned = [*located.plan.steps, *located.elsewhere]
        note_each(options.on_message, notes_on_unread(located.elsewhere, planned=planned))
    located = located and _with_targets(located, options, future, whole)
    # Otherwise all that the adapters change is in other graphs.
    is_changed = located is not None and bool(_changed(located))
    if located is not None and is_changed and options.lora != "merged":
        return located, insert_and_save(program, located, options, located.targets, folder)
    if options.lora == "merged":
        if located is not None and located.plan is not None and is_changed:
            options.stage("folding the adapters in")
            refuse_below_rounding(fold_graph(program, located.sites, located.plan), MIN_RETENTION)
        quantise(program, options)
    return located, write_graph(program, options, folder)


def quantise(program: ir.Model, options: OnnxRequest) -> None:
    """Quantise the linear layers of the graph where the options name a kind. That of an embedding has none."""
    if options.quantize is None or (options.has_parts and options.output.name == EMBEDDING_FILE):
        return
    options.stage(f"quantising to {options.quantize}")
    note_each(options.on_message, quantise_graph(program, options.quantize))
