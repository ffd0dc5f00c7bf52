"""`lora-export merge`: adapters into a checkpoint's weights."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import click

from lora_export.cli import startup
from lora_export.cli.arguments import (
    adapter_weights,
    json_option,
    load_adapters,
    overwrite_option,
    say,
    split_name,
)
from lora_export.errors import InputRefused

if TYPE_CHECKING:
    from lora_export.lora import Adapter
    from lora_export.plan import Plan, TensorSpec
    from lora_export.weights.apply_step import Backend
    from lora_export.weights.checkpoint import Checkpoint
    from lora_export.weights.merge_report import MergeReport

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # owner/model
CACHED = "models--"  # a model's folder in the hub's cache: models--owner--model


@click.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("adapters", nargs=-1, required=True, metavar="[NAME=]ADAPTER...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Where the merged weights go.")
@adapter_weights
@click.option(
    "--dtype",
    type=click.Choice(["keep", "float32", "bfloat16", "float16"]),
    default="keep",
    show_default=True,
    help="Store every float tensor as this type.",
)
@click.option(
    "--min-retention",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Refuse when rounding leaves a weight less than this share of its change.",
)
@click.option(
    "--hash",
    "hashing",
    type=click.Choice(["xxh3_128", "sha256"]),
    default="xxh3_128",
    show_default=True,
    help="Record base and output by this hash; sha256 takes longer than the merge.",
)
@click.option(
    "--base",
    "origin",
    type=click.Path(path_type=Path),
    metavar="CHECKPOINT",
    help="What an .onnx BASE was made from: names its weights by content where their names are lost.",
)
@click.option(
    "--requantize",
    is_flag=True,
    help="Merge into quantised weights of an .onnx BASE too, and quantise the sum in the scheme that they have.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where weights are changed; cuda needs PyTorch, and is not known to be faster.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be done to which weight, and stop.")
@overwrite_option
@json_option
def command(
    base: Path,
    adapters: tuple[str, ...],
    output: Path,
    weights: tuple[float, ...],
    dtype: str,
    min_retention: float,
    hashing: str,
    origin: Path | None,
    requantize: bool,
    device: str,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Merge ADAPTERS into the weights of BASE: W' = W + Σ weight·scale·B·A, rounded once.

    BASE is a Hugging Face folder, a .safetensors file or an .onnx graph; the output is of the same kind,
    with the same layout. Needs no PyTorch, and memory does not grow with the model.
    """
    on_device = None if device == "cpu" else _gpu()
    with startup.brisk():
        from lora_export import plan, report
        from lora_export.cli.progress import byte_progress

        loaded = load_adapters(adapters)
        stored = None if dtype == "keep" else dtype
        if base.suffix == ".onnx":
            work = _over_graph(base, stored, origin, requantize=requantize)
        else:
            work = _over_checkpoint(base, loaded, stored, origin, requantize=requantize)
        steps = plan.make(loaded, work.specs, strengths=weights, may_add=work.may_add)
        work.check(steps)
    in_plan = () if dry_run else steps.notes  # a dry run prints the plan itself
    for note in [*(note for adapter in loaded for note in adapter.notes), *in_plan, *work.notes, *work.told(steps)]:
        say(f"note: {note}")
    if dry_run:
        if as_json:
            click.echo(json.dumps(report.as_dict(steps)))
        else:
            report.print_plan(report.console(), steps)
        return
    inputs = [base, *(split_name(adapter)[1] for adapter in adapters)]
    size = work.size(steps)
    with (
        on_device or contextlib.nullcontext() as backend,
        work.stage(output, inputs=inputs, overwrite=overwrite, needs=size, say=say) as folder,
        byte_progress("merging", size) as progress,
    ):
        ledger = work.carry_out(
            steps,
            folder,
            file_name=output.name,
            min_retention=min_retention,
            hashing=hashing,
            progress=progress,
            backend=backend,
        )
        if not ledger.replaced and not any(result.changed for result in ledger.results):
            raise InputRefused("the merge would change no entry of any weight: rounding takes all of it")
    if ledger.below_rounding:
        worst = min(ledger.below_rounding, key=lambda result: result.retention)
        say(
            f"warning: rounding took more than a tenth of their change from {len(ledger.below_rounding)} of "
            f"{len(ledger.results)} weights, most from {worst.weight} ({worst.retention:.0%} kept); {work.way_out}"
        )
    if as_json:
        click.echo(json.dumps({"output": str(output), **report.as_dict(ledger)}))
    else:
        report.print_merge_report(report.console(), ledger, output)


def _gpu() -> AbstractContextManager[Backend]:
    """The GPU, once it is known to answer: told before anything is read."""
    from lora_export.weights import cuda

    cuda.require_cuda()
    return cuda.cuda()


@dataclass(frozen=True)
class _Work:
    """What a merge needs of whatever holds the base."""

    specs: Sequence[TensorSpec]
    notes: Sequence[str]
    check: Callable[[Plan], None]  # raises what the holder cannot take, before anything big is read
    size: Callable[[Plan], int]  # bytes that will be written
    stage: Callable[..., AbstractContextManager[Path]]
    carry_out: Callable[..., MergeReport]
    told: Callable[[Plan], Iterable[str]] = lambda _: ()  # notes on a plan
    may_add: bool = False
    way_out: str = ""  # where rounding takes too much


def _over_checkpoint(
    base: Path, adapters: Sequence[Adapter], dtype: str | None, origin: Path | None, *, requantize: bool
) -> _Work:
    from lora_export.storage import atomic_output
    from lora_export.weights import merge
    from lora_export.weights.checkpoint import code_of_its_own, open_checkpoint

    if origin is not None:
        raise click.UsageError("--base is for an .onnx: a checkpoint's weights have their names")
    if requantize:
        raise click.UsageError("--requantize is for an .onnx: a quantised checkpoint is not merged into")
    checkpoint = open_checkpoint(base)
    list(checkpoint.companions())  # refuses links that lead elsewhere: before the work, not after it
    notes = list(_other_bases(adapters, checkpoint))
    if code := code_of_its_own(checkpoint.config):
        notes.append(f"the base's config names code of its own ({code}): it is copied, and was not run")
    notes += [f"{name} holds weights too, unmerged ones; it is left out" for name in checkpoint.left_out()]
    return _Work(
        specs=checkpoint.specs,
        notes=notes,
        check=lambda steps: merge.refuse_before_the_work(steps, checkpoint),
        size=lambda steps: merge.output_size(steps, checkpoint, dtype),
        stage=atomic_output.stage_folder if checkpoint.is_folder else atomic_output.stage_file,
        carry_out=lambda steps, folder, **rest: merge.merge_checkpoint(steps, checkpoint, folder, dtype=dtype, **rest),
        may_add=True,
        way_out="--dtype float32 keeps it",
    )


def _over_graph(base: Path, dtype: str | None, origin: Path | None, *, requantize: bool) -> _Work:
    from lora_export.graph.merge import merge_graph, refuse_before_the_work
    from lora_export.graph.onnx_file import open_graph
    from lora_export.graph.quantised.requantise import notes_on
    from lora_export.graph.sites import find
    from lora_export.storage import atomic_output, input_files
    from lora_export.weights.checkpoint import open_checkpoint

    if dtype:
        raise click.UsageError("--dtype is for checkpoints: a graph's weights keep the types that its nodes expect")
    input_files.must_exist(base, "base model")
    graph = open_graph(base)
    sites = find(graph.model, None if origin is None else open_checkpoint(origin))
    return _Work(
        specs=sites.specs,
        notes=sites.notes,
        check=lambda steps: refuse_before_the_work(steps, graph, sites, requantise=requantize),
        told=lambda steps: notes_on(steps, graph.model, sites) if requantize else (),
        size=lambda _: graph.nbytes,
        stage=atomic_output.stage_file,
        carry_out=lambda steps, folder, **rest: merge_graph(steps, graph, sites, folder, requantise=requantize, **rest),
        way_out="keep the adapter beside the weights (onnx MODEL.onnx --lora nodes)",
    )


def _other_bases(adapters: Sequence[Adapter], base: Checkpoint) -> Iterator[str]:
    """Adapters that name another model of the hub than this one is. No more than a doubt: names are not weights.

    A path, of whatever machine, tells nothing of what lies there.
    """
    folders = base.path.absolute().parts
    cached = (part.removeprefix(CACHED).replace("--", "/", 1) for part in folders if part.startswith(CACHED))
    own = [name for name in (*cached, base.config.get("_name_or_path")) if _is_of_the_hub(name)]
    known = {_model(name) for name in (*own, *folders)}
    for adapter in adapters:
        told = adapter.metadata.get("base_model_name_or_path")
        if own and _is_of_the_hub(told) and _model(told) not in known:
            yield f"{adapter.name} was made for {told}, the base is {own[0]}: shapes that agree prove nothing"


def _is_of_the_hub(name: object) -> TypeGuard[str]:
    return isinstance(name, str) and HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def _model(name: str) -> str:
    """A name without its owner: mirrors hold the same weights under theirs."""
    return name.rpartition("/")[2].casefold()
