"""`lora-export inspect`: show what an adapter, a checkpoint or a graph holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_export.cli.arguments import json_option
from lora_export.errors import InputRefused, one_line, printable

if TYPE_CHECKING:
    from lora_export.graph.sites import Site, Sites


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    help="The checkpoint that an .onnx was made of: names its weights by their content, and checks other names.",
)
@click.option("--check", is_flag=True, help="Read every file of a merged folder and compare it with its manifest.")
@json_option
def command(path: Path, base: Path | None, check: bool, as_json: bool) -> None:
    """Show what PATH holds: an adapter, a checkpoint (a folder or .safetensors), an .onnx graph or an .onnx_adapter.

    Reads headers, and an adapter's tensors; with --base, the weights of both. Runs nothing.
    """
    from lora_export import formats, report
    from lora_export.storage.manifest import damage
    from lora_export.weights.checkpoint import open_checkpoint

    if not path.exists():
        raise InputRefused(f"there is nothing at {path}")
    if base is not None and path.suffix != ".onnx":
        raise click.UsageError("--base names the weights of an .onnx file")
    if check:
        damaged = damage(path)
        if damaged:
            raise InputRefused(f"{path} is not what was written:\n" + "\n".join(f"  {line}" for line in damaged))
    if formats.recognised(path):
        adapter = formats.load(path)
        if as_json:
            click.echo(json.dumps(report.as_dict(adapter)))
        else:
            report.print_adapter(report.console(), adapter)
        return
    if path.suffix == ".onnx_adapter":
        _show_onnx_adapter(path, as_json=as_json)
        return
    if path.suffix == ".onnx":
        from lora_export.graph import onnx_file as graph_files
        from lora_export.graph import sites

        found = sites.find(graph_files.load(path), open_checkpoint(base) if base is not None else None)
        if as_json:
            click.echo(json.dumps(_as_document(found)))
        else:
            click.echo("\n".join(map(one_line, _as_lines(found))))
        return
    checkpoint = open_checkpoint(path)
    if as_json:
        click.echo(json.dumps({"tensors": [report.as_dict(spec) for spec in checkpoint.specs]}))
        return
    click.echo(printable(f"{len(checkpoint.specs)} tensors, {checkpoint.nbytes:,} bytes"))
    for spec in checkpoint.specs:
        click.echo(one_line(f"  {spec.name}  {' x '.join(map(str, spec.shape))} {spec.dtype}"))


def _show_onnx_adapter(path: Path, *, as_json: bool) -> None:
    from lora_export.formats import onnx_adapter

    held = onnx_adapter.read(path)
    parameters = {
        name: {"shape": value.shape(), "type": value.data_type()} for name, value in sorted(held.values.items())
    }
    if as_json:
        versions = {"model_version": held.model_version, "adapter_version": held.adapter_version}
        click.echo(json.dumps({"format": "onnx_adapter", **versions, "parameters": parameters}))
        return
    click.echo(
        f"{len(parameters)} parameters for the base {held.model_version}, from the adapter {held.adapter_version}"
    )
    for name, there in parameters.items():
        click.echo(one_line(f"  {name}  {' x '.join(map(str, there['shape']))} {there['type']}"))


def _as_lines(found: Sites) -> Iterator[str]:
    """A graph's weights: what could not be named, and each place where a parameter is read."""
    from lora_export.graph.sites import place

    yield from str(found).split("\n")
    specs = {spec.name: spec for spec in found.specs}
    for name, there in found.by_name.items():
        yield f"  {name}  {' x '.join(map(str, specs[name].shape))} {specs[name].dtype}"
        for site in there:
            facts = [place(site), f"lies {site.layout}" if site.is_linear else "", f"named by {site.how}"]
            facts += [f"{site.quantised.kind}, computes in {site.dtype}" if site.quantised is not None else ""]
            facts += [f"[{site.block.start}:{site.block.stop}] of {site.value.name}" if site.block is not None else ""]
            yield f"    {', '.join(filter(None, facts))}"


def _as_document(found: Sites) -> dict[str, Any]:
    from lora_export import report
    from lora_export.graph.sites import tried

    return {
        "tensors": [report.as_dict(spec) for spec in found.specs],
        "sites": [_site(site) for there in found.by_name.values() for site in there],
        "unnamed": [_site(site) | {"tried": list(tried(site)), "equals": list(site.equals)} for site in found.unnamed],
        "notes": list(found.notes),
    }


def _site(site: Site) -> dict[str, Any]:
    return {
        "name": site.name,
        "how": site.how,
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
