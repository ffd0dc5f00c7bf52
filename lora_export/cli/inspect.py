"""`lora-export inspect`: show what an adapter, a checkpoint or a graph contains."""

from __future__ import annotations

from typing import Any

import click

from lora_export.cli.arguments import Command, json_option, print_document
from lora_export.cli.parameters import takes_options
from lora_export.cli.verbosity import Verbosity, verbosity
from lora_export.errors import one_line
from lora_export.options.adapters import InspectOptions

EXAMPLE = """\b
Example:
  lora-export inspect adapter"""


@click.command(cls=Command, epilog=EXAMPLE)
@takes_options(InspectOptions)
@click.option("--all", "every", is_flag=True, help="Show every weight, and each place where a graph reads it.")
@json_option
def command(every: bool, as_json: bool, **options: Any) -> None:
    """Show what PATH contains: an adapter, a checkpoint (folder or .safetensors), an .onnx or an .onnx_adapter.

    Of a graph, shows what it takes to use it: inputs, outputs, adapters and their ids, base, and the verdict that it
    was published with. Reads headers, and the tensors of an adapter. With --base, the weights of both are read. Runs
    nothing.
    """
    from lora_export.api.inspect import inspect
    from lora_export.cli.inspection import inspection_document, inspection_lines
    from lora_export.report.adapter_screen import print_adapter
    from lora_export.report.console import console

    found = inspect(**options)
    every = every or verbosity() is Verbosity.FULL
    if as_json:
        print_document(inspection_document(found))
    elif found.adapter is not None and every:
        print_adapter(console(), found.adapter)
    else:
        lines = list(inspection_lines(found, every=every))
        shown = lines[:1] if verbosity() is Verbosity.QUIET else lines
        click.echo("\n".join(map(one_line, shown)))
