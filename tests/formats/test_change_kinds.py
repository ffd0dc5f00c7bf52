"""What the tensors of a module mean: LyCORIS's own modules are the oracle."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from lora_export import merge

LAYERS: dict[str, nn.Module] = {
    "linear": nn.Linear(24, 36),
    "convolution": nn.Conv2d(8, 12, 3, padding=1),
    "point": nn.Conv2d(8, 12, 1),
}
INPUTS = {"linear": torch.randn(3, 24), "convolution": torch.randn(2, 8, 5, 5), "point": torch.randn(2, 8, 5, 5)}
# Variant -> kind of LyCORIS's module, and its arguments.
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "LoCon": ("locon", {}),
    "LoCon, Tucker": ("locon", {"use_tucker": True}),
    "LoCon, rs-LoRA": ("locon", {"rs_lora": True}),
    "LoCon, DoRA": ("locon", {"weight_decompose": True, "wd_on_output": True}),
    "LoHa": ("loha", {}),
    "LoHa, Tucker": ("loha", {"use_tucker": True}),
    "LoHa, DoRA": ("loha", {"weight_decompose": True, "wd_on_output": True}),
    "LoKr": ("lokr", {"lora_dim": 2, "factor": 2}),
    "LoKr, Tucker": ("lokr", {"lora_dim": 2, "factor": 2, "use_tucker": True}),
    "LoKr, both decomposed": ("lokr", {"lora_dim": 1, "factor": 4, "decompose_both": True}),
    "LoKr, whole factors": ("lokr", {"full_matrix": True, "factor": 4}),
    "LoKr, DoRA": ("lokr", {"lora_dim": 2, "factor": 2, "weight_decompose": True, "wd_on_output": True}),
}


@functools.cache
def lycoris_classes() -> dict[str, type]:
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    return {"locon": LoConModule, "loha": LohaModule, "lokr": LokrModule}


def trained(kind: str, arguments: dict[str, object], layer: nn.Module) -> nn.Module:
    """A module of LyCORIS beside a layer, every parameter of which has random values."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module: nn.Module = lycoris_classes()[kind](
            "lycoris_m_layer", layer, multiplier=1.0, **{"lora_dim": 4, "alpha": 2, **arguments}
        )
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    return module


def saved(module: nn.Module, folder: Path) -> Path:
    """The adapter's file, with the keys that LyCORIS writes."""
    state = {name: value for name, value in module.state_dict().items() if "org_" not in name}
    tensors = {f"lycoris_m_layer.{name}": value.detach().numpy().copy() for name, value in state.items()}
    path = folder / "adapter.safetensors"
    save_file(tensors, path)
    return path


def base_of(layer: nn.Module, folder: Path) -> Path:
    path = folder / "base.safetensors"
    save_file({f"m.layer.{name}": value.numpy().copy() for name, value in layer.state_dict().items()}, path)
    return path


def merged_weight(layer: nn.Module, adapter: Path, folder: Path) -> Tensor:
    result = merge(base_of(layer, folder), adapter, folder / "merged.safetensors")
    assert result.report is not None
    return torch.from_numpy(load_file(folder / "merged.safetensors")["m.layer.weight"])


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_merge_computes_what_lycoris_computes(variant, layer, tmp_path):
    kind, arguments = VARIANTS[variant]
    base, x = LAYERS[layer], INPUTS[layer]
    with torch.no_grad():
        module = trained(kind, arguments, base)
        path, expected = saved(module, tmp_path), module(x)
        weight = merged_weight(base, path, tmp_path)
        plain = (
            nn.functional.linear if layer == "linear" else functools.partial(nn.functional.conv2d, padding=base.padding)
        )
        assert not torch.allclose(base(x), expected, atol=1e-3)
        assert torch.allclose(plain(x, weight, base.bias), expected, atol=1e-5)
