"""`lora_export.export_torchscript`: one call, a proven file, a result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

import lora_export as le
from lora_export.api import torchscript
from lora_export.api.programs import program_format, pte
from lora_export.api.programs.torchscript import follows
from lora_export.errors import Different, OutputFailed, WrongUsage
from lora_export.formats.peft_keys import SCALE_IN_B
from lora_export.models.model import Model
from lora_export.options.export import TorchScriptOptions
from support.api import MODEL, A, B, Recorder, an_adapter
from support.small_models import small_adapter, small_model


@pytest.mark.parametrize("lora", ["merged", "nodes"])
def test_a_proven_script_computes_the_adapted_layer(tmp_path: Path, lora: str) -> None:
    seen = Recorder()
    adapter = an_adapter(tmp_path / "adapter")
    result = le.export_torchscript(MODEL, tmp_path / "m.pt", adapters=adapter, lora=lora, **seen.callbacks)
    assert result.proof is not None and result.proof.verdict.same
    dense = le.load_model(MODEL).module.get_submodule("dense")
    rows, weights = torch.linspace(-1, 1, 48).reshape(2, 3, 8), torch.ones(2, 3)
    weight = dense.weight.detach().numpy().astype(np.float64) + B @ A
    expected = np.tanh(rows.numpy() @ weight.T + dense.bias.detach().numpy())
    script = torch.jit.load(result.output)
    np.testing.assert_allclose(script(rows, weights)[0].detach().numpy(), expected, atol=1e-5)
    assert {"loading the model", "tracing", "writing"} <= set(seen.stages)


@pytest.mark.parametrize(
    ("output", "has_adapter", "options", "says"),
    [
        ("m.pt2", True, {"lora": "inputs"}, r"is for an output that ends in \.pte, and needs adapters="),
        ("m.pte", False, {"lora": "inputs"}, r"is for an output that ends in \.pte, and needs adapters="),
        ("m.pte", True, {"lora": "inputs", "combination": "linear"}, r"combination= is for lora=\"merged\" and nodes"),
        ("m.pte", True, {"max_rank": 4}, r"max_rank= is for lora=\"inputs\": in other programs an adapter has its own"),
    ],
)
def test_adapters_are_inputs_of_a_pte_alone(
    output: str, has_adapter: bool, options: Any, says: str, tmp_path: Path
) -> None:
    adapters = an_adapter(tmp_path / "adapter") if has_adapter else ()
    with pytest.raises(WrongUsage, match=says):
        le.export_torchscript(MODEL, tmp_path / output, adapters=adapters, **options)


def test_a_pte_never_replaces_the_adapter_that_it_was_made_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pte, "require", lambda: None)
    seen, trained = Recorder(), tmp_path / "m.safetensors"
    pair = {
        f"base_model.model.dense.lora_{side}.weight": np.float32(factor)
        for side, factor in zip("AB", (A, B), strict=True)
    }
    save_file(pair, trained, SCALE_IN_B)
    before = trained.read_bytes()
    options: Any = {"adapters": trained, "lora": "inputs", "overwrite": True}
    with pytest.raises(OutputFailed, match=r"m\.safetensors is an input, and would be replaced"):
        le.export_torchscript(MODEL, tmp_path / "served.pte", **options, **seen.callbacks)
    assert trained.read_bytes() == before and "loading the model" not in seen.stages


def test_a_wrong_script_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchscript.layers, "fold", lambda module, plan: None)  # the adapter is left out
    with pytest.raises(Different) as refused:
        le.export_torchscript(MODEL, tmp_path / "m.pt", adapters=an_adapter(tmp_path / "adapter"))
    assert refused.value.proof.verdict.outcome == "different"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.slow
def test_a_trace_takes_texts_alone_where_it_fixes_the_images(tmp_path: Path) -> None:
    """LLaVA's code lists the images of its example one by one."""
    base = small_model("llava", tmp_path / "base")
    adapter = small_adapter("llava", base, tmp_path / "adapter", inside=r"language_model.*layers")
    recorder = Recorder()
    result = le.export_torchscript(base, tmp_path / "model.pt", adapters=adapter, **recorder.callbacks)
    assert result.proof and result.proof.verdict.same
    assert "with images among its tokens" in result.proof.verdict.not_judged[0]
    assert any("the file takes texts without images. With images, the" in text for text in recorder.messages)
    assert le.verify(tmp_path / "model.pt", base, adapters=adapter)  # its record names its inputs


class Counting(nn.Module):
    """A layer, whose trace repeats the number of rows of its example."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + len(list(x))


def test_a_trace_that_repeats_its_example_is_noticed() -> None:
    def make(sizes: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"x": torch.ones(sizes["batch"], 3)}

    model = Model("counting", nn.Identity(), {"x": {0: "batch"}}, make, {"batch": 2})
    for module, expected in ((Counting(), False), (nn.Linear(3, 3), True)):
        named = module if expected is False else Named(module)
        script = torch.jit.trace(named, example_kwarg_inputs={"x": torch.ones(2, 3)}, strict=False)
        assert follows(script, named, model) is expected


def test_a_trace_that_repeats_its_example_leaves_out_the_images() -> None:
    def make(sizes: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"x": torch.ones(sizes["batch"], 3)}

    texts = Model("counting", nn.Identity(), {"x": {0: "batch"}}, make, {"batch": 2}, not_judged=("images",))
    messages: list[str] = []
    script: Any = program_format("torchscript")
    options = TorchScriptOptions("m", "m.pt", on_message=messages.append)
    taken, _ = torchscript._made(replace(texts, text_only=texts), Counting(), script, options)
    assert taken.not_judged == ("images (the trace is right for one number and one size of images alone)",)
    assert messages and "takes texts without images" in messages[0]
    assert torchscript._made(texts, Counting(), script, options)[0] is texts and len(messages) == 1


class Named(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)
