"""Every field of PEFT's `LoraConfig` × kinds of layers × holders of weights: right, or refused by name.

The whole table is slow. Its counts are stored in tests/README.md; with `--keep` it writes them. The normal suite runs
every field on one kind of layer.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch

from support import TESTS, lora_configs, tables
from support.lora_configs import CASES, HOLDERS, KINDS, NO_ADAPTER, REFUSED, RIGHT, WRONG, Case, Trained

README = TESTS / "README.md"
TABLE = "fields of LoraConfig"
COLUMNS = (RIGHT, REFUSED, WRONG, NO_ADAPTER)
# In the normal suite. The export of a base takes time, and so does writing to a disk.
WITH_GRAPH = ("Linear", "Embedding")
QUICK = [["bare file", "attached"], ["folder", "folded"]]


@pytest.fixture(autouse=True, scope="module")
def _one_thread_and_a_folder_of_graphs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with lora_configs.graphs_in(tmp_path_factory.mktemp("graphs")):
        yield
    torch.set_num_threads(before)


def outcomes(case: Case, kind: str, folder: Path, holders: list[str]) -> Iterator[tuple[str, str, str]]:
    """The holder, the outcome and the message of each combination."""
    adapter = lora_configs.train(case, kind, folder / "adapter")
    for holder in holders:
        if isinstance(adapter, Trained):
            yield holder, *lora_configs.outcome(case, adapter, kind, holder, folder / holder)
        else:
            yield holder, NO_ADAPTER, adapter


def test_every_field_of_pefts_config_has_a_case() -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    covered = {case.field for case in CASES}
    assert (fields - covered, covered - fields) == (set(), set())


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_a_field_is_right_or_refused_by_name(number: int, tmp_path: Path) -> None:
    case = CASES[number]
    kinds = [*list(KINDS)[number % len(KINDS) :], *KINDS]
    for kind in kinds:  # the first that PEFT accepts
        holders = [*QUICK[number % 2], *(["graph, merged", "graph, nodes"] if kind in WITH_GRAPH else [])]
        found = list(outcomes(case, kind, tmp_path / kind, holders))
        if any(result != NO_ADAPTER for _, result, _ in found):
            break
    assert [one for one in found if one[1] in (WRONG, NO_ADAPTER)] == []


@pytest.mark.slow
def test_every_combination_is_right_or_refused_by_name(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    counts = {field: Counter[str]() for field in dict.fromkeys(case.field for case in CASES)}
    wrong = []
    for case in CASES:
        for kind in KINDS:
            for holder, result, message in outcomes(case, kind, tmp_path / str(CASES.index(case)) / kind, [*HOLDERS]):
                counts[case.field][result] += 1
                if result == WRONG:
                    wrong.append(f"{case}, {kind}, {holder}: {message}")
    total = sum(counts.values(), Counter[str]())
    cells = {f"`{field}`": count for field, count in counts.items()} | {"together": total}
    text = tables.table({row: {name: str(cell[name]) for name in COLUMNS} for row, cell in cells.items()}, "field")
    if pytestconfig.getoption("--keep"):
        tables.put(README, TABLE, f"{text}\n\npeft {peft.__version__}")
    assert wrong == []
    assert tables.rows(text) == tables.rows(tables.text(README, TABLE))
