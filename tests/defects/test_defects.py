"""Seeded defects: right exports broken in many ways. The verdict on none of them may be `same`.

The whole table, every defect in every column, is slow. It is stored in tests/README.md, and each run repeats a part
of it. `make defects` repeats all of it and writes the tables.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from defects import judging, other_tools, right_exports, subjects
from defects.judging import SAME, Judged
from defects.right_exports import CALIBRATING, CALIBRATING_SEEDS, JUDGING, JUDGING_SEEDS
from defects.seeded_defects import DEFECTS
from defects.subjects import Column
from lora_export.verification import parity
from support import TESTS, tables
from support.slow import slow

README = TESTS / "README.md"
QUICK = [  # one export, of a small net
    *(Column("net", mode) for mode in ("merged", "inputs", "rows", "checkpoint")),
    Column("llama", "checkpoint"),
]
COLUMNS = [
    *(*QUICK, Column("bert", "checkpoint"), Column("gpt2", "checkpoint")),
    *(Column("net", "nodes"), Column("llama", "nodes"), Column("net", "torchscript"), Column("bert", "torchscript")),
]
# Candidates that are judged in another way: by the limits of fp16, with the graph's own weights, without fill values,
# with images among the tokens, and with experts that not every token reaches.
OTHER_FORMS = [
    Column("llama", "nodes", form=subjects.HALF),
    Column("llama", "nodes", form=subjects.FOUR_BITS),
    Column("net", "merged", form=subjects.FILLED),
    Column("llava", "checkpoint"),
    Column("internvl", "merged"),
    Column("moenet", "checkpoint"),
    Column("mixtral", "nodes"),
]
EXPORTED_ALONE = {"internvl", "mixtral", "maskednet"}  # no other test needs these graphs
SOME_FORMS = [slow(column) if column.exported in EXPORTED_ALONE else column for column in OTHER_FORMS]
NOT_BROKEN = "–"
# What a graph in fp16 does by itself, or rounds away: no defects there. Dropout has no effect in fp16, and the
# converter clamps the constants that an overflow needs.
BELOW_FP16 = frozenset(
    {
        *("adapter rounded to fp16", "weights rounded to fp16", "weights rounded to TF32"),
        *("weights quantised to 16 bits", "outputs rounded to fp16", "one element of A off by a thousandth"),
        *("Cast to fp16 and back at the end", "outputs rounded to bf16"),
        *("one element off by a thousandth of the largest", "Dropout in training mode", "fp16 overflow inside"),
    }
)
# Its effect on the outputs is 0.00004 % of the adapter's, 1.5 times what rounding to fp32 does.
BELOW_FP32 = frozenset({("internvl, merged", "one element of A off by a thousandth")})
# onnxruntime reads freed memory: usually it computes the base, sometimes it crashes. In the slow run only.
UNDEFINED = frozenset({"adapter object released"})


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The models are so small that two threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quick(name: str) -> tuple[Column, Judged] | None:
    """The verdict in one column that the defect applies to, a different column from defect to defect."""
    start = list(DEFECTS).index(name)
    columns = sorted(QUICK, key=lambda column: (QUICK.index(column) - start) % len(QUICK))
    judged = ((column, judging.judged_defect(DEFECTS[name], column)) for column in columns)
    return next(((column, result) for column, result in judged if result), None)


@pytest.mark.parametrize("name", [name for name in DEFECTS if name not in UNDEFINED])
def test_no_defect_is_judged_same(name: str) -> None:
    found = quick(name)
    stored = tables.rows(tables.text(README, "defects"))[name]
    if found is None:  # it applies to BERT alone, which only the slow run exports
        verdicts = [verdict for verdict in stored.values() if verdict != NOT_BROKEN]
        assert verdicts and SAME not in verdicts
        return
    column, result = found
    assert result.verdict != SAME, result.proof and str(result.proof.verdict)
    assert stored[str(column)] == result.verdict


@pytest.mark.parametrize("column", QUICK, ids=str)
def test_exports_without_defect_are_judged_same(column: Column) -> None:
    for kind in ("linear",) if column.kind == "linear" else ("whole", "dora"):
        adapter = subjects.adapter(column.subject, kind)
        result = judging.judged(column.candidate(adapter), column, adapter)
        assert result.verdict == SAME, result.proof and str(result.proof.verdict)


def test_table_has_all_defects_and_at_least_forty() -> None:
    stored = tables.rows(tables.text(README, "defects"))
    assert len(DEFECTS) >= 40
    assert list(stored) == list(DEFECTS)
    for name, row in stored.items():
        verdicts = [row[str(column)] for column in COLUMNS]
        assert SAME not in verdicts, name
        assert set(verdicts) != {NOT_BROKEN}, f"{name} breaks nothing"


@pytest.mark.slow
def test_every_defect_in_every_column(request: pytest.FixtureRequest) -> None:
    found = {
        name: {column: judging.judged_defect(defect, column) for column in COLUMNS} for name, defect in DEFECTS.items()
    }
    cells = as_cells(found)
    if request.config.getoption("--keep"):
        tables.put(README, "defects", tables.table(cells, "defect"))
        tables.put(README, "misses", misses(cells))
    assert [f"{name}: {column}" for name, row in cells.items() for column in row if row[column] == SAME] == []
    stored = tables.rows(tables.text(README, "defects"))
    assert {name: {column: row[column] for column in map(str, COLUMNS)} for name, row in stored.items()} == {
        name: {column: row[column] for column in map(str, COLUMNS)} for name, row in cells.items()
    }


def as_cells(found: dict[str, dict[Column, Judged | None]]) -> dict[str, dict[str, str]]:
    """By defect: our verdicts, and how many of its candidates each other tool accepts."""
    cells = {}
    for name, row in found.items():
        broken = [result for result in row.values() if result]
        cells[name] = {str(column): result.verdict if result else NOT_BROKEN for column, result in row.items()}
        for tool, _ in other_tools.present():
            passed = sum(tool in result.passed_by for result in broken)
            cells[name][tool] = f"**{passed}** of {len(broken)}" if passed else f"0 of {len(broken)}"
    return cells


def misses(cells: dict[str, dict[str, str]]) -> str:
    """How many broken candidates each tool accepts."""
    ours = [row[str(column)] for row in cells.values() for column in COLUMNS if row[str(column)] != NOT_BROKEN]
    lines = [f"| verify | {ours.count(SAME)} of {len(ours)} |"]
    for name, _ in other_tools.present():
        passed = [int(row[name].split(" of ")[0].strip("*")) for row in cells.values()]
        lines.append(f"| {name} | {sum(passed)} of {len(ours)}, in {sum(map(bool, passed))} of {len(cells)} ways |")
    head = "| | broken candidates that passed |\n|---|---|\n"
    return f"{head}{chr(10).join(lines)}\n\n{other_tools.versions()}"


# --- other forms and models ---


def test_table_of_other_forms_has_all_defects() -> None:
    stored = tables.rows(tables.text(README, "other forms"))
    assert list(stored) == list(DEFECTS)
    for column in map(str, OTHER_FORMS):
        verdicts = [row[column] for row in stored.values()]
        assert SAME not in verdicts and verdicts.count(NOT_BROKEN) < len(verdicts) / 3


@pytest.mark.parametrize("column", SOME_FORMS, ids=str)
def test_other_forms_without_defect_are_judged_same(column: Column) -> None:
    adapter = subjects.adapter(column.subject, column.kind)
    result = judging.judged(column.candidate(adapter), column, adapter)
    assert result.verdict == SAME, result.proof and str(result.proof.verdict)


@pytest.mark.parametrize("column", SOME_FORMS, ids=str)
@pytest.mark.parametrize("name", ["adapter missing on one kind of layer", "NaN in one element"])
def test_defects_of_other_forms_are_judged_as_stored(column: Column, name: str) -> None:
    found = judging.judged_defect(DEFECTS[name], column)
    assert (found.verdict if found else NOT_BROKEN) == tables.rows(tables.text(README, "other forms"))[name][
        str(column)
    ]


@pytest.mark.slow
def test_every_defect_in_other_forms(request: pytest.FixtureRequest) -> None:
    cells = {name: {str(column): judged_in(name, column) for column in OTHER_FORMS} for name in DEFECTS}
    if request.config.getoption("--keep"):
        tables.put(README, "other forms", tables.table(cells, "defect"))
    assert [f"{name}: {column}" for name, row in cells.items() for column in row if row[column] == SAME] == []
    assert tables.rows(tables.text(README, "other forms")) == cells


def judged_in(name: str, column: Column) -> str:
    if (column.form == subjects.HALF and name in BELOW_FP16) or (str(column), name) in BELOW_FP32:
        return NOT_BROKEN
    found = judging.judged_defect(DEFECTS[name], column)
    print(f"{column}, {name}: {found.verdict if found else NOT_BROKEN}", flush=True)
    return found.verdict if found else NOT_BROKEN


# --- no false alarms -----------------------------------------------------------------------------


@pytest.mark.slow
def test_every_right_export_is_judged_same(request: pytest.FixtureRequest) -> None:
    alarms: dict[str, list[str]] = {"verify": []}
    closest = 0.0
    for one in JUDGING:
        for seed in JUDGING_SEEDS:
            result = one.judged(seed)
            case = f"{one}, seed {seed}: {result.verdict}"
            print(case, flush=True)
            if result.verdict != SAME:
                print(result.proof and result.proof.verdict, flush=True)
                alarms["verify"].append(case)
            closest = max(closest, judging.limit_used(result.proof) if result.proof else 0.0)
            for name, _ in other_tools.present():
                alarms.setdefault(name, []).extend([case] * (name not in result.passed_by))
    assert len(JUDGING) >= 25 and len(JUDGING_SEEDS) >= 5
    if request.config.getoption("--keep"):
        tables.put(README, "false alarms", alarmed(alarms, closest))
    assert alarms["verify"] == []


def alarmed(alarms: dict[str, list[str]], closest: float) -> str:
    """How many right exports each tool refuses, and how close ours came to its limits."""
    count = len(JUDGING) * len(JUDGING_SEEDS)
    lines = [f"| {name} | {len(cases)} of {count} |" for name, cases in alarms.items()]
    head = "| | right exports refused |\n|---|---|\n"
    used = f"The most that a right export used of a limit: {100 * closest:.0f} %."
    return f"{head}{chr(10).join(lines)}\n\n{used}"


@pytest.mark.slow
def test_ratio_limit_allows_what_right_exports_need(request: pytest.FixtureRequest) -> None:
    found = [each for one in CALIBRATING for seed in CALIBRATING_SEEDS for each in right_exports.measured(one, seed)]
    table = right_exports.table(found)
    print(table, flush=True)
    if request.config.getoption("--keep"):
        tables.put(README, "calibration", table)
    for each in found:
        assert max(each.error, each.tail) <= parity.ratio_limit(each.elements, "float32"), each


def test_calibration_and_test_exports_are_disjoint() -> None:
    assert not {right.column.subject for right in CALIBRATING} & {right.column.subject for right in JUDGING}
    assert not set(CALIBRATING_SEEDS) & set(JUDGING_SEEDS)
    assert len(set(map(str, JUDGING))) == len(JUDGING) >= 25
