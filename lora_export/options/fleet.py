"""The options of `fleet`."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from lora_export.options.common import JOBS_AT_ONCE, RAY_ADDRESS, Reported
from lora_export.options.declaring import Only, Positional, Section, declares, means, option

VERIFY_WEIGHTS = "verify --base"  # the step that proves merged weights, as the file of a fleet names it
RUN = Only("action", ("run",), words="`fleet run`")


@dataclass(frozen=True, kw_only=True)
class FleetOptions(Reported):
    """What `fleet` takes."""

    action: Literal["plan", "run", "status"] = field(
        kw_only=False, metadata=declares(Positional(metavar="plan|run|status"))
    )
    fleet: str | Path = field(kw_only=False, metadata=declares(Positional(metavar="FLEET.toml", kind="path")))
    jobs: int = means(1, replace(JOBS_AT_ONCE, only=(RUN,)))
    ray: str | None = means(None, replace(RAY_ADDRESS, only=(RUN,)))
    reports: Sequence[str | Path] = option(
        (),
        "Write the status as JSON, JUnit XML (a case for each adapter and step) or HTML. May be repeated.",
        section=Section.FILES,
        flags=("--report",),
        metavar="FILE.json|.xml|.html",
        kind="path",
        only=(Only("action", ("run", "status"), words="`fleet run` and `fleet status`"),),
    )
