"""The sections of a command's `--help`: options by what they are about."""

from __future__ import annotations

from collections.abc import Iterable

import click

from lora_export.options.sections import Section

OF_EVERY_COMMAND = ("--json", "--quiet", "--verbose", "--help")


def write_options(params: Iterable[click.Parameter], context: click.Context, formatter: click.HelpFormatter) -> None:
    """Write a command's options, in sections. The order inside of a section is that of the command."""
    rows: dict[Section, list[tuple[str, str]]] = {section: [] for section in Section}
    for param in params:
        if record := param.get_help_record(context):
            rows[_section(param)].append(record)
    for heading, records in rows.items():
        if records:
            with formatter.section(heading):
                formatter.write_dl(records)


def _section(param: click.Parameter) -> Section:
    if any(name in OF_EVERY_COMMAND for name in param.opts):
        return Section.FILES
    return getattr(param, "section", Section.OPTIONS)
