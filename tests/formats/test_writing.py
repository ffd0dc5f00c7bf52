"""Values without rounding, and adapters of one file as kohya's scripts, ComfyUI and diffusers read them, bit for bit.

What a format cannot hold is refused by name.
"""

from __future__ import annotations

import math
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import lora_export
from lora_export.errors import InputRefused
from lora_export.formats.writing import (
    OneFile,
    alpha_of,
    beyond_pairs,
    refuse_inexpressible,
    smallest_dtype,
    with_positive_scales,
    without_component,
)
from lora_export.lora import Adapter, LoraPair, TokenRows
from lora_export.options.reading import ReadOptions
from lora_export.pairs.computed import FactoredPair
from lora_export.pairs.open_shape import OpenPair
from lora_export.pairs.structured import HadamardPair, KroneckerPair, WholePair
from lora_export.pairs.transforms import WeightTransform
from support.diffusion import arrays_of, change, fused_by_diffusers, linear_shapes, random_pairs, unet
from support.one_files import drawn_adapters
from support.written import adapter_of, assert_same_pairs, converted, drawn_pairs, low_rank


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1.0, 2.5], ml_dtypes.bfloat16),
        ([2.0**120], ml_dtypes.bfloat16),
        ([1 + 2**-10], np.float16),  # of 10 bits, where bfloat16 has 7
        ([2.0**120, 1 + 2**-10], np.float32),
        ([math.pi], np.float32),
    ],
)
def test_the_smallest_type_that_holds_all_values(values: list[float], dtype: Any) -> None:
    assert smallest_dtype([np.array(values, np.float32)]) == dtype


@given(st.integers(1, 512), st.integers(1, 1024) | st.floats(0.01, 1000))
def test_an_alpha_gives_its_scale_again(rank: int, alpha: float) -> None:
    assert alpha_of(alpha / rank, rank) / rank == alpha / rank


@given(st.integers(1, 512), st.floats(1e-3, 1e3))
def test_any_scale_has_an_alpha_that_float32_cannot_tell(rank: int, scale: float) -> None:
    assert np.float32(alpha_of(scale, rank) / rank) == pytest.approx(np.float32(scale), rel=2**-23)


def computed(scale: float) -> Adapter:
    """Outputs of 2, 3, 4 and 5 times the scale, from four inputs."""
    settings = {"shape": (1, 4, 4), "factors": lambda stored, rows: (np.ones((1, 4), np.float32), stored["b"][rows])}
    return adapter_of({"fc": FactoredPair({"b": np.array([[2], [3], [4], [5]], np.float32)}, scale, settings=settings)})


def test_a_computed_pair_gets_a_scale_above_zero() -> None:
    (turned,) = with_positive_scales(computed(-0.5)).pairs.values()
    assert turned.scale == 0.5 and turned.delta().tolist() == [[-0.5 * own] * 4 for own in (2, 3, 4, 5)]


@pytest.mark.parametrize("to", ["peft", "mlx", "kohya", "comfyui", "diffusers", "openvino"])
def test_a_computed_pair_is_written(to: str, tmp_path: Path) -> None:
    (pair,) = converted(computed(0.5), tmp_path, to).pairs.values()
    assert pair.delta().tolist() == [[0.5 * own] * 4 for own in (2, 3, 4, 5)]


@pytest.mark.parametrize(
    ("to", "other"), [("openvino", "linear layer"), ("mlx", "convolution"), ("gguf", "convolution")]
)
def test_all_that_has_no_a_and_b_is_named_at_once(to: str, other: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "num_hidden_layers": 1, "num_attention_heads": 2}')
    scaled = WeightTransform("IA3", {"l": np.ones(4)}, lambda pair, shape: (), (4, 0))
    convolution = LoraPair(a=np.ones((1, 2, 3, 3)), b=np.ones((2, 1, 1, 1)), scale=1.0)
    adapter = adapter_of(
        {"opened": OpenPair(lambda shape, shapes: convolution, ()), "scaled": scaled, "c": convolution}
    )
    with pytest.raises(InputRefused) as refused:
        lora_export.convert(adapter, tmp_path / "out", to=to, reading=ReadOptions(base_config=tmp_path))
    for problem in ("scaled: its change by IA3 follows from the weight", "opened: its file does not record its shape"):
        assert problem in str(refused.value)
    assert re.search(f"c: .*{other}", str(refused.value))


def test_what_is_no_pair_is_named() -> None:
    vector = np.ones(2, np.float32)
    adapter = adapter_of(
        {"fc": low_rank(2, 2, 1, magnitude=vector)},
        replaced={"head.weight": np.ones((2, 2))},
        biases={"fc": vector},
        token_rows={"embed.weight": TokenRows(np.array([1]), np.ones((1, 2)))},
        tied={"lm_head": "embed"},
    )
    assert beyond_pairs(adapter) == [
        "fc: DoRA's magnitude",
        "head.weight: a whole tensor",
        "fc: a change of a bias",
        "embed.weight: rows of tokens",
        "lm_head: the repetition of the pair of another module",
    ]
    assert beyond_pairs(adapter, {"magnitude", "replaced", "biases", "token_rows", "tied"}) == []
    with pytest.raises(InputRefused, match=r"the format x cannot express everything in mine:\n  fc: a change"):
        refuse_inexpressible(adapter, "x", ["fc: a change of a bias"])
    refuse_inexpressible(adapter, "x", [])


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def with_scales_in_b(adapter: Adapter) -> Adapter:
    """The adapter as files for ComfyUI have it: B is multiplied by the scale, and there is no alpha."""
    pairs = {
        name: replace(pair, b=pair.b * np.float32(pair.scale), scale=1.0) if type(pair) is LoraPair else pair
        for name, pair in adapter.pairs.items()
    }
    return replace(adapter, pairs=pairs)


@pytest.mark.parametrize("to", ["kohya", "comfyui", "diffusers"])
@settings(deadline=None, max_examples=40)
@given(drawn_adapters())
def test_pairs_come_back(to: str, adapter: Adapter) -> None:
    expected = adapter.renamed(lambda name: name.replace(".", "_")) if to == "kohya" else adapter
    if to == "comfyui":
        expected = with_scales_in_b(adapter)
    with tempfile.TemporaryDirectory() as folder:
        assert_same_pairs(converted(adapter, Path(folder), to), expected)


@pytest.mark.parametrize("to", ["peft", "mlx"])
@settings(deadline=None, max_examples=40)
@given(st.data())
def test_pairs_of_any_rank_and_scale_come_back(to: str, data: st.DataObject) -> None:
    adapter = adapter_of(data.draw(drawn_pairs(one_kind=to == "mlx")))
    with tempfile.TemporaryDirectory() as folder:
        assert_same_pairs(converted(adapter, Path(folder), to), adapter)


# A scale that is no float divided by 3.
NO_THIRD = next(scale for scale in np.linspace(0.34, 0.49, 1000).tolist() if alpha_of(scale, 3) / 3 != scale)
T5 = "text_encoder_3/encoder.block.0.layer.0.SelfAttention.q"
ONE, WHOLE_LOKR = low_rank(3, 2, 1), {"w1": numbers(2, 2), "w2": numbers(2, 2)}


@pytest.mark.parametrize(
    ("to", "pairs", "fields", "message"),
    [
        ("kohya", {"denoiser_2/a": ONE}, {}, "denoiser_2/a: a second transformer"),
        ("kohya", {"a": low_rank(3, 2, 1, embedding=True)}, {}, "a: a pair of an embedding or of a bare parameter"),
        ("kohya", {"a.b": ONE, "a_b": ONE}, {}, "lora_unet_a_b: two modules have this name without"),
        ("kohya", {"a": KroneckerPair(WHOLE_LOKR, 0.7)}, {}, "a: a LoKr of two whole factors with"),
        (
            *("kohya", {"a": KroneckerPair(WHOLE_LOKR, 1.0, rows=np.array([1, 0]))}, {}),
            "a: a LoKr of a part of a weight, which is no Kronecker product",
        ),
        ("kohya", {"denoiser/a": ONE}, {"replaced": {"h.weight": numbers(2, 2)}}, r"h\.weight: a whole tensor"),
        ("openvino", {"a": low_rank(3, 2, 1, scale=3e38)}, {}, r"a\.lora_B\.weight: values that float32 cannot hold"),
        ("comfyui", {"denoiser/a_b": ONE}, {"flattened": True}, "in which `_` stands for the dots: state the model"),
        (
            *("diffusers", {"a": WholePair({"change": np.ones((2, 2))}, 1.0), "e": low_rank(3, 2, 1, embedding=True)}),
            *({}, r"(?s)a: WholePair is no low-rank pair.*  e: no pair of a linear layer or a convolution"),
        ),
        ("diffusers", {"a": ONE}, {"biases": {"a": np.ones(3, np.float32)}}, "a: a change of a bias"),
        ("diffusers", {"a": ONE, "b": low_rank(3, 2, 1, magnitude=np.ones(3))}, {}, "DoRA on some layers of a model"),
        ("diffusers", {T5: ONE}, {}, "T5: it is text_encoder_2 in Flux's pipelines and text_encoder_3 in Stable"),
        ("diffusers", {"a_b": ONE}, {"flattened": True}, "in which `_` stands for the dots"),
        *(
            (to, {"a": ONE, "denoiser/a": low_rank(3, 2, 1, seed=1)}, {}, r"two (tensors would|modules) have this")
            for to in ("comfyui", "diffusers", "kohya")
        ),
    ],
)
def test_what_a_format_lacks_is_refused_by_name(to, pairs, fields, message, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=message):
        lora_export.convert(adapter_of(pairs, **fields), tmp_path / "out", to=to)
    assert list(tmp_path.iterdir()) == []


def file_of(pairs, **fields) -> OneFile:
    return OneFile(adapter_of(pairs, **fields), "x", lambda module, ending: f"{module}.{ending}")


def test_an_alpha_is_stored_in_the_type_that_holds_it():
    file = file_of({"a": low_rank(3, 2, 4, scale=0.5), "b": low_rank(3, 2, 4, scale=0.1)})
    file.add_changes(("A", "B"))
    assert {key: (str(value.dtype), float(value)) for key, value in file.alphas.items()} == {
        "a.alpha": ("float32", 2.0),
        "b.alpha": ("float64", 0.4),
    }
    assert set(file.tensors) == {"a.A", "a.B", "b.A", "b.B"}


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_a_scale_that_no_alpha_has_to_the_last_bit_is_written(to: str, tmp_path: Path) -> None:
    """Its alpha is off by one unit of fp64 at most: in fp32, in which programs multiply by it, it is the same."""
    (pair,) = converted(adapter_of({"denoiser/a": low_rank(3, 2, 3, scale=NO_THIRD)}), tmp_path, to).pairs.values()
    assert pair.scale in (np.nextafter(NO_THIRD, 0), np.nextafter(NO_THIRD, 1))
    assert np.float32(pair.scale) == np.float32(NO_THIRD)


def test_names_without_a_component_are_noted():
    assert without_component(adapter_of({"denoiser/a": low_rank(3, 2, 1)})) == ()
    assert len(without_component(adapter_of({"a": low_rank(3, 2, 1)}))) == 1


# --- kohya ---


def test_every_kind_of_change_comes_back(tmp_path: Path) -> None:
    loha = {"a1": numbers(2, 5), "b1": numbers(6, 2), "a2": numbers(2, 5), "b2": numbers(6, 2)}
    pairs = {
        "denoiser/conv": LoraPair(a=numbers(2, 3, 3, 3), b=numbers(4, 2, 1, 1), scale=0.5, magnitude=numbers(4)),
        "denoiser/loha": HadamardPair(loha, 0.75),
        "denoiser/lokr": KroneckerPair({"w1": numbers(2, 2), "w2": numbers(3, 2)}, 1.0),
        "denoiser/whole": WholePair({"change": numbers(3, 2)}, 1.0),
    }
    fields = {"biases": {"denoiser/whole": numbers(3)}, "added": {"denoiser/norm.weight": numbers(3)}}
    adapter = adapter_of(pairs, **fields)
    back = converted(adapter, tmp_path, "kohya")
    assert_same_pairs(back, adapter)
    assert {type(pair) for pair in back.pairs.values()} == {LoraPair, HadamardPair, KroneckerPair, WholePair}
    assert np.array_equal(back.biases["denoiser/whole"], fields["biases"]["denoiser/whole"])
    assert np.array_equal(back.added["denoiser/norm.weight"], fields["added"]["denoiser/norm.weight"])


ROWS, COLUMNS = np.array([4, 0, 2]), np.array([1, 3])
LOHA = {"a1": numbers(2, 5), "b1": numbers(6, 2), "a2": numbers(3, 5), "b2": numbers(6, 3)}
W2 = {"w2_a": numbers(2, 2), "w2_b": numbers(2, 3)}
TUCKER = {"w2_a": numbers(2, 3), "w2_b": numbers(2, 4), "t2": numbers(2, 2, 3, 3)}
STRUCTURED = {
    "a LoKr with a scale": KroneckerPair({"w1": numbers(3, 2), **W2}, 0.7 / 2),
    "a LoKr of two decomposed factors": KroneckerPair({"w1_a": numbers(3, 2), "w1_b": numbers(2, 2), **W2}, 2.5),
    "a LoKr with a core": KroneckerPair({"w1": numbers(2, 2), **TUCKER}, 1.5, numbers(6)),
    "a whole LoKr times two": KroneckerPair({"w1": numbers(3, 2), "w2": numbers(2, 2)}, 2.0),
    "a LoHa of two ranks": HadamardPair(LOHA, 0.75),
    "a part of a LoHa": HadamardPair(LOHA, 2.0, numbers(3), rows=ROWS, columns=COLUMNS),
    "a whole change with a scale": WholePair({"change": numbers(6, 5)}, 0.3),
    "a part of a whole change": WholePair({"change": numbers(6, 5)}, 1.0, rows=ROWS, columns=COLUMNS),
}


@pytest.mark.parametrize("kind", STRUCTURED)
def test_a_scale_and_a_part_of_a_change_come_back(kind, tmp_path: Path) -> None:
    pair = STRUCTURED[kind]
    (back,) = converted(adapter_of({"denoiser/a": pair}), tmp_path, "kohya").pairs.values()
    assert type(back) is type(pair) and np.array_equal(back.delta(), pair.delta())
    assert np.array_equal(back.magnitude, pair.magnitude) if pair.magnitude is not None else back.magnitude is None


def test_a_core_of_a_loha_becomes_a_part_of_its_factors(tmp_path: Path) -> None:
    factors = {"a1": numbers(2, 4, 3, 3), "b1": numbers(6, 2), "a2": numbers(2, 4, 3, 3), "b2": numbers(6, 2)}
    pair = HadamardPair(factors, 0.5)
    (back,) = converted(adapter_of({"denoiser/a": pair}), tmp_path, "kohya").pairs.values()
    assert np.array_equal(back.with_kernel((3, 3)).delta(), pair.delta())


def keys_of(adapter: Adapter, folder: Path) -> set[str]:
    return {key.partition(".")[0] for key in load_file(lora_export.convert(adapter, folder / "out", to="kohya").output)}


@pytest.mark.parametrize(
    ("names", "prefixes"),
    [
        (("denoiser/down_blocks.0.a", "text_encoder/a"), "lora_unet lora_te"),
        (("denoiser/down_blocks.1.transformer_blocks.1.a", "text_encoder/a"), "lora_unet lora_te1"),
        (("denoiser/down_blocks.0.a", "text_encoder/a", "text_encoder_2/a"), "lora_unet lora_te1 lora_te2"),
        (("denoiser/joint_blocks.0.a", "text_encoder/a", "text_encoder_3/a"), "lora_unet lora_te1 lora_te3"),
        (("denoiser/double_blocks.0.a", "text_encoder/a"), "lora_unet lora_te1"),
        (("text_encoder/a",), "lora_te"),
    ],
)
def test_text_encoders_have_the_numbers_of_their_family(names, prefixes, tmp_path: Path) -> None:
    keys = keys_of(adapter_of({name: low_rank(3, 2, 1) for name in names}), tmp_path)
    modules = [name.partition("/")[2].replace(".", "_") for name in names]
    assert keys == {f"{prefix}_{module}" for prefix, module in zip(prefixes.split(), modules, strict=True)}


def test_values_have_the_smallest_type_that_holds_them(tmp_path: Path) -> None:
    adapter = adapter_of({"denoiser/a": low_rank(3, 2, 3, dtype=np.float16, scale=1 / 3)})
    tensors = load_file(lora_export.convert(adapter, tmp_path / "out", to="kohya").output)
    types = {key.partition(".")[2]: str(value.dtype) for key, value in tensors.items()}
    assert types == {"lora_down.weight": "float16", "lora_up.weight": "float16", "alpha": "float32"}
    assert tensors["lora_unet_a.alpha"] == 1


# --- ComfyUI ---


def test_two_transformers_are_numbered(tmp_path: Path) -> None:
    names = ("denoiser/a", "denoiser_2/a", "text_encoder/a", "text_encoder_3/a")
    adapter = adapter_of({name: low_rank(3, 2, 1) for name in names})
    keys = load_file(lora_export.convert(adapter, tmp_path / "out", to="comfyui").output)
    assert {key.removesuffix(".a.lora_A.weight") for key in keys if key.endswith("A.weight")} == {
        "diffusion_model.transformer_1",
        "diffusion_model.transformer_2",
        "text_encoders.clip_l.transformer",
        "text_encoders.t5xxl.transformer",
    }
    assert_same_pairs(converted(adapter, tmp_path, "comfyui"), with_scales_in_b(adapter))


def test_a_file_for_comfyui_has_its_strength_in_diffusers(tmp_path: Path) -> None:
    """diffusers passes an alpha of `diffusion_model.` over in files for LTX: the pair had half its strength."""
    sizes = {"in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(**sizes, cross_attention_dim=16, caption_channels=8)
    name = "transformer_blocks.0.attn1.to_q"
    pair = low_rank(16, 16, 2, scale=0.5)
    result = lora_export.convert(adapter_of({f"denoiser/{name}": pair}), tmp_path / "out", to="comfyui")
    assert result.notes == ("mine: scales are multiplied into B, because few readers of such a file take an alpha.",)
    base = arrays_of(model)[f"{name}.weight"]
    fused = fused_by_diffusers(model, "LTXPipeline", result.output, "transformer")[f"{name}.weight"]
    np.testing.assert_allclose(fused - base, pair.delta(), atol=1e-5)


def test_names_without_a_model_are_noted(tmp_path: Path) -> None:
    result = lora_export.convert(adapter_of({"a.b": low_rank(3, 2, 1, scale=1.0)}), tmp_path / "out", to="comfyui")
    assert result.notes == ("mine: names without a model are written as those of the UNet or transformer.",)
    assert "diffusion_model.a.b.lora_A.weight" in load_file(result.output)


# --- diffusers ---


def test_diffusers_loads_what_was_written(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in linear_shapes(unet(), convolutions=True).items() if "mid_block" in name}
    factors, pairs = {}, {}
    for number, (name, shape) in enumerate(shapes.items()):
        factors |= random_pairs({name: shape}, rank=2 + number % 3, seed=number)
        a, b = factors[name]
        pairs[f"denoiser/{name}"] = LoraPair(a=a, b=b, scale=(1 + number % 2) / len(a))
    path = lora_export.convert(adapter_of(pairs), tmp_path / "out", to="diffusers").output
    assert all(key.startswith("unet.") for key in load_file(path))
    theirs, base = fused_by_diffusers(unet(), "StableDiffusionPipeline", path, "unet"), arrays_of(unet())
    for name, pair in factors.items():
        own = theirs[f"{name}.weight"] - base[f"{name}.weight"]
        assert own == pytest.approx(change(pair, pairs[f"denoiser/{name}"].scale), abs=3e-6)


def test_a_transformer_has_its_own_prefix(tmp_path: Path) -> None:
    pairs = {"denoiser/blocks.0.q": low_rank(3, 2, 1), "denoiser_2/blocks.0.q": low_rank(3, 2, 2)}
    path = lora_export.convert(adapter_of(pairs), tmp_path / "out", to="diffusers").output
    assert {key.partition(".")[0] for key in load_file(path)} == {"transformer", "transformer_2"}


@pytest.mark.parametrize(
    ("denoiser", "folder"),
    [("single_transformer_blocks.0.proj_mlp", "text_encoder_2"), ("joint_blocks.0.a", "text_encoder_3")],
)
def test_t5_is_in_the_folder_of_its_family(denoiser, folder, tmp_path: Path) -> None:
    adapter = adapter_of({f"denoiser/{denoiser}": low_rank(3, 2, 1), T5: low_rank(3, 2, 1)})
    result = lora_export.convert(adapter, tmp_path / "out", to="diffusers")
    assert {key.partition(".")[0] for key in load_file(result.output)} == {"transformer", folder}
    assert result.notes == ("mine: diffusers loads no adapter of T5; other programs read these names.",)
    assert_same_pairs(converted(adapter, tmp_path, "diffusers"), adapter)
