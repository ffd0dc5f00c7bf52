"""The tool behind `make mutants`, on small packages: what it chooses, finds again, and whether it lets tests kill."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from mutants.mutations import Finder, Site, all_sites, choose, mutated, sites
from mutants.run import MOST_TESTS, Run, covering, forked, lost, write
from mutants.watching import Watched
from support import TESTS

PRICES = '''"""What things cost."""
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    A = 1 < 2

def price(amount: int, discount: bool = False) -> float:
    """Less for many."""
    if amount < 0:
        raise ValueError(f"{amount + 1} < 0")
    print("cheap", end="" if amount > 9 else "\\n")
    return sum(sorted([amount], reverse=True)[0:]) * (9 if amount >= 10 and not discount else 10)

def never_called(amount):
    return amount + 7
'''
SMALL = """
def large(amount):
    return amount > 9 and bool(sorted([amount], reverse=True))

def never_called():
    return 7
"""
TEST_OF_SMALL = """from lora_export.small import large

def test_large():
    assert large(10) and large(9) is False
"""


def package(root: Path, **modules: str) -> Path:
    for name, source in modules.items():
        path = root.joinpath("lora_export", *name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return root


def changes(source: str) -> set[tuple[str, str]]:
    return {(site.mutant.kind, site.change) for site in sites(source, "lora_export/a.py")}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a <= b != c", {("comparison", "a <= b != c -> a < b != c"), ("comparison", "a <= b != c -> a <= b == c")}),
        ("a and b or c", {("and, or", "a and b or c -> (a and b) and c"), ("and, or", "a and b -> a or b")}),
        ("a -= b * c", {("arithmetic", "a -= b * c -> a += b * c"), ("arithmetic", "b * c -> b + c")}),
        ("a = 3, True, 0.5", {("constant", each) for each in ("3 -> 4", "True -> False", "0.5 -> 1.0")}),
        ("a[b:c]", {("slice", "b -> b + 1"), ("slice", "c -> c - 1")}),
        ("f(a, b=c, strict=True)", {("keyword", "f(a, b=c, strict=True) -> f(a, strict=True)")}),
        ("while not a:\n break", {("not", "not a -> a"), ("jump", "break -> continue")}),
        ("def f():\n return a\n return None", {("return", "return a -> return None")}),
        ("if a:\n raise B(1 + 2)", {("raise", "raise B(1 + 2) -> pass")}),
        ("def f(a: Literal[1] = 2) -> b[3]: 'text'", {("constant", "2 -> 3")}),
        ("__all__ = f(a=1)\nlogger.debug(1)\nx.notes.append(1)\na = f'{1}' + 'b' + c", set()),
    ],
)
def test_every_kind_of_change_and_nothing_else_is_found(source: str, expected: set[tuple[str, str]]) -> None:
    assert changes(source) == expected


def test_every_mutant_of_a_module_differs_from_it() -> None:
    found = sites(PRICES, "lora_export/prices.py")
    sources = {ast.unparse(ast.parse(mutated(PRICES, site))) for site in found}
    assert len(sources | {ast.unparse(ast.parse(PRICES))}) == len(found) + 1 > 10


def test_a_mutant_changes_nothing_else_in_the_text() -> None:
    source = "a = 'é', b - (  # why\n    c * d\n)  # é\ne = 1\n"
    changed = {mutated(source, site) for site in sites(source, "lora_export/a.py")}
    assert changed == {
        "a = 'é', (b + c * d)  # é\ne = 1\n",
        "a = 'é', b - (  # why\n    (c + d)\n)  # é\ne = 1\n",
        "a = 'é', b - (  # why\n    c * d\n)  # é\ne = (2)\n",
    }


def test_choosing_takes_all_folders_and_depends_on_the_seed_alone(tmp_path: Path) -> None:
    many = "\n".join(f"a{number} = {number} + b" for number in range(50))
    found = all_sites(package(tmp_path, one__a=many, two__b="a = [1, 2, 3, 4, 5]", three__c="a = 1"))
    chosen = choose(found, 20, seed=5)
    assert chosen == choose(list(reversed(list(reversed(found)))), 20, seed=5) != choose(found, 20, seed=6)
    folders = [mutant.folder.rpartition("/")[2] for mutant in chosen]
    assert folders.count("one") > 10 and folders.count("two") >= 3 and folders.count("three") == 1


# --- found again ---

MOVED = """import units
LIMIT = 3

def weight(amount):
    if amount < 0:
        return None
    return units.pounds(amount, 2, "text")
"""


def found_again(before: str, **after: str) -> list[Site | None]:
    present = [site for name, source in after.items() for site in sites(source, f"lora_export/{name}.py")]
    return [Finder(present).find(site.mutant) for site in sites(before, "lora_export/old.py")]


@pytest.mark.parametrize(
    "after",
    [
        {"new": f"{PRICES}\n{MOVED}"},
        {"new": MOVED.replace("units.pounds", "pounds").replace('"text"', '"another"'), "old": PRICES},
        {"new": MOVED.replace("def weight(amount)", "def in_pounds(amount: int) -> int")},
        {"old": "def weight(x):\n    if amount < 0:\n        pass", "new": MOVED},
    ],
)
def test_a_mutant_is_found_where_its_code_has_moved(after: dict[str, str]) -> None:
    changed = [site.change if site else "" for site in found_again(MOVED, **after)]
    assert len(changed) == 5 and all(changed)
    assert {site.mutant.file for site in found_again(MOVED, **after) if site} == {"lora_export/new.py"}


def test_a_mutant_whose_statement_is_gone_is_not_found() -> None:
    other = MOVED.replace("amount < 0", "amount < 1").replace("pounds(", "stones(").replace("LIMIT", "MOST")
    alike = "def of(amount):\n    if amount < 0:\n        amount = 0\n"
    assert found_again(MOVED, new=other, old=alike) == [None] * 5


def test_equal_statements_are_told_apart_by_their_neighbours() -> None:
    source = "def read(a):\n    {}\n    if a:\n        return 1\n"
    files = {"one": source.format("first(a)"), "two": source.format("second(a)")}
    (found,) = {site and site.mutant.file for site in found_again(files["two"], **files)}
    assert found == "lora_export/two.py"
    repeated = "def f():\n    return 1\n    return 1\n    return 1\n"
    assert [
        site and site.lines.start for site in found_again(repeated, old=repeated) if site.mutant.kind == "return"
    ] == [*(2, 3, 4)]


def test_a_living_mutant_is_tried_in_place_of_one_that_is_gone(tmp_path: Path) -> None:
    """One of the same folder; of another where the folder is gone."""
    found = all_sites(package(tmp_path, one__a="a = b == 1", two__b="def f():\n    return g(0)"))
    (tmp_path / "tests/mutants").mkdir(parents=True)
    entries = [asdict(mutant) for mutant in choose(found, 4, seed=1)]
    write(tmp_path / "tests/mutants/mutants.json", {"seed": 1}, "mutants", entries)
    assert len(entries) == 4 and not Run(tmp_path, workers=1).new
    (tmp_path / "lora_export/two/b.py").unlink()
    package(tmp_path, one__a="a = b == 1\nc = d and e", three__c="a = b < c")
    run = Run(tmp_path, workers=1)
    assert sorted(site.change for site in run.new.values()) == ["b < c -> b <= c", "d and e -> d or e"]
    rows = dict(line.strip().rsplit(maxsplit=4)[::4] for line in run.table().splitlines()[1:])
    assert rows == {"lora_export/one": "0", "lora_export/two": "2", "new, in place of those gone": "0", "all": "2"}


# --- killed ---


def run(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "mutants.run", "--root", root, "--preload", "", "--workers", "1", *options)
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def outcomes(root: Path) -> dict[str, str]:
    chosen, found = (
        json.loads((root / "tests" / "mutants" / f"{name}.json").read_text()) for name in ("mutants", "baseline")
    )
    names = {each["id"]: f"{each['function']}: {each['change']}" for each in chosen["mutants"]}
    return {names[each["id"]]: each["outcome"] for each in found["outcomes"]}


def test_a_child_that_is_too_slow_or_crashes_has_no_exit_code() -> None:
    def spin() -> int:
        while True:
            pass

    assert forked(lambda: 3, processor_seconds=10) == 3
    assert forked(spin, processor_seconds=0) is None
    assert forked(lambda: signal.raise_signal(signal.SIGKILL) or 0, processor_seconds=10) is None


def test_all_parameters_of_the_own_tests_come_before_other_files(tmp_path: Path) -> None:
    site = sites(SMALL, "lora_export/small.py")[0]
    own = [f"tests/test_small.py::test_large[{number}]" for number in range(6)]
    others = [f"tests/test_all.py::test_{number}[{size}]" for number in range(MOST_TESTS) for size in range(3)]
    seen = [json.dumps({"test": test, "seconds": 0.001, "passed": True}) for test in (*others, *own)]
    (tmp_path / "tests.jsonl").write_text("\n".join(seen))
    (tmp_path / "hits").write_text("\n".join(f"{site.mutant.id} {test}" for test in (*others, *own)))
    chosen = covering(site, Watched(tmp_path), most_seconds=10, without=set())
    assert chosen[: len(own)] == own and len(chosen) == MOST_TESTS
    functions = [test.partition("[")[0] for test in chosen[len(own) :]]
    assert len(set(functions)) == len(functions) / 2  # two parameters of each, before a third


def test_the_tests_of_a_package_kill_mutants_and_a_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (package(tmp_path, small=SMALL) / "lora_export" / "__init__.py").touch()
    (tmp_path / "tests" / "mutants").mkdir(parents=True)
    (tmp_path / "tests" / "test_small.py").write_text(TEST_OF_SMALL)
    (tmp_path / "pyproject.toml").touch()
    for options in (("--choose", "30"), ("--keep",)):
        done = run(tmp_path, *options)
        assert done.returncode == 0, done.stdout + done.stderr
    found = outcomes(tmp_path)
    returned = "amount > 9 and bool(sorted([amount], reverse=True))"
    assert found == {
        f"large: return {returned} -> return None": "killed",
        f"large: {returned} -> {returned.replace('and', 'or')}": "killed",
        "large: amount > 9 -> amount >= 9": "killed",
        "large: 9 -> 10": "killed",
        "large: sorted([amount], reverse=True) -> sorted([amount])": "survived",
        "large: True -> False": "survived",
        "never_called: return 7 -> return None": "uncovered",
        "never_called: 7 -> 8": "uncovered",
    }
    assert (tmp_path / "lora_export" / "small.py").read_text() == SMALL

    again = Run(tmp_path, workers=1)
    again.try_all(10)
    assert capsys.readouterr().out == "0 mutants to try\n"
    assert lost(again) == []
    baseline = tmp_path / "tests" / "mutants" / "baseline.json"
    baseline.write_text(baseline.read_text().replace("survived", "killed"))
    assert "survived now: lora_export/small.py, large: True -> False" in lost(again)
