"""What keys name in every spelling, and what the tensors of a module mean: LyCORIS's own modules are the oracle."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from lora_export import merge, verify
from lora_export.formats.lora_changes import KeyPart, has_pairs, sort_keys, split_key

SPELLINGS = {
    KeyPart.A: [
        *("lora_down.weight", "lora_A.weight", "lora_A.default.weight", "lora_A", "lora.down.weight"),
        "lora_linear_layer.down.weight",
    ],
    KeyPart.B: [
        *("lora_up.weight", "lora_B.weight", "lora_B.default.weight", "lora_B", "lora.up.weight"),
        "lora_linear_layer.up.weight",
    ],
    KeyPart.B_BIAS: ["lora_B.bias", "lora_up.bias"],
    KeyPart.MID: ["lora_mid.weight"],
    KeyPart.ALPHA: ["alpha", "lora.alpha", "lora_linear_layer.alpha"],
    KeyPart.MAGNITUDE: [
        "lora_magnitude_vector",
        "lora_magnitude_vector.weight",
        "lora_magnitude_vector.default.weight",
    ],
    KeyPart.DORA_SCALE: ["dora_scale"],
    KeyPart.CHANGE: ["diff"],
    KeyPart.BIAS_CHANGE: ["diff_b"],
    KeyPart.NORM_CHANGE: ["w_norm"],
    KeyPart.LOHA_W1_A: ["hada_w1_a", "hada_w1_a.weight"],
    KeyPart.LOKR_W2: ["lokr_w2"],
    KeyPart.LOKR_T2: ["lokr_t2"],
}


@pytest.mark.parametrize(
    ("part", "ending"), [(part, ending) for part, endings in SPELLINGS.items() for ending in endings]
)
def test_a_spelling_names_module_and_part(part, ending):
    assert split_key(f"lora_unet_x.{ending}") == ("lora_unet_x", part)
    assert split_key(f"blocks.0.attn.to_out.0.{ending}") == ("blocks.0.attn.to_out.0", part)


def test_the_layers_of_an_attention_processor_are_those_of_the_attention():
    assert split_key("down.attn1.processor.to_q_lora.down.weight") == ("down.attn1.to_q", KeyPart.A)
    assert split_key("down.attn1.processor.to_out_lora.up.weight") == ("down.attn1.to_out.0", KeyPart.B)
    assert split_key("layers.0.self_attn.to_v_lora.alpha") == ("layers.0.self_attn.to_v", KeyPart.ALPHA)


@pytest.mark.parametrize(
    "key", ["", "lora_A.weight", "a.weight", "a.bias", "a.lora_C.weight", "bundle_emb.x.string_to_param.*"]
)
def test_another_key_names_nothing(key):
    assert split_key(key) is None


def test_keys_are_sorted_by_module():
    keys = ["x.a.lora_A.weight", "x.a.lora_down.weight", "x.a.lora_B.weight", "x.b.alpha", "x.weight", "y.c.diff"]
    found = sort_keys(keys, lambda name: name.removeprefix("x.") if name.startswith("x.") else None)
    assert found.modules == {
        "a": {KeyPart.A: "x.a.lora_A.weight", KeyPart.B: "x.a.lora_B.weight"},
        "b": {KeyPart.ALPHA: "x.b.alpha"},
    }
    assert found.unknown == ["x.weight", "y.c.diff"]
    assert found.duplicates == ["x.a.lora_A.weight and x.a.lora_down.weight"]


def test_an_alpha_alone_is_no_adapter():
    assert not has_pairs(["a.alpha", "b.weight"])
    assert has_pairs(["a.alpha", "b.lokr_w1"])


LAYERS: dict[str, nn.Module] = {
    "linear": nn.Linear(24, 32),
    "convolution": nn.Conv2d(8, 16, 3, padding=1),
    "point": nn.Conv2d(8, 16, 1),
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
    "OFT": ("diag-oft", {"lora_dim": 4}),
    "OFT, constrained and rescaled": ("diag-oft", {"lora_dim": 4, "constraint": 0.01, "rescaled": True}),
    "BOFT": ("boft", {"lora_dim": 4}),
    "BOFT, constrained and rescaled": ("boft", {"lora_dim": 4, "constraint": 0.01, "rescaled": True}),
    "IA3 of outputs": ("ia3", {}),
    "IA3 of inputs": ("ia3", {"train_on_input": True}),
    "GLoRA": ("glora", {}),
    "LoKr, DoRA": ("lokr", {"lora_dim": 2, "factor": 2, "weight_decompose": True, "wd_on_output": True}),
}


@functools.cache
def lycoris_classes() -> dict[str, type]:
    from lycoris.modules.boft import ButterflyOFTModule
    from lycoris.modules.diag_oft import DiagOFTModule
    from lycoris.modules.glora import GLoRAModule
    from lycoris.modules.ia3 import IA3Module
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    rotating = {"diag-oft": DiagOFTModule, "boft": ButterflyOFTModule}
    others = {"ia3": IA3Module, "glora": GLoRAModule}
    return {"locon": LoConModule, "loha": LohaModule, "lokr": LokrModule, **rotating, **others}


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
    assert verify(tmp_path / "merged.safetensors", base=tmp_path / "base.safetensors", adapters=path)
