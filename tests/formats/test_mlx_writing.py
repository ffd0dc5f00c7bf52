"""Adapters for mlx-lm: they are read back bit for bit, and what mlx-lm has no place for is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_export
from lora_export.errors import InputRefused
from lora_export.lora import Adapter, ExpertAxes, LoraPair, expert_name
from support.written import adapter_of, assert_same_pairs, converted, low_rank

E = "model.layers.0.mlp.experts"


def test_the_config_is_mlx_lms_own(tmp_path: Path) -> None:
    adapter = adapter_of({"model.layers.3.fc": low_rank(3, 2, 4, scale=2.5)})
    lora_export.convert(adapter, tmp_path / "out", to="mlx")
    assert json.loads((tmp_path / "out/adapter_config.json").read_text()) == {
        "fine_tune_type": "lora",
        "num_layers": 1,
        "lora_parameters": {"rank": 4, "scale": 2.5, "dropout": 0.0, "keys": ["model.layers.3.fc"]},
    }


def test_mlx_lm_loads_what_was_written(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx runs on Linux and macOS")
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.tuner.utils import load_adapters

    sizes: dict[str, Any] = {"num_hidden_layers": 2, "intermediate_size": 6, "num_attention_heads": 2, "vocab_size": 7}
    model = Model(ModelArgs(model_type="llama", hidden_size=8, rms_norm_eps=1e-5, **sizes))
    name = "model.layers.1.mlp.up_proj"
    pair = low_rank(6, 8, 2, scale=3.0)
    lora_export.convert(adapter_of({name: pair}), tmp_path / "out", to="mlx")
    before = np.array(model.model.layers[1].mlp.up_proj.weight)
    load_adapters(model, str(tmp_path / "out"))
    after = np.array(model.model.layers[1].mlp.up_proj.fuse().weight)
    np.testing.assert_allclose(after - before, pair.delta(), rtol=1e-4, atol=1e-5)
    assert mx is not None


def test_experts_are_stacked_under_mlx_lms_name(tmp_path: Path) -> None:
    pairs = {expert_name(f"{E}.up_proj", n): low_rank(4, 3, 2, seed=n, as_stored=True) for n in range(3)}
    adapter = adapter_of(pairs, experts={f"{E}.up_proj": ExpertAxes.OUT_IN})
    back = converted(adapter, tmp_path, "mlx")
    assert_same_pairs(back, adapter)
    assert back.spelled(f"{E}.up_proj[0]") == "model.layers.0.mlp.switch_mlp.up_proj.lora_a"


@pytest.mark.parametrize(
    ("adapter", "problem"),
    [
        (
            adapter_of({"a": low_rank(2, 2, 1), "b": low_rank(2, 2, 2)}),
            "several ranks and scales: 1 and 2, 2 and 2; mlx-lm has one for all layers",
        ),
        (
            adapter_of({"a": low_rank(2, 2, 1, magnitude=np.ones(2)), "b": low_rank(2, 2, 1)}),
            "DoRA on some layers; mlx-lm has it on all or none",
        ),
        (
            adapter_of({"c": LoraPair(a=np.ones((1, 2, 3)), b=np.ones((2, 1, 1)), scale=1.0)}),
            "c: a convolution, or DoRA on an embedding",
        ),
        (
            adapter_of({"fc": low_rank(2, 2, 1)}, replaced={"head.weight": np.ones((2, 2))}),
            "head.weight: a whole tensor",
        ),
        (
            adapter_of({f"{E}.0.w1": low_rank(2, 2, 1), f"{E}.2.w1": low_rank(2, 2, 1)}),
            f"{E}: experts of different shapes, ranks or scales, or without a pair",
        ),
        (adapter_of({f"{E}.0.w1": low_rank(2, 2, 1, magnitude=np.ones(2))}), f"{E}: experts with DoRA"),
        (adapter_of({}, replaced={"head.weight": np.ones((2, 2))}), "it has no low-rank pair"),
    ],
)
def test_what_mlx_lm_cannot_express_is_refused_by_name(tmp_path: Path, adapter: Adapter, problem: str) -> None:
    with pytest.raises(InputRefused) as refused:
        lora_export.convert(adapter, tmp_path / "out", to="mlx")
    assert problem in str(refused.value)
    assert list(tmp_path.iterdir()) == []
