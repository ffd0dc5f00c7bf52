"""Graphs, nodes and arguments that torch would not write are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.hostile_programs import Change, changed, refused, spoiled

GRAPH = ("graph_module", "graph")


NODE = (*GRAPH, "nodes", 0)


WRONG = [
    (spoiled(*GRAPH, "nodes", value={}), "expected a list"),
    (spoiled(*GRAPH, "nodes", 0, value=7), "expected a JSON object"),
    (spoiled(*NODE, "target", value=7), "expected a string"),
    (spoiled(*NODE, "inputs", value=None), "expected a list"),
    (spoiled(*NODE, "inputs", 0, "arg", value={}), "expected one field"),
    (spoiled(*NODE, "inputs", 0, "arg", value={"as_tensor": {"name": "missing"}}), "which nothing before it makes"),
    (spoiled(*NODE, "inputs", 0, "arg", value={"as_tensor": 3}), "expected a JSON object"),
    (spoiled(*NODE, "inputs", 0, "arg", value={"as_int": True}), "expected an integer"),
    (spoiled(*NODE, "inputs", 0, "arg", value={"as_int": 1 << 70}), "an integer of 71 bits is too large"),
    (spoiled(*NODE, "inputs", 0, "arg", value={"as_float": "1e5"}), "expected a number"),
    (spoiled(*NODE, "inputs", 0, "arg", value={"as_scalar_type": 99}), "torch's dtype 99"),
    (spoiled(*NODE, "inputs", 0, "arg", value={"as_scalar_type": [1]}), "expected an integer"),
    (spoiled(*NODE, "inputs", 0, "arg", value={"as_memory_format": 77}), "77 is no memory format"),
    (spoiled(*NODE, "inputs", 0, "arg", value={"as_layout": 1}), "only dense tensors"),
    (
        spoiled(*NODE, "inputs", 0, "arg", value={"as_custom_obj": {"name": "x", "class_fqn": "os.system"}}),
        "custom_obj",
    ),
    (spoiled(*NODE, "inputs", 0, "arg", value={"as_operator": "os.system"}), "as_operator"),
    (spoiled(*NODE, "inputs", 0, "name", value="evil"), "has no argument evil"),
    (spoiled(*NODE, "outputs", value=[{"as_tensor": {"name": "ids"}}]), "ids is made more than once"),
    (spoiled(*NODE, "outputs", value=[{"as_custom_obj": {}}]), "which is not supported"),
    (spoiled(*GRAPH, "inputs", value=[]), "which nothing before it makes"),
    (spoiled(*GRAPH, "outputs", value=[{"as_tensor": {"name": "missing"}}]), "which nothing before it makes"),
    (spoiled(*GRAPH, "tensor_values", value={}), "which is no tensor"),
]


@pytest.mark.parametrize(("change", "problem"), WRONG)
def test_json_that_torch_would_not_write_is_refused(good: Path, tmp_path: Path, change: Change, problem: str) -> None:
    assert problem in refused(changed(good, tmp_path, change))


@pytest.mark.parametrize(
    "kind", ["os.system", "subprocess.Popen", "evil_module.Evil", "builtins.eval", "transformers_evil.X"]
)
@pytest.mark.parametrize("spec", ["in_spec", "out_spec"])
def test_an_unknown_container_type_is_refused_and_not_imported(
    good: Path, tmp_path: Path, spec: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'payload-ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    leaf = {"type": None, "context": None, "children_spec": []}
    structure = json.dumps([1, {"type": kind, "context": '["a"]', "children_spec": [leaf]}])

    def change(graph: dict[str, Any]) -> None:
        graph["graph_module"]["module_call_graph"][0]["signature"][spec] = structure

    assert f"{kind!r} is no supported container" in refused(changed(good, tmp_path, change))
