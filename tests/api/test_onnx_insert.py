"""Adapters into a graph in memory, and the graph into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from lora_export.api.onnx_insert import insert_and_save, locate_steps, write_graph
from lora_export.api.onnx_request import OnnxRequest
from lora_export.errors import MatchError
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.lora import Adapter
from lora_export.runtime.onnx_runner import OnnxRunner
from support.api import Recorder
from support.graphs import a_graph, an_adapter
from support.small_graphs import DELTA, LINEAR, LINEAR_WEIGHT, PAIR

X = np.float32([[1, 2, 3], [0, 1, 0]])
BASE = (X @ np.float32(LINEAR_WEIGHT) + [10, 20]) * [7, 8]
ADAPTED = BASE + X @ DELTA.T * [7, 8]
ADAPTER = an_adapter({"m": PAIR}, name="fr", sha256="00" * 32)


def options(lora: str, *adapters: Adapter, **fields: Any) -> OnnxRequest:
    return OnnxRequest("base", Path("m.onnx"), lora=lora, adapters=adapters, **fields)


def written(lora: str, folder: Path, *adapters: Adapter, targets: tuple[str, ...] = (), **fields: Any) -> list[str]:
    """The names of the files beside the graph."""
    program, wanted = a_graph(LINEAR), options(lora, *adapters, **fields)
    return insert_and_save(program, locate_steps(program, wanted, None), wanted, list(targets), folder)


def test_nodes_compute_the_sum(tmp_path: Path) -> None:
    assert written("nodes", tmp_path, ADAPTER) == []
    assert OnnxRunner(tmp_path / "m.onnx").run({"x": X})["y"].tolist() == ADAPTED.tolist()


def test_inputs_take_an_adapters_file(tmp_path: Path) -> None:
    assert written("inputs", tmp_path, ADAPTER, weights=[2.0]) == ["fr.onnx_adapter"]
    runner = OnnxRunner(tmp_path / "m.onnx")
    assert runner.run({"x": X})["y"].tolist() == BASE.tolist()
    with_adapter = runner.with_adapter(tmp_path / "fr.onnx_adapter").run({"x": X})["y"]
    assert with_adapter.tolist() == (2 * ADAPTED - BASE).tolist()


def test_targets_get_inputs_for_future_adapters(tmp_path: Path) -> None:
    assert written("inputs", tmp_path, targets=("m.weight",)) == []
    with_dora = tmp_path / "dora"
    with_dora.mkdir()
    written("inputs", with_dora, targets=("m.weight",), dora=True)
    counts = [len(load_graph(folder / "m.onnx").graph.inputs) for folder in (tmp_path, with_dora)]
    assert counts == [1 + 2, 1 + 3]  # x, A and B; and DoRA's factor


def test_rows_choose_an_adapter_each(tmp_path: Path) -> None:
    assert written("rows", tmp_path, ADAPTER) == []
    outputs = OnnxRunner(tmp_path / "m.onnx").with_rows([1, 0]).run({"x": X})["y"]
    assert outputs.tolist() == [ADAPTED[0].tolist(), BASE[1].tolist()]


def test_stages_and_notes_are_reported(tmp_path: Path) -> None:
    seen = Recorder()
    noted = an_adapter({"base_model.m": PAIR}, name="fr")
    program, wanted = a_graph(LINEAR), options("nodes", noted, **seen.callbacks)
    located = locate_steps(program, wanted, None)
    insert_and_save(program, located, wanted, [], tmp_path)
    assert seen.stages == ["finding its weights", "inserting the adapters", "writing"]
    assert seen.messages and all(message.startswith("note: ") for message in seen.messages)


def test_an_adapter_that_does_not_fit_is_refused() -> None:
    with pytest.raises(MatchError, match="elsewhere"):
        locate_steps(a_graph(LINEAR), options("nodes", an_adapter({"elsewhere": PAIR})), None)
    assert locate_steps(a_graph(LINEAR), options("inputs"), None).plan is None


def test_large_weights_are_stored_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_export.graph.onnx_file import writing

    monkeypatch.setattr(writing, "MAX_INLINE_BYTES", 0)
    model = a_graph("g (float[N,64] x) => (float[N,64] y) <float[1] w = {1}> { y = MatMul(x, w) }")
    value = model.graph.initializers["w"]
    value.const_value, value.shape = ir.Tensor(np.ones((64, 64), np.float32), name="w"), ir.Shape([64, 64])
    (name,) = write_graph(model, options("merged"), tmp_path)
    assert name.startswith("m.onnx.") and sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "m.onnx"])
