"""Tables that an adapter repeats are left out of its plan for a graph; others stay."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from lora_export import plan
from lora_export.errors import InputRefused
from lora_export.formats.onnx_adapter import refuse_new_tables
from lora_export.graph.find_sites import find_sites
from lora_export.graph.unchanged_tables import without_unchanged_tables
from lora_export.lora import LoraPair
from lora_export.plan import Plan
from support.graphs import a_graph, an_adapter
from support.insertion import EMBEDDING, EMBEDDING_PAIR, TABLE
from support.small_graphs import GEMM, LINEAR, PAIR

OUT_IN = np.float32([[1, 2, 3], [4, 5, 6]])


def planned(model: ir.Model, module: str, pair: LoraPair, table: Any) -> Plan:
    adapter = an_adapter({module: pair}, replaced={f"{module}.weight": np.asarray(table)})
    sites = find_sites(model)
    return without_unchanged_tables(plan.make([adapter], sites.specs), sites)


@pytest.mark.parametrize(
    ("graph", "module", "pair", "table"),
    [
        (EMBEDDING, "words", EMBEDDING_PAIR, TABLE.astype(np.float32)),
        (EMBEDDING, "words", EMBEDDING_PAIR, TABLE.astype(ml_dtypes.bfloat16)),
        (GEMM, "m", PAIR, OUT_IN),
        (LINEAR, "m", PAIR, OUT_IN.T),
    ],
)
def test_an_equal_table_is_left_out(graph: str, module: str, pair: LoraPair, table: Any) -> None:
    steps = planned(a_graph(graph), module, pair, table)
    assert [(step.replace, len(step.terms)) for step in steps.steps] == [(None, 1)]
    refuse_new_tables(steps)


def test_a_table_with_one_other_value_stays_and_is_not_swapped() -> None:
    table = TABLE.astype(np.float32)
    table[3, 1] += 1
    steps = planned(a_graph(EMBEDDING), "words", EMBEDDING_PAIR, table)
    assert np.array_equal(steps.steps[0].replace, table)
    with pytest.raises(InputRefused, match=r"these whole tensors differ from the base's:\n  default, words\.weight\n"):
        refuse_new_tables(steps)
