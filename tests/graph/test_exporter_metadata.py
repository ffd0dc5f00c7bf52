"""Notes of exporters, which a saved graph does not contain, and names, which it does."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lora_export.graph.find_sites import find_sites
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.onnx_file.writing import save_graph
from support.exported_models import EVERY_MODEL, exported, inputs
from support.graphs import a_graph, run
from support.small_graphs import LINEAR


@EVERY_MODEL
def test_saved_export_contains_names_and_no_machine_paths(tmp_path: Path, name: str) -> None:
    made = exported(name)
    before = find_sites(made.graph).specs
    feeds = {key: value.numpy() for key, value in inputs(name, 3, 5).items()}
    expected = run(made.graph, **feeds)
    (path,) = save_graph(made.graph, tmp_path, "model.onnx")
    content = path.read_bytes()
    for trace in (
        b"site-packages",
        b"graphs.py",
        b'File "',
        str(Path.cwd()).encode(),
        str(Path.home()).encode() + b"/",
    ):
        assert trace not in content
    again = load_graph(path)
    assert find_sites(again).specs == before
    assert all(np.array_equal(value, expected[key]) for key, value in run(again, **feeds).items())


def test_other_notes_stay_except_stack_traces(tmp_path: Path) -> None:
    model = a_graph(LINEAR)
    node = model.graph[0]
    node.metadata_props["author"] = "somebody"
    node.metadata_props["trace"] = 'File "/home/somebody/model.py", line 3, in forward'
    node.doc_string = 'File "/home/somebody/model.py", line 3'
    model.graph[1].doc_string = "adds the bias"
    (path,) = save_graph(model, tmp_path, "model.onnx")
    again = load_graph(path).graph
    assert dict(again[0].metadata_props) == {"author": "somebody"}
    assert [node.doc_string for node in again] == [None, "adds the bias", None]
