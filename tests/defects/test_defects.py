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
from defects.right_exports import CALIBRATING, CALIBRATING_SEEDS, JUDGING, JUDGING_SEEDS, Measured, Right
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


@pytest.fixture(scope="module")
def found_in(pytestconfig: pytest.Config) -> Iterator[dict[Column, dict[str, Judged | None]]]:
    """By column and defect. The tables are written once every column was judged."""
    found: dict[Column, dict[str, Judged | None]] = {}
    yield found
    if pytestconfig.getoption("--keep") and len(found) == len(COLUMNS):
        cells = as_cells({name: {column: found[column][name] for column in COLUMNS} for name in DEFECTS})
        tables.put(README, "defects", tables.table(cells, "defect"))
        tables.put(README, "misses", misses(cells))


@pytest.mark.slow
@pytest.mark.parametrize("column", COLUMNS, ids=str)
def test_every_defect_in_a_column(
    column: Column, found_in: dict[Column, dict[str, Judged | None]], pytestconfig: pytest.Config
) -> None:
    found_in[column] = {name: judging.judged_defect(defect, column) for name, defect in DEFECTS.items()}
    assert_as_stored("defects", column, verdicts(found_in[column]), pytestconfig)


def verdicts(found: dict[str, Judged | None]) -> dict[str, str]:
    return {name: result.verdict if result else NOT_BROKEN for name, result in found.items()}


def assert_as_stored(table: str, column: Column, cells: dict[str, str], pytestconfig: pytest.Config) -> None:
    """No verdict of a column is `same`, and each is the table's, unless that is written anew."""
    assert [name for name, verdict in cells.items() if verdict == SAME] == []
    if not pytestconfig.getoption("--keep"):
        stored = tables.rows(tables.text(README, table))
        assert {name: row[str(column)] for name, row in stored.items()} == cells


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


@pytest.fixture(scope="module")
def cells_of_forms(pytestconfig: pytest.Config) -> Iterator[dict[Column, dict[str, str]]]:
    """By column and defect. The table is written once every column was judged."""
    found: dict[Column, dict[str, str]] = {}
    yield found
    if pytestconfig.getoption("--keep") and len(found) == len(OTHER_FORMS):
        cells = {name: {str(column): found[column][name] for column in OTHER_FORMS} for name in DEFECTS}
        tables.put(README, "other forms", tables.table(cells, "defect"))


@pytest.mark.slow
@pytest.mark.parametrize("column", OTHER_FORMS, ids=str)
def test_every_defect_in_another_form(
    column: Column, cells_of_forms: dict[Column, dict[str, str]], pytestconfig: pytest.Config
) -> None:
    cells_of_forms[column] = {name: judged_in(name, column) for name in DEFECTS}
    assert_as_stored("other forms", column, cells_of_forms[column], pytestconfig)


def judged_in(name: str, column: Column) -> str:
    if (column.form == subjects.HALF and name in BELOW_FP16) or (str(column), name) in BELOW_FP32:
        return NOT_BROKEN
    found = judging.judged_defect(DEFECTS[name], column)
    print(f"{column}, {name}: {found.verdict if found else NOT_BROKEN}", flush=True)
    return found.verdict if found else NOT_BROKEN


# --- no false alarms -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged_exports(pytestconfig: pytest.Config) -> Iterator[dict[Right, list[Judged]]]:
    """A verdict for each seed. The table is written once every export was judged."""
    found: dict[Right, list[Judged]] = {}
    yield found
    if pytestconfig.getoption("--keep") and len(found) == len(JUDGING):
        tables.put(README, "false alarms", alarmed([each for results in found.values() for each in results]))


@pytest.mark.slow
@pytest.mark.parametrize("right", JUDGING, ids=str)
def test_a_right_export_is_judged_same(right: Right, judged_exports: dict[Right, list[Judged]]) -> None:
    found = judged_exports[right] = [right.judged(seed) for seed in JUDGING_SEEDS]
    for seed, result in zip(JUDGING_SEEDS, found, strict=True):
        assert result.verdict == SAME, (seed, result.proof and str(result.proof.verdict))


def alarmed(found: list[Judged]) -> str:
    """How many right exports each tool refuses, and how close ours came to its limits."""
    refused = {"verify": sum(result.verdict != SAME for result in found)}
    refused |= {name: sum(name not in result.passed_by for result in found) for name, _ in other_tools.present()}
    lines = [f"| {name} | {number} of {len(found)} |" for name, number in refused.items()]
    head = "| | right exports refused |\n|---|---|\n"
    closest = max(judging.limit_used(result.proof) for result in found if result.proof)
    used = f"The most that a right export used of a limit: {100 * closest:.0f} %."
    return f"{head}{chr(10).join(lines)}\n\n{used}"


@pytest.fixture(scope="module")
def calibration(pytestconfig: pytest.Config) -> Iterator[dict[Right, list[Measured]]]:
    """What each export needs. The table is shown, and written once every export was measured."""
    found: dict[Right, list[Measured]] = {}
    yield found
    table = right_exports.table([each for results in found.values() for each in results])
    print(f"\n{table}", flush=True)
    if pytestconfig.getoption("--keep") and len(found) == len(CALIBRATING):
        tables.put(README, "calibration", table)


@pytest.mark.slow
@pytest.mark.parametrize("right", CALIBRATING, ids=str)
def test_ratio_limit_allows_what_a_right_export_needs(right: Right, calibration: dict[Right, list[Measured]]) -> None:
    calibration[right] = [each for seed in CALIBRATING_SEEDS for each in right_exports.measured(right, seed)]
    for each in calibration[right]:
        assert each.largest <= parity.ratio_limit(each.elements, "float32"), each


def test_calibration_and_test_exports_are_disjoint() -> None:
    assert not {right.column.subject for right in CALIBRATING} & {right.column.subject for right in JUDGING}
    assert not set(CALIBRATING_SEEDS) & set(JUDGING_SEEDS)
    assert len(set(map(str, JUDGING))) == len(JUDGING) >= 25
    assert len(JUDGING_SEEDS) >= 5
