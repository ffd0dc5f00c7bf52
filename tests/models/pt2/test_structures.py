"""Containers of inputs and outputs: no type that a file names is imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.hostile_programs import changed, refused


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
