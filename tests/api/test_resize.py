"""`lora_export.resize`: the files, PEFT's outputs with them, and what is left behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file

import lora_export as le
from lora_export.errors import InputRefused, OutputFailed, WrongUsage
from lora_export.storage.json_files import read_json
from support.combined import IDS, LAYERS, adapted, layers
from support.handmade import peft_adapter


def test_peft_loads_the_smaller_adapter(tmp_path: Path) -> None:
    adapted(tmp_path, {"r": 4, "use_rslora": True, "rank_pattern": {"linear": 3}, "modules_to_save": ["point"]} | {
        "target_modules": [layer for layer in LAYERS if layer != "point"]
    })  # fmt: skip
    result = le.resize(tmp_path / "one", tmp_path / "small", rank=2)
    assert [layer.rank for layer in result.layers] == [2] * 4 and 0.5 < result.share < 0.99
    net, old = layers().eval(), le.load_adapter(tmp_path / "one")
    state = {name: value.clone() for name, value in net.state_dict().items()}
    for module, pair in old.pairs.items():
        u, s, vt = np.linalg.svd(pair.delta().reshape(pair.shape[0], -1).astype(np.float64), full_matrices=False)
        best = ((u[:, :2] * s[:2]) @ vt[:2]).reshape(pair.shape).astype(np.float32)
        state[f"{module}.weight"] += torch.from_numpy(best.T.copy() if module in ("table", "conv1d") else best)
    before = net(IDS).detach()
    net.load_state_dict(state)
    loaded = peft.PeftModel.from_pretrained(layers(), tmp_path / "small").eval()
    torch.testing.assert_close(loaded(IDS).detach(), net(IDS).detach(), atol=1e-5, rtol=0)
    assert (before - net(IDS).detach()).abs().max() > 0.02
    stored = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "small")]
    key = "base_model.model.point.weight"
    np.testing.assert_array_equal(stored[0][key], stored[1][key])


def test_the_record_names_the_adapter(tmp_path: Path) -> None:
    peft_adapter(tmp_path / "big", {"fc": (np.eye(3), np.eye(3))})
    (tmp_path / "big/config.json").write_text('{"model_type": "bert"}')
    le.resize(f"fr={tmp_path / 'big'}", tmp_path / "small", energy=0.5)
    record = read_json(tmp_path / "small/lora_export.json")
    assert record["sources"][0]["name"] == "fr" and record["settings"] == {"resize": {"energy": 0.5}}
    assert (tmp_path / "small/config.json").read_text() == '{"model_type": "bert"}'
    assert le.load_adapter(tmp_path / "small").pairs["fc"].rank == 2


@pytest.mark.parametrize(
    ("options", "error"), [({}, WrongUsage), ({"rank": 0}, WrongUsage), ({"energy": 2}, WrongUsage)]
)
def test_a_refusal_leaves_nothing(tmp_path: Path, options: dict[str, int], error: type[Exception]) -> None:
    peft_adapter(tmp_path / "big", {"fc": (np.eye(3), np.eye(3))})
    with pytest.raises(error):
        le.resize(tmp_path / "big", tmp_path / "small", **options)  # type: ignore[arg-type]
    with pytest.raises(OutputFailed):
        le.resize(tmp_path / "big", tmp_path / "big", rank=1)
    with pytest.raises(InputRefused):
        le.resize(tmp_path / "nowhere", tmp_path / "small", rank=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big"]
