"""How much a command prints: the verdict and the paths (-q), a short screen, or everything (-v)."""

from __future__ import annotations

from enum import IntEnum

import click
from click.core import ParameterSource

SOURCE_KEY = "lora_export.verbosity.source"  # command line, environment or pyproject.toml
VERBOSITY_KEY = "lora_export.verbosity"  # in the context's `meta`
NOTES = "lora_export.notes"  # how many notes were printed
MOST_NOTES = 4  # of the short screen


class Verbosity(IntEnum):
    QUIET = -1
    SHORT = 0
    FULL = 1


def verbosity(context: click.Context | None = None) -> Verbosity:
    """What the user chose for the running command."""
    context = context or click.get_current_context(silent=True)
    return context.meta.get(VERBOSITY_KEY, Verbosity.SHORT) if context else Verbosity.SHORT


def options() -> list[click.Option]:
    """-q and -v, for a command's parameters."""
    helps = {
        ("-q", "--quiet"): "Print the verdict and the paths of what was written, and no notes.",
        ("-v", "--verbose"): "Print every figure and note, and the original of an error.",
    }
    return [
        click.Option(names, is_flag=True, expose_value=False, callback=_choose, help=text)
        for names, text in helps.items()
    ]


def _choose(context: click.Context, parameter: click.Parameter, chosen: bool) -> None:
    if not chosen:
        return
    source = context.get_parameter_source(str(parameter.name))
    if VERBOSITY_KEY in context.meta:
        if context.meta[SOURCE_KEY] is source:
            raise click.UsageError("-q and -v exclude each other", context)
        if source is not ParameterSource.COMMANDLINE:  # the command line counts more than what was set elsewhere
            return
    context.meta[VERBOSITY_KEY] = Verbosity.QUIET if parameter.name == "quiet" else Verbosity.FULL
    context.meta[SOURCE_KEY] = source


def message_to_print(message: str) -> str | None:
    """The message that is printed in place of this one; None where nothing is.

    -q leaves warnings only. Of the notes, the short screen has the first ones.
    """
    context, chosen = click.get_current_context(silent=True), verbosity()
    if chosen is Verbosity.QUIET:
        return message if message.startswith("warning") else None
    if context is None or chosen is Verbosity.FULL or not message.startswith("note:"):
        return message
    number = context.meta[NOTES] = context.meta.get(NOTES, 0) + 1
    if number > MOST_NOTES + 1:
        return None
    return message if number <= MOST_NOTES else "note: there are more notes. -v shows all of them"
