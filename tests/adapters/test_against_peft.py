"""A combination equals PEFT's `add_weighted_adapter`, merged and as an adapter, on every kind of layer."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, get_args

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file

import lora_export as le
from lora_export.options.combining import Method
from support.combined import IDS, LAYERS, LAYOUT, WEIGHTS, adapted, combined_by_peft, layers, our_masks

METHODS = get_args(Method)

PRUNED = {"density": 0.6}
OPTIONS: dict[str, dict[str, Any]] = {
    method: PRUNED if any(word in method for word in ("ties", "dare", "magnitude")) else {} for method in METHODS
}


def merged(folder: Path, combination: le.Combination) -> dict[str, Any]:
    out = folder / f"{combination.method}.safetensors"
    adapters = [folder / "one", folder / "two"]
    layout = {layer: LAYOUT.get(layer, "out_in") for layer in ("linear", "conv1d")}
    le.merge(folder / "base.safetensors", adapters, out, weights=WEIGHTS, combination=combination, layout=layout)
    return load_file(out)


@pytest.mark.parametrize(
    ("method", "sign"), [(m, s) for m in METHODS for s in ("total", "frequency") if "ties" in m or s == "total"]
)
def test_the_merged_weights_are_those_of_peft(tmp_path: Path, method: str, sign: str) -> None:
    model = adapted(tmp_path, {}, {"lora_alpha": 5})
    before = load_file(tmp_path / "base.safetensors")
    signs = {"majority_sign": sign} if "ties" in method else {}
    masks = our_masks(4, whole=method.endswith("svd")) if "dare" in method else contextlib.nullcontext()
    with masks:
        names = {"majority_sign_method": sign} if signs else {}
        expected = combined_by_peft(model, method, **OPTIONS[method], **names)
    seed = {"seed": 4} if "dare" in method else {}
    ours = merged(tmp_path, le.Combination(method, **OPTIONS[method], **signs, **seed))
    for layer in LAYERS:
        name = f"{layer}.weight"
        np.testing.assert_allclose(ours[name], expected[name], atol=1e-5, err_msg=layer)
        assert np.abs(expected[name] - before[name]).max() > 0.05


@pytest.mark.parametrize("method", [name for name in METHODS if "dare" not in name])
def test_peft_loads_the_adapter_with_equal_outputs(tmp_path: Path, method: str) -> None:
    # `linear` is left out of the second adapter, and has another rank.
    some = {"target_modules": [layer for layer in LAYERS if layer != "linear"]}
    patterns = {"rank_pattern": {"linear": 4}, "alpha_pattern": {"linear": 1}}
    adapted(tmp_path, patterns, some)
    combination = le.Combination(method, **OPTIONS[method])
    le.combine([tmp_path / "one", tmp_path / "two"], tmp_path / "both", combination=combination, weights=WEIGHTS)
    loaded = peft.PeftModel.from_pretrained(layers(), tmp_path / "both").eval()
    ours = merged(tmp_path, combination)
    net = layers()
    net.load_state_dict({name: torch.from_numpy(value) for name, value in ours.items()})
    expected, plain = net(IDS).detach(), layers()(IDS).detach()
    torch.testing.assert_close(loaded(IDS).detach(), expected, atol=1e-5, rtol=0)
    assert (expected - plain).abs().max() > 0.02
