"""Sessions of onnxruntime: the requested provider, or an error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from lora_export.errors import EnvironmentLacking, InputRefused, RuntimeRefused
from lora_export.runtime import ort_session
from lora_export.runtime.ort_session import InMemoryGraph, open_session

TEXT = '<ir_version: 8, opset_import: ["" : 17]> g (float[n] x) => (float[n] y) { y = Neg (x) }'


def a_graph() -> InMemoryGraph:
    return InMemoryGraph("a graph", onnx.parser.parse_model(TEXT).SerializeToString())


def options() -> onnxruntime.SessionOptions:
    made = onnxruntime.SessionOptions()
    made.log_severity_level = ort_session.LOG_FATAL
    return made


def test_session_runs_on_the_requested_provider() -> None:
    assert open_session(a_graph(), "cpu", options()).get_providers() == ["CPUExecutionProvider"]


def test_unknown_provider_is_refused() -> None:
    with pytest.raises(InputRefused, match="unknown provider 'tpu'; known: cpu, cuda"):
        open_session(a_graph(), "tpu", options())


def test_provider_that_was_not_compiled_in_is_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EnvironmentLacking, match="has no CUDAExecutionProvider: pip install onnxruntime-gpu"):
        open_session(a_graph(), "cuda", options())


def test_provider_that_falls_back_is_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *given, **_: session(*given, providers=["CPUExecutionProvider"])
    )
    with pytest.raises(EnvironmentLacking, match="could not be loaded; onnxruntime would have used CPUExecution"):
        open_session(a_graph(), "cuda", options())


def test_refused_graph_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeRefused, match="onnxruntime refused a graph: "):
        open_session(InMemoryGraph("a graph", b"noise"), "cpu", options())
    (tmp_path / "noise.onnx").write_bytes(b"noise")
    with pytest.raises(RuntimeRefused, match=r"onnxruntime refused .*noise\.onnx: "):
        open_session(tmp_path / "noise.onnx", "cpu", options())
    with pytest.raises(InputRefused, match=r"none\.onnx: No such file"):
        open_session(tmp_path / "none.onnx", "cpu", options())


@pytest.mark.parametrize(
    ("stored", "linked"),
    [
        ({"model.onnx": "v3/model.onnx", "model.onnx_data": "v3/model.onnx_data"}, ["model.onnx"]),
        (
            {"model.onnx": f"blobs/{'a' * 64}", "model.onnx_data": f"blobs/{'b' * 64}"},
            ["model.onnx", "model.onnx_data"],
        ),
    ],
    ids=["the newest version", "a Hugging Face cache"],
)
def test_a_link_to_a_graph_with_external_data(stored: dict[str, str], linked: list[str], tmp_path: Path) -> None:
    graph = onnx.parser.parse_model(TEXT.replace("Neg (x) }", "Add (x, b) }"))
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(1, np.float32), "b"))
    onnx.save(graph, tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    for name, target in stored.items():
        (tmp_path / target).parent.mkdir(exist_ok=True)
        (tmp_path / name).rename(tmp_path / target)
    folder = tmp_path / "snapshots" / "abc"
    folder.mkdir(parents=True)
    for name in linked:
        (folder / name).symlink_to(Path("..", "..", stored[name]))
    (y,) = open_session(folder / "model.onnx", "cpu", options()).run(None, {"x": np.zeros(2, np.float32)})
    assert y.tolist() == [1, 1]


def test_an_operator_that_onnx_lacks_in_bfloat16_has_a_way_out() -> None:
    """The routers of gpt-oss call TopK."""
    text = TEXT.replace("y) { y = Neg (x) }", "y, int64[n] i) <int64[1] k = {1}> { y, i = TopK (x, k) }")
    of_bfloat16, of_float16 = (
        InMemoryGraph("a graph", onnx.parser.parse_model(text.replace("float[", f"{kind}[")).SerializeToString())
        for kind in ("bfloat16", "float16")
    )
    with pytest.raises(RuntimeRefused, match=r'operator \(TopK\).*\nExport the model in float16 \(dtype="float16"\)'):
        open_session(of_bfloat16, "cpu", options())
    assert open_session(of_float16, "cpu", options()).get_outputs()[0].type == "tensor(float16)"
