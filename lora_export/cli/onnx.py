"""`lora-export onnx`: a model, or a graph made elsewhere, with adapters into one ONNX file."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_export.cli.arguments import (
    TakesAdapters,
    dtype_option,
    provider_option,
    publishing_options,
    say,
    wrote,
)

if TYPE_CHECKING:
    from lora_export.cli.weaving import Order, Say, Source
    from lora_export.verification.references import References


@click.command(cls=TakesAdapters)
@click.argument("model")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="OUT.onnx",
    help="The file to publish once it is proven.",
)
@publishing_options("merged", "nodes", "inputs", "rows")
@click.option(
    "--target",
    metavar="NAMES|all-linear",
    help="With --lora inputs: where adapters to come may stand, beside those given: endings of module names, with "
    "commas, or every linear layer but the output head.",
)
@click.option(
    "--dora",
    is_flag=True,
    help="With --lora inputs: adapters to come may have DoRA at all these places; each takes its factor too.",
)
@click.option(
    "--names",
    type=click.Choice(["olive", "genai", "peft"]),
    default="olive",
    show_default=True,
    help="With --lora inputs: whose conventions the inputs' names follow.",
)
@click.option("--opset", type=click.IntRange(min=18), help="The ONNX operator set (default: the exporter's).")
@click.option(
    "--base",
    "checkpoint",
    type=click.Path(path_type=Path),
    metavar="CHECKPOINT",
    help="What an .onnx MODEL was made from: names its weights by content where their names are lost.",
)
@click.option(
    "--model",
    "reference",
    metavar="MODEL",
    help="The PyTorch model that an .onnx MODEL was made from: prove the result against it, not against the graph.",
)
@dtype_option
@provider_option
def command(
    model: str,
    output: Path,
    adapters: tuple[str, ...],
    weights: tuple[float, ...],
    mode: str,
    inputs_file: Path | None,
    target: str | None,
    dora: bool,
    names: str,
    opset: int | None,
    checkpoint: Path | None,
    reference: str | None,
    dtype: str,
    provider: str,
    no_verify: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Put adapters into an ONNX graph of MODEL, prove it, and only then publish it.

    MODEL is a Hugging Face folder, `package.module:factory` or `file.py:factory`, which is exported once, in
    --dtype, with dynamic batch and sequence; or an .onnx file that was made elsewhere, quantised ones included,
    which needs no PyTorch and is its own measure unless --model names another. With --lora inputs the adapters
    stand beside the graph, each in its own NAME.onnx_adapter. With --lora rows the graph has the input
    `adapter_ids`, which is for each row of the batch 0 (the base) or an adapter's number, in the order in which
    they were given.
    """
    from lora_export import provenance
    from lora_export.api.callbacks import in_stages
    from lora_export.api.load import load_adapters, refuse_pt2
    from lora_export.cli import proving, weaving
    from lora_export.cli.progress import shown
    from lora_export.graph.onnx_file import append_metadata
    from lora_export.storage import atomic_output

    refuse_pt2(model)
    is_graph = model.endswith(".onnx")
    if mode != "inputs" and dora:
        raise click.UsageError("--dora is for --lora inputs; other graphs hold the adapters that they are given")
    _check_usage(
        mode, adapters, target, is_graph=is_graph, opset=opset, checkpoint=checkpoint, reference=reference, dtype=dtype
    )
    proving.require(provider)
    order = weaving.Order(mode, load_adapters(adapters), weights, target, names, dora)
    make_source = _maker(model, order, opset, checkpoint, reference, dtype)
    with (
        atomic_output.stage_file(
            output, inputs=proving.inputs_of(model, adapters), overwrite=overwrite, say=say
        ) as folder,
        shown() as on_progress,
    ):
        stage = in_stages(on_progress)
        stage("reading the graph" if is_graph else "loading the model")
        source = make_source()
        weaving.check(order)
        source.check()
        program = source.program(stage)
        prover = None
        if not no_verify:
            references = _references(source, order, reference, inputs_file, provider, dtype, stage)
            prover = weaving.Prover(order, references, provider, stage, Path(model) if is_graph else None)
            prover.look_at_base(program)
        companions = weaving.write(program, order, source, folder, output.name, stage)
        del program
        gc.collect()  # a graph is a ring, and its weights, which are in the file now, would stay through the proof
        proofs = prover.prove(folder / output.name) if prover else None
        record = source.record() | {"verdict": weaving.summary(proofs)}
        append_metadata(folder / output.name, {provenance.KEY: json.dumps(record)})
    written = [output, *(output.parent / name for name in companions)]
    if as_json:
        told = {"output": str(output), **weaving.document(proofs)}
        click.echo(json.dumps(told | ({"files": [str(path) for path in written]} if companions else {})))
        return
    weaving.show(proofs)
    for path in written:
        wrote(path)


def _check_usage(
    mode: str,
    adapters: tuple[str, ...],
    target: str | None,
    *,
    is_graph: bool,
    opset: int | None,
    checkpoint: Path | None,
    reference: str | None,
    dtype: str,
) -> None:
    if mode != "inputs" and target is not None:
        raise click.UsageError("--target is for --lora inputs; other graphs hold the adapters that they are given")
    if mode == "inputs" and not adapters and target is None:
        raise click.UsageError("--lora inputs needs an adapter (-a), or --target for those to come")
    if mode == "rows" and not adapters:
        raise click.UsageError("--lora rows needs the adapters that rows may choose from (-a)")
    if is_graph and not adapters and target is None:
        raise click.UsageError("MODEL is a graph already: give the adapters that are to be put into it (-a)")
    if is_graph and opset is not None:
        raise click.UsageError("--opset is for models that are exported; MODEL is a graph already")
    if not is_graph and (checkpoint, reference) != (None, None):
        raise click.UsageError("--base and --model are for an .onnx MODEL")
    if is_graph and reference is None and dtype != "float32":
        raise click.UsageError("--dtype is of the PyTorch model that is exported, or that --model names")
    if reference is not None and reference.endswith(".onnx"):
        raise click.UsageError("--model names a PyTorch model; without it a graph is proven against itself")


def _maker(
    model: str, order: Order, opset: int | None, checkpoint: Path | None, reference: str | None, dtype: str
) -> Callable[[], Source]:
    """What makes the source. All that may be missing here is imported at once, before there is an output to clear."""
    if not model.endswith(".onnx") or reference is not None:
        from lora_export.cli.exporting import FromModel
    if model.endswith(".onnx"):
        from lora_export.cli.given import FromGraph

        return lambda: FromGraph(Path(model), order, checkpoint)
    from lora_export.api.load import load_model

    return lambda: FromModel(load_model(model, order.adapters, dtype=dtype), order, opset)


def _references(
    source: Source, order: Order, reference: str | None, inputs_file: Path | None, provider: str, dtype: str, stage: Say
) -> References:
    """What the graph is proven against: the PyTorch model, or where there is none, the graph that it was made from."""
    from lora_export.cli import given

    if isinstance(source, given.FromGraph) and reference is None:
        from lora_export.verification.against_graph import BaseGraph, GraphReferences

        graph = source.graph
        return GraphReferences(BaseGraph(graph.path, graph.model, source.checkpoint, provider, inputs_file), order.mode)
    from lora_export.cli import exporting
    from lora_export.verification.against_pytorch import PyTorchReferences

    if isinstance(source, exporting.FromModel):
        return PyTorchReferences(source.base, user_inputs=inputs_file, device=provider)
    assert reference is not None
    stage("loading the model")
    from lora_export.api.load import load_model

    model = load_model(reference, order.adapters, dtype=dtype)
    return PyTorchReferences(model, user_inputs=inputs_file, device=provider)
