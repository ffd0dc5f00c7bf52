"""What has no strength at run time. `test_modes`, `test_scales` and `test_structured_branches` have what has one."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.formats.contract import read_strengths
from support.graphs import a_graph, an_adapter
from support.insertion import TWO_LAYERS, with_inputs, with_nodes
from support.small_graphs import LINEAR, PAIR

DORA = dataclasses.replace(PAIR, magnitude=[5.0, 0.5])


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            an_adapter({"m": DORA}),
            r"DoRA's lengths are computed for one strength: m\.weight\. Leave out strength_input",
        ),
        (
            an_adapter({"m": PAIR}, biases={"m": np.float32([1, 2])}),
            r"the change of a bias or a vector is merged: m\.bias\. .*a graph for each strength \(weights=\)",
        ),
        (
            an_adapter({}, replaced={"m.weight": np.ones((3, 2), np.float32)}),
            r"m\.weight: every change is a tensor that is replaced whole, .* Leave out strength_input",
        ),
    ],
)
def test_nodes_refuse_what_a_run_cannot_scale(adapter: Any, message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        with_nodes(a_graph(LINEAR), adapter, strength_input=True)


@pytest.mark.parametrize("factors", ["dora", "scaled"])
def test_inputs_refuse_factors(factors: str) -> None:
    with pytest.raises(InputRefused, match=r"factors that no strength multiplies: a\.weight and 1 more weight\."):
        with_inputs(
            a_graph(TWO_LAYERS), "a.weight", "b.weight", strength_input=True, **{factors: ["a.weight", "b.weight"]}
        )


def test_a_graph_has_the_input_once() -> None:
    model = a_graph(LINEAR)
    with_nodes(model, an_adapter({"m": PAIR}, name="fr"), strength_input=True)
    assert read_strengths(model.metadata_props, "g.onnx") == ["fr"]
    with pytest.raises(InputRefused, match="the graph has adapter_strengths already"):
        with_nodes(model, an_adapter({"m": PAIR}, name="de"), strength_input=True)


@pytest.mark.parametrize("record", ["{}", '{"adapters": []}', '{"adapters": "fr"}', '{"adapters": [1]}'])
def test_a_damaged_record_is_refused(record: str) -> None:
    assert read_strengths({}, "g.onnx") == []
    with pytest.raises(InputRefused, match=r"g\.onnx: its record of strengths .* names no adapters"):
        read_strengths({"lora_export.strengths": record}, "g.onnx")
