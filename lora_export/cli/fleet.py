"""`lora-export fleet`: plan, run and show many adapters by one file."""

from __future__ import annotations

from typing import Any, Literal

import click

from lora_export.cli.arguments import cli_command, print_document
from lora_export.cli.progress import shown
from lora_export.cli.verbosity import Verbosity, verbosity
from lora_export.options.fleet import FleetOptions

SHOWN_ROWS = 20  # adapters that the short screen lists where all are right


@cli_command(
    FleetOptions, "fleet plan fleet.toml", "fleet run fleet.toml -j 2", "fleet status fleet.toml --report s.xml"
)
def fleet_command(action: Literal["plan", "run", "status"], as_json: bool, **options: Any) -> int:
    """Take many adapters through the same steps: merge, onnx, convert, verify.

    FLEET.toml has bases, adapters by globs, and steps with their options (`lora-export guide fleet`). plan reads
    headers, shows everything that would be refused, what is done, memory and time, and writes nothing. run does what is
    not done, and goes on where it was stopped. status shows the outcome of each adapter and step. Both end with 4 where
    a verdict is `different`, else with 5 for `undecided`, 3 for a refusal, the code of a failure, or 5 where something
    is not done.
    """
    with shown() as on_progress:
        from lora_export.fleet.command import run_fleet

        result = run_fleet(action, on_progress=on_progress, **options)
    document = result.as_document()
    if as_json:
        print_document(document)
    else:
        _show(document, is_plan=action == "plan")
    return result.exit_code


def _show(document: dict[str, Any], *, is_plan: bool) -> None:
    from lora_export.report import fleet
    from lora_export.report.console import console, print_line, print_table

    every, to = verbosity() is Verbosity.FULL, console()
    if is_plan:
        print_table(to, fleet.plan_table(document))
        for line in fleet.plan_lines(document, every=every):
            print_line(to, line)
        return
    if verbosity() is not Verbosity.QUIET:
        table = fleet.fleet_table(document)
        print_table(to, table if every or len(table) <= SHOWN_ROWS else fleet.fleet_table(document, every=False))
        for job in document["jobs"]:
            if job["outcome"] not in (*fleet.RIGHT_OUTCOMES, "not run", "not done"):
                for line in fleet.problem_lines(job, every=every):
                    print_line(to, line)
    click.echo(fleet.headline_of_fleet(document))
