"""Small models of many architectures, with PEFT's adapters on all linear layers, are exported and proven.

`make matrix` runs all of them and the other tools beside; `--keep` writes what it finds into tests/README.md. A few run
in `make test`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support import TESTS, matrix, tables
from support.slow import slow

README, TABLE = TESTS / "README.md", "architectures"
# An embedding with a row of zeros under a norm of a small epsilon; a refusal; a lucky run of PyTorch; a waveform.
QUICK = [slow("helium", "merged"), ("mamba", "merged"), slow("olmo2", "merged"), slow("wav2vec2", "nodes")]


def kept() -> dict[str, dict[str, str]]:
    return tables.rows(tables.text(README, TABLE))


def keep(name: str, cells: dict[str, str]) -> None:
    """Put one row into the table. The rows have the sequence of the models."""
    rows = {**kept(), name: cells}
    ordered = {
        each: {column: rows[each].get(column, matrix.NOT_RUN) for column in matrix.COLUMNS}
        for each in matrix.NAMES
        if each in rows
    }
    tables.put(README, TABLE, tables.table(ordered, "architecture"))


@pytest.mark.parametrize(("name", "mode"), QUICK)
def test_an_architecture_is_what_the_table_shows(name: str, mode: str, tmp_path: Path) -> None:
    found = matrix.export(matrix.subject(name, tmp_path), mode, tmp_path)
    assert found == matrix.without_seconds(kept()[name])[mode]
    assert found == matrix.SAME or name in matrix.REFUSED


@pytest.mark.matrix
@pytest.mark.soak
@pytest.mark.exports  # each cell has the seconds of its own export
@pytest.mark.parametrize("name", matrix.NAMES)
def test_an_architecture_is_proven_or_refused_by_name(
    name: str, tmp_path: Path, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = matrix.row(name, tmp_path)
    with capsys.disabled():
        print(f"\n{name:14}", *(f"{column}: {text};" for column, text in cells.items() if text))
    if pytestconfig.getoption("--keep"):
        keep(name, cells)
    for mode in matrix.MODES:
        what = matrix.without_seconds(cells)[mode]
        assert what.startswith(matrix.SAME) or (name in matrix.REFUSED and not what.startswith("Different")), what
    found = {column: text for column, text in matrix.without_seconds(cells).items() if text != matrix.NOT_RUN}
    before = {column: text for column, text in matrix.without_seconds(kept()[name]).items() if text != matrix.NOT_RUN}
    run_twice = found.keys() & before.keys()  # without OPTIMUM_PYTHON, one column is not run
    assert {column: found[column] for column in run_twice} == {column: before[column] for column in run_twice}


def test_every_model_has_a_row_that_is_same_or_refused() -> None:
    assert list(kept()) == list(matrix.NAMES)
    for name, cells in kept().items():
        for mode in matrix.MODES:
            assert cells[mode].startswith(matrix.SAME) or name in matrix.REFUSED
