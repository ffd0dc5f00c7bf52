"""`lora-export inspect`: show what an adapter, a checkpoint or a graph holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_export.cli.arguments import Command, json_option, print_document
from lora_export.errors import one_line, printable

if TYPE_CHECKING:
    from lora_export.formats.onnx_adapter import OnnxAdapter
    from lora_export.graph.find_sites import Sites
    from lora_export.graph.site import Site
    from lora_export.weights.checkpoint import Checkpoint

EXAMPLE = """\b
Example:
  lora-export inspect adapter"""


@click.command(cls=Command, epilog=EXAMPLE)
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--base",
    "checkpoint",
    type=click.Path(path_type=Path),
    help="Checkpoint that an .onnx was exported from. Names its weights by content, and checks other names.",
)
@click.option("--check", is_flag=True, help="Read every file of a merged folder, and compare it with the manifest.")
@json_option
def command(path: Path, checkpoint: Path | None, check: bool, as_json: bool) -> None:
    """Show what PATH contains: an adapter, a checkpoint (folder or .safetensors), an .onnx or an .onnx_adapter.

    Reads headers, and the tensors of an adapter. With --base, the weights of both are read. Runs nothing.
    """
    from lora_export import report
    from lora_export.api.inspect import inspect

    found = inspect(path, checkpoint=checkpoint, check=check)
    if found.adapter is not None:
        if as_json:
            print_document(report.as_dict(found.adapter))
        else:
            report.print_adapter(report.console(), found.adapter)
    elif found.onnx_adapter is not None:
        _show_onnx_adapter(found.onnx_adapter, as_json=as_json)
    elif found.graph is not None:
        if as_json:
            print_document(_graph_as_document(found.graph))
        else:
            click.echo("\n".join(map(one_line, _lines_of_graph(found.graph))))
    elif found.checkpoint is not None:
        _show_checkpoint(found.checkpoint, as_json=as_json)


def _show_checkpoint(checkpoint: Checkpoint, *, as_json: bool) -> None:
    from lora_export import report

    if as_json:
        print_document({"tensors": [report.as_dict(spec) for spec in checkpoint.specs]})
        return
    click.echo(printable(f"{len(checkpoint.specs)} tensors, {checkpoint.nbytes:,} bytes"))
    for spec in checkpoint.specs:
        facts = ["stored (in, out)" if spec.layout == "in_out" else "", *(f"also {name}" for name in spec.aliases)]
        text = f"  {spec.name}  {' x '.join(map(str, spec.shape))} {spec.dtype}"
        click.echo(one_line(", ".join(filter(None, (text, *facts)))))
    unknown = sum(spec.layout == "unknown" and len(set(spec.shape)) == 1 for spec in checkpoint.specs)
    if unknown:
        click.echo(
            f"the layout of {unknown} square matrices is unknown: a merge needs --layout, or an adapter that records it"
        )


def _show_onnx_adapter(adapter: OnnxAdapter, *, as_json: bool) -> None:
    parameters = {
        name: {"shape": value.shape(), "type": value.data_type()} for name, value in sorted(adapter.values.items())
    }
    versions = {"model_version": adapter.model_version, "adapter_version": adapter.adapter_version}
    if as_json:
        print_document({"format": "onnx_adapter", **versions, "parameters": parameters})
        return
    click.echo(
        f"{len(parameters)} parameters for the base {adapter.model_version}, from the adapter {adapter.adapter_version}"
    )
    for name, parameter in parameters.items():
        click.echo(one_line(f"  {name}  {' x '.join(map(str, parameter['shape']))} {parameter['type']}"))


def _lines_of_graph(found: Sites) -> Iterator[str]:
    """A graph's weights: what could not be named, and each place where a parameter is read."""

    yield from str(found).split("\n")
    specs = {spec.name: spec for spec in found.specs}
    for name, sites in found.by_name.items():
        yield f"  {name}  {' x '.join(map(str, specs[name].shape))} {specs[name].dtype}"
        for site in sites:
            facts = [site.location, f"stored {site.layout}" if site.is_linear else "", f"named by {site.named_by}"]
            facts += [f"{site.quantised.kind}, computes in {site.dtype}" if site.quantised is not None else ""]
            facts += [f"[{site.block.start}:{site.block.stop}] of {site.value.name}" if site.block is not None else ""]
            yield f"    {', '.join(filter(None, facts))}"


def _graph_as_document(found: Sites) -> dict[str, Any]:
    from lora_export import report
    from lora_export.graph.names.exporter_names import naming_attempts

    return {
        "tensors": [report.as_dict(spec) for spec in found.specs],
        "sites": [_site(site) for sites in found.by_name.values() for site in sites],
        "unnamed": [
            _site(site) | {"tried": list(naming_attempts(site)), "equals": list(site.equal_tensors)}
            for site in found.unnamed
        ],
        "notes": list(found.notes),
    }


def _site(site: Site) -> dict[str, Any]:
    return {
        "name": site.name,
        "how": site.named_by,
        "operator": site.node.op_type,
        "node": site.node.name,
        "input": site.index,
        "initializer": site.value.name,
        "layout": site.layout,
        "shape": list(site.shape),
        "dtype": site.dtype,
        "stored_as": site.tensor.dtype.name.lower(),
        "block": None if site.block is None else [site.block.start, site.block.stop],
        "quantised": None if site.quantised is None else site.quantised.kind,
        "obstacle": site.obstacle,
    }
