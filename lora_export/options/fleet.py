"""The options of `fleet`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lora_export.options.common import Reported
from lora_export.options.declaring import Only, Positional, Section, declares, option

VERIFY_WEIGHTS = "verify --base"  # the step that proves merged weights, as the file of a fleet names it
RUN = Only("action", ("run",), words="`fleet run`")


@dataclass(frozen=True, kw_only=True)
class FleetOptions(Reported):
    """What `fleet` takes."""

    action: Literal["plan", "run", "status"] = field(
        kw_only=False, metadata=declares(Positional(metavar="plan|run|status"))
    )
    fleet: str | Path = field(kw_only=False, metadata=declares(Positional(metavar="FLEET.toml", kind="path")))
    jobs: int = option(
        1, "Processes on this machine that work at the same time.", flags=("-j", "--jobs"), metavar="N", at_least=1,
        only=(RUN,),
    )  # fmt: skip
    ray: str | None = option(
        None,
        "Run on Ray: the address of a cluster, auto for the one that this machine belongs to, or local.",
        metavar="ADDRESS|local",
        only=(RUN,),
    )
    reports: Sequence[str | Path] = option(
        (),
        "Write the status as JSON, JUnit XML (a case for each adapter and step) or HTML. May be repeated.",
        section=Section.FILES,
        flags=("--report",),
        metavar="FILE.json|.xml|.html",
        kind="path",
        only=(Only("action", ("run", "status"), words="`fleet run` and `fleet status`"),),
    )
