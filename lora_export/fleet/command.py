"""`lora_export.run_fleet`: plan, run and show many adapters by one file."""

from __future__ import annotations

from pathlib import Path

from lora_export.fleet.description import read_fleet
from lora_export.fleet.plan import FleetPlan, plan_of
from lora_export.fleet.run import run_jobs
from lora_export.fleet.status import FleetStatus, status_of
from lora_export.options.declaring import takes
from lora_export.options.fleet import FleetOptions
from lora_export.report.files import try_report_place
from lora_export.report.fleet import check_fleet_report, write_fleet_report


@takes(FleetOptions)
def run_fleet(options: FleetOptions) -> FleetPlan | FleetStatus:
    """Take many adapters through the same steps, by a file FLEET.toml (`guide fleet`).

    `action` is "plan" (headers alone, writes nothing; a FleetPlan), "run" (what is not done) or "status" (both a
    FleetStatus). A job is done while its record has the hashes of base, adapter and other inputs, the options, the
    version and the output that are there; the existence of a file proves nothing. A refusal, a verdict or a failure
    ends no other job, and is no exception: `exit_code` of the result has the worst.

    A run starts processes that import the program: call it below `if __name__ == "__main__"`.

    Raises WrongUsage for keys and values of the file that do not exist, InputRefused where it is damaged, and
    OutputFailed where another run has the fleet, or no report can be written.
    """
    options.check_usage()
    for path in options.reports:
        check_fleet_report(Path(path))
        try_report_place(Path(path))
    fleet = read_fleet(Path(options.fleet))
    if options.action == "plan":
        return plan_of(fleet)
    status = run_jobs(fleet, options) if options.action == "run" else status_of(fleet)
    for path in options.reports:
        write_fleet_report(Path(path), status.as_document())
    return status
