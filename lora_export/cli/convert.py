"""`lora-export convert`: an adapter into another format."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lora_export.cli.arguments import json_option, load_adapters, overwrite_option, say, split_name


@click.command()
@click.argument("adapter", metavar="[NAME=]ADAPTER")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="OUT.onnx_adapter",
    help="The file to write.",
)
@click.option(
    "--to", required=True, type=click.Choice(["onnx_adapter"]), expose_value=False, help="The format to write."
)
@click.option(
    "--for",
    "graph",
    required=True,
    type=click.Path(path_type=Path),
    metavar="MODEL.onnx",
    help="The graph that will run it, made by `onnx --lora inputs`.",
)
@click.option("--weight", type=float, default=1.0, show_default=True, help="Multiply the adapter's scale.")
@overwrite_option
@json_option
def command(adapter: str, output: Path, graph: Path, weight: float, overwrite: bool, as_json: bool) -> None:
    """Convert ADAPTER for a graph that is there already: next week's adapter, without exporting again.

    Every tensor of the adapter must have its place in the graph, in shape and type, and the graph must
    be as it was when it was made, before anything is written. Needs no PyTorch.
    """
    from lora_export import plan
    from lora_export.errors import InputRefused, MatchError, one_line
    from lora_export.formats import onnx_adapter
    from lora_export.graph.insert.inputs import contract_of, factors_of
    from lora_export.graph.onnx_file import load
    from lora_export.storage import atomic_output

    (loaded,) = load_adapters([adapter])
    onnx_adapter.refuse_what_no_input_carries([loaded])
    model = load(graph)
    contract = contract_of(model, graph)
    try:
        steps = plan.make([loaded], [place.spec for place in contract.places], strengths=[weight])
    except MatchError as error:
        raise InputRefused(
            f"{error}\n{graph} takes adapters at {len(contract.places)} places; a graph with others is made by "
            "`lora-export onnx --lora inputs --target NAMES`"
        ) from error
    for note in [*loaded.notes, *steps.notes]:
        say(f"note: {note}")
    onnx_adapter.refuse_dora_without_a_place(contract, steps)
    factors = factors_of(model, contract, steps, loaded.name)
    given = onnx_adapter.parameters(contract, steps, loaded.name, factors)
    places = [graph, split_name(adapter)[1]]
    with atomic_output.stage_file(output, inputs=places, overwrite=overwrite, say=say) as folder:
        onnx_adapter.write(folder / output.name, given, contract, sha256=loaded.sha256)
    taken = {contract.inputs[name].weight for name in given}
    told = {"output": str(output), "places": len(taken), "of": len(contract.places), "base": contract.base}
    if as_json:
        click.echo(json.dumps(told))
    else:
        click.echo(
            f"wrote {one_line(str(output))} ({output.stat().st_size:,} bytes): {told['places']} of {told['of']} places"
        )
