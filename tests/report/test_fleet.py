"""What is shown of a fleet: lines, JUnit XML, and a page in which a name stays text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from lora_export.errors import InputRefused
from lora_export.report import fleet
from support.junit_schema import faults

OUTCOMES = {
    "de": ("done", "same"),
    "fr": ("done", "different"),
    "<b>": ("done", "undecided"),
    "it": ("refused", "not run"),
    "no": ("failed", "not run"),
    "new": ("not done", "not done"),
}
DOCUMENT: dict[str, Any] = {
    "schema": "lora-export/fleet-status/1",
    "file": "fleet.toml",
    "seconds": 3.5,
    "exit_code": 4,
    "counts": {"done": 3, "different": 1},
    "jobs": [
        {
            "base": "base", "adapter": name, "step": step, "number": n, "outcome": outcome, "exit_code": 0,
            "message": f"{outcome}: why\nand more" if outcome in ("different", "refused") else "", "seconds": 1.5,
        }
        for name, outcomes in OUTCOMES.items()
        for n, (step, outcome) in enumerate(zip(("merge", "verify"), outcomes, strict=True), 1)
    ],
}  # fmt: skip


def test_the_table_has_a_row_for_each_adapter() -> None:
    assert fleet.fleet_table(DOCUMENT)[:3] == [
        ["adapter", "merge", "verify"],
        ["de", "done", "same"],
        ["fr", "done", "different"],
    ]
    assert [row[0] for row in fleet.fleet_table(DOCUMENT, every=False)] == ["adapter", "fr", "<b>", "it", "no", "new"]
    other = {**DOCUMENT, "jobs": [*DOCUMENT["jobs"], *({**job, "base": "b"} for job in DOCUMENT["jobs"][:2])]}
    assert [row[0] for row in fleet.fleet_table(other)] == ["adapter", *(f"base/{name}" for name in OUTCOMES), "b/de"]


def test_a_line_has_the_outcome_once() -> None:
    assert fleet.problem_lines(DOCUMENT["jobs"][3]) == ["fr, verify: different: why"]
    assert fleet.problem_lines(DOCUMENT["jobs"][3], every=True) == ["fr, verify: different: why", "and more"]
    assert fleet.problem_lines(DOCUMENT["jobs"][8]) == ["no, merge: failed"]


def test_junit_has_a_case_for_each_adapter_and_step(tmp_path: Path) -> None:
    fleet.write_fleet_report(tmp_path / "s.xml", DOCUMENT)
    root = ElementTree.fromstring((tmp_path / "s.xml").read_text(encoding="utf-8"))
    assert faults(root) == []
    found = {
        (test.attrib["classname"], test.attrib["name"]): [child.tag for child in test]
        for test in root.iter("testcase")
    }  # fmt: skip
    tags = {"done": "system-out", "same": "system-out", "different": "failure", "not run": "skipped"}
    assert found == {
        (f"lora-export.fleet.base.{name}", step): [tags.get(outcome, "error")]
        for name, outcomes in OUTCOMES.items()
        for step, outcome in zip(("merge", "verify"), outcomes, strict=True)
    }
    assert root.attrib["tests"] == "12" and root.attrib["failures"] == "1" and root.attrib["errors"] == "5"


def test_the_page_shows_what_is_not_right_and_escapes_names(tmp_path: Path) -> None:
    fleet.write_fleet_report(tmp_path / "s.html", DOCUMENT)
    page = (tmp_path / "s.html").read_text(encoding="utf-8")
    assert "<b>" not in re.sub(r"<b>[^<]*</b>", "", page) and "&lt;b&gt;" in page
    assert '<main class="different">' in page and "different: why<br>and more" in page
    assert page.count('<span class="badge') == 12 and "default-src 'none'" in page


@pytest.mark.parametrize("name", ["s.md", "s"])
def test_another_suffix_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"Name it \.json, \.xml, \.html"):
        fleet.check_fleet_report(tmp_path / name)


def test_a_file_that_is_no_report_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"a": 1}')
    with pytest.raises(InputRefused, match="exists and is no report"):
        fleet.check_fleet_report(tmp_path / "mine.json")
    fleet.write_fleet_report(tmp_path / "s.json", DOCUMENT)
    assert fleet.check_fleet_report(tmp_path / "s.json") is None
