"""`lora-export inspect`: show what an adapter, a checkpoint or a graph holds."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lora_export.cli.arguments import json_option
from lora_export.errors import InputRefused, printable


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@json_option
def command(path: Path, as_json: bool) -> None:
    """Show what PATH holds: an adapter, a checkpoint (a folder or .safetensors), or an .onnx graph.

    Reads headers, and an adapter's tensors; runs nothing.
    """
    from lora_export import formats, report
    from lora_export.checkpoint import open_checkpoint

    if not path.exists():
        raise InputRefused(f"there is nothing at {path}")
    if formats.recognised(path):
        adapter = formats.load(path)
        if as_json:
            click.echo(json.dumps(report.as_dict(adapter)))
        else:
            report.print_adapter(report.console(), adapter)
        return
    if path.suffix == ".onnx":
        from lora_export.graph.files import load
        from lora_export.graph.sites import find

        sites = find(load(path))
        specs, told = sites.specs, str(sites)
    else:
        checkpoint = open_checkpoint(path)
        specs, told = list(checkpoint.specs), f"{len(checkpoint.specs)} tensors, {checkpoint.nbytes:,} bytes"
    if as_json:
        click.echo(json.dumps({"tensors": [report.as_dict(spec) for spec in specs]}))
        return
    click.echo(printable(told))
    for spec in specs:
        click.echo(f"  {printable(spec.name)}  {' x '.join(map(str, spec.shape))} {spec.dtype}")
