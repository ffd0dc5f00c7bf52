"""What `lora-export fleet` found, as lines and as files. All are made from the JSON document and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich.filesize import decimal

from lora_export.errors import InputRefused, count, duration, one_line
from lora_export.report.files import refuse_other_file, replace_report
from lora_export.report.files.figures import as_json
from lora_export.report.files.junit_xml import finished_suite, new_suite, xml_text
from lora_export.report.files.page import MARKS, render, require_jinja2

FleetDocument = Mapping[str, Any]
RIGHT_OUTCOMES = ("same", "done")
COLOURS = {"same": "same", "done": "same", "different": "different", "refused": "different", "failed": "different"}
SHOWN_PROBLEM_LINES = 6  # of one adapter, on a screen


def headline_of_fleet(document: FleetDocument) -> str:
    """`12 same, 3 different`."""
    return ", ".join(f"{number:,} {outcome}" for outcome, number in document["counts"].items())


def fleet_table(document: FleetDocument, *, every: bool = True) -> list[list[str]]:
    """A row for each adapter with the outcome of each step, below a header. Without `every`, only those not right."""
    steps = dict.fromkeys((job["number"], job["step"]) for job in document["jobs"])
    several = len({job["base"] for job in document["jobs"]}) > 1
    rows: dict[tuple[str, str], dict[int, str]] = {}
    for job in document["jobs"]:
        rows.setdefault((job["base"], job["adapter"]), {})[job["number"]] = job["outcome"]
    return [
        ["adapter", *(step for _, step in steps)],
        *(
            [f"{base}/{adapter}" if several else adapter, *(own[number] for number, _ in steps)]
            for (base, adapter), own in rows.items()
            if every or not set(own.values()) <= set(RIGHT_OUTCOMES)
        ),
    ]


def plan_table(document: FleetDocument) -> list[list[str]]:
    """A row for each step of a plan, below a header: what is left, and what it needs."""
    rows = [["step", "jobs", "done", "memory of each", "reads", "writes", "time"]]
    for step in document["steps"]:
        needs = step["needs"]
        sizes = [decimal(needs[name]) if needs[name] else "-" for name in ("memory", "read", "written")]
        time = duration(needs["seconds"]) if step["jobs"] > step["done"] else "-"
        rows.append([step["step"], f"{step['jobs']:,}", f"{step['done']:,}", *sizes, time])
    return rows


def plan_lines(document: FleetDocument, *, every: bool) -> Iterator[str]:
    """What does not fit, an adapter after the other; all of its lines with `every`."""
    if document["unread"]:
        yield f"{count(document['unread'], 'file')} without a known hash: what depends on them counts as not done"
    problems = document["problems"]
    names = {(problem["base"], problem["adapter"]) for problem in problems}
    if not problems:
        yield f"{count(document['adapters'], 'adapter')}: headers show nothing that would be refused"
        return
    yield f"{len(names)} of {count(document['adapters'], 'adapter')} would be refused:"
    for problem in problems:
        lines = problem["text"].split("\n")
        yield f"  {problem['adapter']}, {problem['step']}: {lines[0]}"
        yield from (f"    {line}" for line in lines[1 : None if every else SHOWN_PROBLEM_LINES])
        if not every and len(lines) > SHOWN_PROBLEM_LINES:
            yield f"    and {count(len(lines) - SHOWN_PROBLEM_LINES, 'more line')} (-v)"


# --- files ---


def _as_junit(document: FleetDocument) -> str:
    """A test for each step of each adapter: `different` is a failure, what could not be judged an error."""
    suite = new_suite({"file": document["file"]}, document["seconds"])
    for job in document["jobs"]:
        name = {"classname": xml_text(f"lora-export.fleet.{job['base']}.{job['adapter']}"), "name": job["step"]}
        test = ElementTree.SubElement(suite, "testcase", name)
        test.set("time", f"{job['seconds'] or 0:.3f}")
        message = xml_text(outcome_and_message(job))
        if job["outcome"] == "not run":
            ElementTree.SubElement(test, "skipped", message=message)
        elif job["outcome"] not in RIGHT_OUTCOMES:
            tag = "failure" if job["outcome"] == "different" else "error"
            fault = ElementTree.SubElement(test, tag, message=message.partition("\n")[0], type=job["outcome"])
            fault.text = message
        else:
            ElementTree.SubElement(test, "system-out").text = message
    return finished_suite(suite, document["seconds"], "lora-export fleet")


def _as_page(document: FleetDocument) -> str:
    outcome = {0: "same", 5: "undecided"}.get(document["exit_code"], "different")  # the colour of the page
    return render(
        "fleet.html.j2",
        document={**document, "outcome": outcome},
        mark=MARKS[outcome],
        headline=headline_of_fleet(document),
        table=fleet_table(document),
        bad=[
            {**job, "text": outcome_and_message(job)}
            for job in document["jobs"]
            if job["outcome"] not in (*RIGHT_OUTCOMES, "not run")
        ],
        colours=COLOURS,
    )


FLEET_REPORTS: Mapping[str, Callable[[FleetDocument], str]] = {".json": as_json, ".xml": _as_junit, ".html": _as_page}


def check_fleet_report(path: Path) -> None:
    """Raise InputRefused for a path that no such report may have, and EnvironmentLacking without jinja2 for HTML."""
    make = FLEET_REPORTS.get(path.suffix)
    if make is None:
        raise InputRefused(f"{path}: unknown report of a fleet. Name it {', '.join(FLEET_REPORTS)}")
    refuse_other_file(path)
    if make is _as_page:
        require_jinja2()


def write_fleet_report(path: Path, document: FleetDocument) -> None:
    """Write a report of a fleet, completely or not at all. An existing report is replaced."""
    replace_report(path, FLEET_REPORTS[path.suffix](document))


def problem_lines(job: Mapping[str, Any], *, every: bool = False) -> list[str]:
    """A job that is not right, in one line; with `every`, and all lines of its message."""
    lines = f"{job['adapter']}, {job['step']}: {outcome_and_message(job)}".split("\n")
    return [one_line(line) for line in lines[: None if every else 1]]


def outcome_and_message(job: Mapping[str, Any]) -> str:
    """The outcome, and the message where there is one. That of a verdict begins with the outcome."""
    parts = [] if job["message"].startswith(job["outcome"]) else [job["outcome"]]
    return ": ".join([*parts, *([job["message"]] if job["message"] else [])])
