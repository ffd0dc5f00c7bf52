"""Fingerprints of a graph's base weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_export.graph.insert.adapter_inputs import insert_inputs
from support.graphs import a_graph
from support.insertion import packed_graph, with_inputs
from support.small_graphs import GEMM


def test_fingerprint_depends_on_base_only() -> None:
    row = a_graph(GEMM)  # stored (out, in)
    column = a_graph("""
        g (float[N,3] x) => (float[N,2] y)
        <float[3,2] m.weight = {1,4,2,5,3,6}>
        { [n] y = MatMul(x, m.weight) }""")
    other = a_graph(GEMM.replace("{1,2,", "{1,3,"))
    renamed = a_graph(GEMM.replace("m.weight", "k.weight"))
    fingerprints = [with_inputs(model, *places).base for model, places in [
        (row, ["m.weight"]), (column, ["m.weight"]), (a_graph(GEMM), []), (other, ["m.weight"]), (renamed, []),
    ]]  # fmt: skip
    assert fingerprints[0] == fingerprints[1] == fingerprints[2]
    assert len(set(fingerprints)) == 3


@pytest.mark.parametrize("as_pairs", [False, True])
def test_fingerprint_of_quantised_base_is_of_stored_tensors(tmp_path: Path, as_pairs: bool) -> None:
    def fingerprint(**options: Any) -> str:
        model, found = packed_graph(tmp_path, **options)
        return insert_inputs(model, found, ["q.weight"]).base

    fingerprints = [
        fingerprint(bits=4, as_pairs=as_pairs),
        fingerprint(bits=4, block=16, as_pairs=as_pairs),
        fingerprint(bits=4, as_pairs=as_pairs, seed=1),
        fingerprint(),
    ]
    assert fingerprint(bits=4, as_pairs=as_pairs) == fingerprints[0]
    assert len(set(fingerprints)) == 4
