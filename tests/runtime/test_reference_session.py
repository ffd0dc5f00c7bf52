"""Graphs in bfloat16, which ONNX's reference evaluator runs where onnxruntime has no kernels."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import peft
import pytest
import torch
from torch import nn

import lora_export as le
from lora_export.errors import RuntimeRefused
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.reference_session import EVALUATOR

BF16 = np.dtype(ml_dtypes.bfloat16)


def runner_of(text: str, folder: Path, **options: Any) -> OnnxRunner:
    header = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]> g '
    ir.save(ir.from_onnx_text(header + text), folder / "m.onnx")
    return OnnxRunner(folder / "m.onnx", **options)


def test_a_node_sums_in_fp32_and_rounds_once(tmp_path):
    runner = runner_of("(bfloat16[1,n] x) => (bfloat16[1,1] y) { h = Mul(x, x)  y = ReduceSum(h) }", tmp_path)
    assert runner.placement.requested_provider == EVALUATOR
    assert runner.axes == {"x": (1, None)}
    x = np.ones((1, 514), BF16)
    y = runner.run({"x": x})["y"]
    assert (y.dtype, y.item()) == (BF16, 512)  # the nearest of 8 bits; a sum in bfloat16 ends at 256


def test_casts_keep_the_dtype_that_they_name(tmp_path):
    runner = runner_of("(bfloat16[n] x) => (float[n] y) { h = Add(x, x)  y = Cast <to = 1> (h) }", tmp_path)
    assert runner.run({"x": np.array([257], BF16)})["y"].dtype == np.float32


def test_elements_are_gathered_on_axes_of_any_length(tmp_path):
    text = "(bfloat16[n] x, int64[m] i) => (bfloat16[m] y) { h = Add(x, x)  y = GatherElements(h, i) }"
    runner = runner_of(text, tmp_path)
    x = np.arange(100).astype(BF16)
    assert runner.run({"x": x, "i": np.array([99, -2, 0])})["y"].tolist() == [198, 196, 0]


def test_a_run_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    runner = runner_of("(bfloat16[n] x) => (bfloat16[n] y) { a = Add(x, x)  y = Add(a, a) }", tmp_path, timeout=0.05)
    run = type(runner.session._evaluator.rt_nodes_[0]).run
    slow = lambda node, *values, **options: (time.sleep(0.2), run(node, *values, **options))[1]  # noqa: E731
    monkeypatch.setattr(type(runner.session._evaluator.rt_nodes_[0]), "run", slow)
    with pytest.raises(RuntimeRefused, match="did not finish"):
        runner.run({"x": np.ones(3, BF16)})


@pytest.mark.parametrize("kind", ["float", "bfloat16"])
def test_operators_that_nobody_has_are_refused(tmp_path, kind):
    with pytest.raises(RuntimeRefused):
        runner_of(f"({kind}[n] x) => ({kind}[n] y) {{ y = com.microsoft.Unknown(x) }}", tmp_path)


FACTORY = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    return net, torch.randn(3, 5, 16)
"""


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("net")
    (folder / "net.py").write_text(FACTORY)
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    options = peft.LoraConfig(r=2, lora_alpha=16, target_modules=["0", "2"], init_lora_weights=False)
    peft.get_peft_model(net, options).save_pretrained(folder / "adapter")
    return f"{folder}/net.py:make", folder / "adapter"


@pytest.mark.parametrize("lora", ["merged", "nodes", "inputs", "rows"])
def test_every_mode_is_proven_in_bfloat16(adapted, tmp_path, lora):
    model, adapter = adapted
    result = le.export_onnx(model, tmp_path / "m", adapters=adapter, lora=lora, dtype="bfloat16")
    assert (result.proof.verdict.dtype, result.proof.placement.requested_provider) == ("bfloat16", EVALUATOR)
    assert str(result.precision) == "weights stored in bfloat16, computed in bfloat16"
    if lora in ("inputs", "rows"):
        (note,) = [note for note in result.proof.verdict.notes if "no adapter" in note]
        assert note.endswith("the control is every value × 1.1")
