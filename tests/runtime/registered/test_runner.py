"""Runners by name, and functions of the user, in a process of their own."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import peft
import pytest
import torch
import transformers

import lora_export as le
from lora_export.artifacts.artifact import open_artifact
from lora_export.errors import EnvironmentLacking, InputRefused, RuntimeRefused
from lora_export.isolation.process import IsolatedProcess
from lora_export.runtime.registered import openvino
from lora_export.runtime.registered.runner import RegisteredRunner
from support import ROOT, RUNNERS
from support.browser import NODE, needs_chromium, needs_onnxruntime_web
from support.small_models import small_adapter, small_model

MODULES = r"(.*\.)?encoder\..*\.(query|key|value|dense)"
IN_BROWSER = ROOT / "tests" / "support" / "browser_runner.py"
TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[n, 2] x, int64[n] add) => (float[n, 2] y) <float[2, 2] w = {1.0, 2.0, 3.0, 4.0}, int64[1] last = {1}>
{ wide = Cast <to = 1> (add)  column = Unsqueeze (wide, last)  product = MatMul (x, w)  y = Add (product, column) }
"""
INPUTS = {"x": np.array([[1, 0], [0, 1], [1, 1]], np.float32), "add": np.array([0, 10, 20])}
Y = [[1, 2], [13, 14], [24, 26]]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("registered") / "m.onnx"
    onnx.save(onnx.parser.parse_model(TEXT), path)
    return path


@pytest.mark.parametrize("name", ["by_name", "by_order", "one_array", "writes_into_inputs", "prints", "openvino"])
def test_a_runner_gives_outputs(name: str, graph: Path) -> None:
    is_ours = name == "openvino"
    with contextlib.closing(RegisteredRunner(name if is_ours else f"{RUNNERS}:{name}", open_artifact(graph))) as runner:
        first, second = runner.run(INPUTS), runner.run({**INPUTS, "add": 2 * INPUTS["add"]})
        assert [array.tolist() for array in first.values()] == [Y]
        assert [array.tolist() for array in second.values()] == [[[1, 2], [23, 24], [44, 46]]]
        assert (list(first) == ["y"]) == runner.names_known == (name not in ("by_order", "one_array"))
        assert runner.axes == ({"x": (None, 2), "add": (None,)} if is_ours else {})
        assert INPUTS["x"].sum() == 4


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("fails", RuntimeRefused, r"runners\.py:\d+: KeyError: 'nothing'"),
        ("says_words", RuntimeRefused, "a run returned str, and not arrays by name"),
        ("crashes", RuntimeRefused, r"the process of the runner .*:crashes ended: SIGABRT$"),
        ("sleeps", RuntimeRefused, r"m\.onnx did not finish within 3 seconds"),
        ("opens_nothing", InputRefused, "returned int; a runner returns a function from inputs to outputs"),
        ("nothing", InputRefused, r"runners\.py has no function nothing; it has .*by_name"),
    ],
)
def test_a_failing_runner_is_refused(name: str, error: type[Exception], says: str, graph: Path) -> None:
    seconds = 3 if name == "sleeps" else 100  # the others end by themselves, late on a busy machine
    with pytest.raises(error, match=says):
        RegisteredRunner(f"{RUNNERS}:{name}", open_artifact(graph), timeout=seconds).run(INPUTS)


@pytest.mark.parametrize(
    ("key", "size"),
    [
        *(("limits", size) for size in (4, [0], [0, "9"], [None, None], [0, -3], [5, 2], [True, 2], [0.5, 2], "ab")),
        ("limits", [10**9, 10**9]),
        *(("axes", size) for size in ("n", -1, 2.5, True, [4])),
    ],
)
def test_sizes_that_no_input_has_are_refused(key: str, size: Any, graph: Path) -> None:
    def runner(sizes: list[Any]) -> RegisteredRunner:
        header = {"axes": {}, "limits": {}, "notes": [], "cannot_give": [], key: {"x": sizes}}
        process = SimpleNamespace(answer=lambda seconds: (header, {}))
        return RegisteredRunner("theirs", open_artifact(graph), process=cast(IsolatedProcess, process))

    right = [4, None] if key == "axes" else [[0, None], [4, 4], [0, 10**12]]
    assert len(getattr(runner(right), key)["x"]) == len(right)
    with pytest.raises(RuntimeRefused, match=f"^the runner theirs states {key} of x: {re.escape(repr(size))}\\. "):
        runner([*right, size])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere.py:run", r"there is no file nowhere\.py"),
        ("tensorrt", "there is no runner 'tensorrt': give one of onnx-reference, openvino, or file.py:function"),
    ],
)
def test_an_unknown_runner_is_named(name: str, says: str, graph: Path) -> None:
    with pytest.raises(InputRefused, match=says):
        RegisteredRunner(name, open_artifact(graph))


def test_a_package_registers_a_runner(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "toaster-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toaster\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lora_export.runners]\ntoaster = toasting:by_name\n")
    (tmp_path / "toasting.py").write_text(RUNNERS.read_text())
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with contextlib.closing(RegisteredRunner("toaster", open_artifact(graph))) as runner:
        assert runner.run(INPUTS)["y"].tolist() == Y
        assert runner.notes == ["run by the runner toaster"]
    with pytest.raises(InputRefused, match="give one of onnx-reference, openvino, toaster, or"):
        RegisteredRunner("kettle", open_artifact(graph))


def test_openvino_reads_its_own_files_with_their_weights(graph: Path, tmp_path: Path) -> None:
    library = openvino.import_openvino()
    assert "openvino.tools.ovc.telemetry_stub" in sys.modules  # nothing is sent
    library.save_model(library.Core().read_model(graph), tmp_path / "m.xml", compress_to_fp16=False)
    model = open_artifact(tmp_path / "m.xml")
    assert sorted(model.files) == ["m.bin", "m.xml"]
    with contextlib.closing(RegisteredRunner("openvino", model)) as runner:
        assert runner.run(INPUTS)["y"].tolist() == Y
        assert "INFERENCE_PRECISION_HINT=f32" in runner.notes[0]
        with pytest.raises(RuntimeRefused, match="the candidate has no input z; the candidate needs add"):
            runner.run({"x": INPUTS["x"], "z": INPUTS["x"]})


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "lora_export.inputs",
            "has its adapter as optional inputs, of which .* or with the adapter as nodes or merged",
        ),
        ("lora_export.strengths", "has the strengths of its adapters as an optional input, .* or without strengths"),
    ],
)
def test_openvino_takes_no_optional_inputs(graph: Path, key: str, message: str, tmp_path: Path) -> None:
    model = onnx.load(graph)
    model.metadata_props.add(key=key, value='{"base": "00000000", "names": "", "places": [], "adapters": ["fr"]}')
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(InputRefused, match=message):
        openvino.open_compiled(str(tmp_path / "m.onnx"))


def test_openvino_is_named_where_it_is_not_installed(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.import_module", lambda name: exec("raise ImportError"))
    with pytest.raises(EnvironmentLacking, match=r"the runner openvino needs openvino .*pip install "):
        openvino.open_compiled(str(graph))


# --- Small models, in OpenVINO and in a browser, which is a user's runner ---


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["merged", "inputs"])
@pytest.mark.parametrize("model", ["bert", "vit", "llama"])
@pytest.mark.parametrize(
    ("runner", "version"),
    [
        pytest.param(
            f"{IN_BROWSER}:Page", "onnxruntime-web 1.", marks=[needs_chromium, needs_onnxruntime_web], id="browser"
        ),
        pytest.param("openvino", "OpenVINO 20", id="openvino"),
    ],
)
def test_a_graph_is_the_adapted_model(
    runner: str, version: str, model: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODE_FOLDER", str(NODE))
    base, graph, file = small_model(model, tmp_path / "base"), tmp_path / "m.onnx", tmp_path / "fr.onnx_adapter"
    adapter, other = small_adapter(model, base, tmp_path / "fr"), small_adapter(model, base, tmp_path / "de", seed=2)
    plain = {"required_inputs": True} if mode == "inputs" else {}  # neither takes optional inputs
    le.export_onnx(base, graph, adapters=adapter, lora=mode, verify=False, **plain)
    options = {"runner": runner} | ({"onnx_adapter": file} if plain else {})
    result = le.verify(graph, base, adapters=adapter, **options)
    assert result.verdict.same and f"run by {version}" in str(result), str(result)
    assert le.verify(graph, base, adapters=other, **options).verdict.outcome == "different"


STRENGTHS: Sequence[Mapping[str, Any]] = [
    {"lora_alpha": 1},
    {"lora_alpha": 2.5},
    {"r": 1, "lora_alpha": 32},
    {"r": 8, "lora_alpha": 3},
    {"use_rslora": True},
    {"use_rslora": True, "r": 2, "lora_alpha": 5},
    {"rank_pattern": {"query": 2}},
    {"alpha_pattern": {"value": 10}},
    {"rank_pattern": {"query": 8}, "alpha_pattern": {"query": 1, "dense": 6}},
    {"use_rslora": True, "rank_pattern": {"key": 8}},
    {"use_rslora": True, "alpha_pattern": {"key": 7}},
    {"use_rslora": True, "rank_pattern": {"dense": 1}, "alpha_pattern": {"value": 0.5}},
]


@pytest.mark.slow
def test_openvino_runs_each_adapter_at_its_own_strength(tmp_path: Path) -> None:
    base, graph = small_model("bert", tmp_path / "base"), tmp_path / "m.onnx"
    every = small_adapter("bert", base, tmp_path / "every")
    le.export_onnx(base, graph, adapters=every, lora="inputs", required_inputs=True, verify=False)
    ids = torch.tensor([[5, 7, 9, 11]])
    inputs = {"input_ids": ids.numpy(), "attention_mask": np.ones((1, 4), np.int64), "token_type_ids": 0 * ids.numpy()}
    for number, fields in enumerate(STRENGTHS):
        torch.manual_seed(number)
        config = peft.LoraConfig(
            **{"r": 4, "lora_alpha": 16} | dict(fields), target_modules=MODULES, init_lora_weights=False
        )
        model = peft.get_peft_model(transformers.BertModel.from_pretrained(base), config).eval()
        model.save_pretrained(tmp_path / str(number))
        file = le.convert(tmp_path / str(number), tmp_path / f"{number}.onnx_adapter", graph=graph).output
        with torch.no_grad():
            wanted = model(ids).last_hidden_state.numpy()
            with model.disable_adapter():
                without = model(ids).last_hidden_state.numpy()
        with contextlib.closing(RegisteredRunner("openvino", open_artifact(graph), adapter=Path(file))) as runner:
            found = next(iter(runner.run(inputs).values()))
        assert np.abs(found - wanted).max() < 1e-3 * np.abs(wanted - without).max(), fields
