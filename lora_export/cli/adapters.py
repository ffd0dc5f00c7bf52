"""The commands on adapters and on existing files: inspect, check, convert, combine, extract, resize."""

from __future__ import annotations

from typing import Any

import click

from lora_export.cli.arguments import cli_command, print_document, print_wrote, wrote
from lora_export.cli.progress import shown
from lora_export.cli.verbosity import Verbosity, verbosity
from lora_export.errors import InputRefused, count, one_line
from lora_export.options.adapters import (
    CheckOptions,
    CombineOptions,
    ConvertOptions,
    ExtractOptions,
    InspectOptions,
    ResizeOptions,
)


@cli_command(InspectOptions, "inspect adapter")
@click.option("--all", "every", is_flag=True, help="Show every weight, and each place where a graph reads it.")
def inspect_command(every: bool, as_json: bool, **options: Any) -> None:
    """Show what PATH contains: an adapter, a checkpoint (folder or .safetensors), an .onnx, an .onnx_adapter or
    a .pte.

    Of a graph or a .pte, shows what it takes to use it: inputs, outputs, adapters and their ids, base, and the verdict
    that it was published with. Reads headers, and the tensors of an adapter; with a base, the weights of both. Runs
    nothing.
    """
    from lora_export.api.inspect import inspect
    from lora_export.cli.inspection import inspection_document, inspection_lines
    from lora_export.report.console import console
    from lora_export.report.screens import print_adapter

    found = inspect(**options)
    every = every or verbosity() is Verbosity.FULL
    if as_json:
        print_document(inspection_document(found))
    elif found.adapter is not None and every:
        print_adapter(console(), found.adapter)
    else:
        lines = list(inspection_lines(found, every=every))
        click.echo("\n".join(map(one_line, lines[:1] if verbosity() is Verbosity.QUIET else lines)))


@cli_command(CheckOptions, "check adapter --base base --for vllm", "check adapter --for vllm --with max-lora-rank=64")
def check_command(as_json: bool, **options: Any) -> None:
    """Show what a runtime will refuse, drop in silence or run at another strength, and what repairs it.

    Every finding names the version and the file of the runtime in which its rule was read. Nothing is run. Ends with
    exit code 3 where there is a finding.
    """
    from lora_export.api.check import check
    from lora_export.preflight.rules import check_lines
    from lora_export.report.json_document import as_dict

    result = check(**options)
    if as_json:
        print_document(as_dict(result) | {"fits": bool(result)})
    else:
        click.echo("\n".join(map(one_line, check_lines(result.outcomes, every=verbosity() is not Verbosity.QUIET))))
    if not result:
        titles = ", ".join(outcome.title for outcome in result.outcomes if outcome.findings)
        raise InputRefused(f"{result.adapter} is not run as it was trained by {titles}")


@cli_command(
    ConvertOptions,
    "convert de -o de.onnx_adapter --for served.onnx",
    "convert de -o de-mlx --to mlx",
    "convert de -o low --to peft --as lora --rank 16",
)
def convert_command(as_json: bool, **options: Any) -> None:
    """Convert ADAPTER to another format, or for an existing graph: next week's adapter, without another export.

    What the format cannot express is refused by name, and no tensor is rounded. PyTorch is not needed.

    With --for, every tensor of the adapter needs an input of its shape and type in the graph, and the graph has to be
    unchanged since it was made. Both are checked before anything is written.
    """
    from lora_export.adapters.low_rank import total_share
    from lora_export.api.convert import convert
    from lora_export.report.console import console
    from lora_export.report.json_document import plain
    from lora_export.report.screens import print_shares

    result = convert(**options)
    output, to, is_for_graph = result.output, options["to"], "graph" in options
    shares = {"layers": plain(result.layers), "share": total_share(result.layers)} if result.layers else {}
    if as_json and is_for_graph:
        print_document(
            {"output": str(output), "weights": result.weights, "of": result.of, "base": result.base, **shares}
        )
    elif as_json:
        print_document(
            {"output": str(output), "to": to, "pairs": result.weights, "notes": list(result.notes), **shares}
        )
    elif result.layers:
        print_shares(console(), output, result.layers, whole=verbosity() is Verbosity.FULL)
    elif is_for_graph:
        wrote(output, f": an adapter for {result.weights} of {result.of} weights")
    else:
        print_wrote(output, f": {count(result.weights, 'pair')} in the format {to}")


@cli_command(CombineOptions, "combine fr de -o both --weight 0.7 --weight 0.3")
def combine_command(as_json: bool, **options: Any) -> None:
    """Combine adapters into one PEFT adapter, exactly or as PEFT's add_weighted_adapter does.

    The exact sum (cat) has the sum of all ranks; `lora-export resize` makes it smaller. No base and no PyTorch are
    needed. `lora-export merge --combine` merges the same combination.
    """
    from lora_export.api.adapters import combine

    result = combine(**options)
    if as_json:
        figures = {"modules": result.modules, "shared": result.shared, "largest_rank": result.largest_rank}
        print_document({"output": str(result.output), **figures, "notes": list(result.notes)})
    else:
        pairs = f"{count(result.modules, 'pair')} of rank {result.largest_rank} or less"
        counts = f"{pairs}, {result.shared} from several adapters"
        print_wrote(result.output, f": {counts}")


@cli_command(ExtractOptions, "extract base tuned -o adapter --rank 16")
def extract_command(as_json: bool, **options: Any) -> None:
    """Write the adapter of what TUNED changed in BASE: a pair for each matrix, by an SVD of the difference.

    Both are Hugging Face folders or .safetensors files. Norms and biases that differ are saved whole. What an adapter
    cannot hold is refused by name. PyTorch is not needed, and memory does not grow with the size of the model.
    """
    with shown() as on_progress:
        from lora_export.api.adapters import extract

        result = extract(on_progress=on_progress, **options)
    _show_shares(result, result.whole, as_json=as_json)


@cli_command(ResizeOptions, "resize fr -o small --energy 0.95")
def resize_command(as_json: bool, **options: Any) -> None:
    """Write ADAPTER with a lower rank: the best pair of that rank for each layer, by an exact SVD.

    The share of each layer's change that is left is reported. The output is a PEFT adapter. No base and no PyTorch
    are needed.
    """
    from lora_export.api.adapters import resize

    _show_shares(resize(**options), as_json=as_json)


def _show_shares(result: Any, whole: tuple[str, ...] = (), *, as_json: bool) -> None:
    """Print what an adapter of lower rank holds of each layer. `whole` are the tensors that it saves whole."""
    from lora_export.report.console import console
    from lora_export.report.json_document import as_dict
    from lora_export.report.screens import print_shares

    if as_json:
        print_document(as_dict(result))
    else:
        print_shares(console(), result.output, result.layers, whole, whole=verbosity() is Verbosity.FULL)
