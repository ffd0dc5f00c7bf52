"""`lora_export.export_torchscript`: one call, a proven file, a result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import lora_export as le
from lora_export.api import torchscript
from lora_export.errors import Different
from support.api import MODEL, A, B, Recorder, an_adapter


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


def test_a_wrong_script_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchscript.layers, "fold", lambda module, plan: None)  # the adapter is left out
    with pytest.raises(Different) as refused:
        le.export_torchscript(MODEL, tmp_path / "m.pt", adapters=an_adapter(tmp_path / "adapter"))
    assert refused.value.proof.verdict.outcome == "different"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
