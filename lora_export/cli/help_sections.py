"""The sections of a command's `--help`: options by what they are about."""

from __future__ import annotations

from collections.abc import Iterable

import click

from lora_export.options import combining, common, export, merge, reading, train, verify

OF_NO_SECTION = "Options"
ORDER = (
    *(OF_NO_SECTION, train.DATA, train.ADAPTER, train.FROZEN_BASE, train.STEPS, train.MEASUREMENTS),
    *(merge.BASE, merge.OUTPUT, export.GRAPH, common.PROOF, verify.EXPECTED, reading.SECTION, combining.SECTION),
    common.FILES,
)
OF_EVERY_COMMAND = ("--json", "--quiet", "--verbose", "--help")


def write_options(params: Iterable[click.Parameter], context: click.Context, formatter: click.HelpFormatter) -> None:
    """Write a command's options, in sections. The order inside of a section is that of the command."""
    rows: dict[str, list[tuple[str, str]]] = {heading: [] for heading in ORDER}
    for param in params:
        if record := param.get_help_record(context):
            rows[_heading(param)].append(record)
    for heading, records in rows.items():
        if records:
            with formatter.section(heading):
                formatter.write_dl(records)


def _heading(param: click.Parameter) -> str:
    if any(name in OF_EVERY_COMMAND for name in param.opts):
        return common.FILES
    return getattr(param, "section", "") or OF_NO_SECTION
