"""Adapters of one file: scales, whole changes, what is refused by name, and which file is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from lora_export import formats, merge
from lora_export.errors import InputRefused
from lora_export.formats import adapter_files, kohya, lora_file
from lora_export.options.reading import ReadOptions
from support.diffusion import adapter_file, random_pairs


def written(tensors: dict[str, np.ndarray], folder: Path) -> Path:
    path = folder / "changed.safetensors"
    save_file({f"lora_unet_layer.{name}": np.array(value) for name, value in tensors.items()}, path)
    return path


PAIR = random_pairs({"a.to_q": (4, 6)})


@pytest.mark.parametrize(
    ("format", "prefix", "component"),
    [
        *(("kohya", prefix, "denoiser/") for prefix in ("lora_unet_", "lora_transformer_")),
        *(("kohya", prefix, "text_encoder/") for prefix in ("lora_te_", "lora_te1_")),
        *(("kohya", f"lora_te{number}_", f"text_encoder_{number}/") for number in (2, 3)),
        ("kohya", "lycoris_", ""),
        *(("comfyui", f"diffusion_model.{part}", "denoiser/") for part in ("", "transformer_1.")),
        ("comfyui", "diffusion_model.transformer_2.", "denoiser_2/"),
        ("comfyui", "text_encoders.clip_l.transformer.", "text_encoder/"),
        ("comfyui", "text_encoders.t5xxl.transformer.", "text_encoder_3/"),
        *(("diffusers", prefix, "denoiser/") for prefix in ("unet.", "transformer.")),
        ("diffusers", "transformer_2.", "denoiser_2/"),
        ("diffusers", "text_encoder.", "text_encoder/"),
        ("diffusers", "", ""),
    ],
)
def test_a_prefix_names_the_component(format, prefix, component, tmp_path):
    flattened = format == "kohya"
    path = adapter_file(tmp_path / "a.safetensors", PAIR, prefix=prefix, flattened=flattened)
    adapter = formats.known_formats()[format].read(path, "x", ReadOptions())
    assert list(adapter.pairs) == [component + ("a_to_q" if flattened else "a.to_q")]
    assert formats.load(path).format == format


@pytest.mark.parametrize(
    ("format", "prefixes"),
    [
        ("kohya", ("lora_prior_", "unet.", "diffusion_model.", "base_model.model.")),
        ("comfyui", ("lora_unet_", "unet.", "text_encoders.unknown.", "")),
        ("diffusers", ("lora_unet_", "diffusion_model.", "base_model.model.", "model.layers.0.")),
    ],
)
def test_another_prefix_is_not_recognised(format, prefixes, tmp_path):
    for prefix in prefixes:
        path = adapter_file(tmp_path / "a.safetensors", PAIR, prefix=prefix)
        assert not formats.known_formats()[format].recognises(path), prefix


ANY_NAME = lora_file.OneFileFormat("any", lambda name: name)
A, B = np.ones((2, 4), np.float32), np.ones((3, 2), np.float32)


def test_alpha_divided_by_the_rank_is_the_scale(tmp_path):
    scales = {
        alpha: kohya.read(written({"lora_down.weight": A, "lora_up.weight": B} | extra, tmp_path), "x").pairs
        for alpha, extra in ((None, {}), (8.0, {"alpha": np.float16(8)}), (3.0, {"alpha": np.ones(1) * 3}))
    }
    assert [pairs["denoiser/layer"].scale for pairs in scales.values()] == [1.0, 4.0, 1.5]


def test_whole_changes_of_weights_biases_and_norms_are_read(tmp_path):
    rng = np.random.default_rng(0)
    change, bias, norm = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 4), (3,), (3,)))
    tensors = {"lora_unet_a_fc.diff": change, "lora_unet_a_fc.diff_b": bias, "lora_unet_a_n.w_norm": norm}
    tensors |= {"lora_unet_a_n.b_norm": norm * 2, "lora_unet_a_m.diff": norm * 3}
    save_file(tensors, tmp_path / "adapter.safetensors")
    base = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in (
            ("a.fc.weight", (3, 4)),
            ("a.fc.bias", (3,)),
            ("a.n.weight", (3,)),
            ("a.n.bias", (3,)),
            ("a.m.weight", (3,)),
        )
    }
    save_file(base, tmp_path / "base.safetensors")
    merge(tmp_path / "base.safetensors", tmp_path / "adapter.safetensors", tmp_path / "out.safetensors", weights=[2.0])
    added = {"a.fc.weight": change, "a.fc.bias": bias, "a.n.weight": norm, "a.n.bias": norm * 2, "a.m.weight": norm * 3}
    for name, value in load_file(tmp_path / "out.safetensors").items():
        assert value == pytest.approx(base[name] + 2 * added[name], rel=1e-6)


def test_the_bias_of_b_is_scaled_with_the_pair(tmp_path):
    tensors = {"lora_A.weight": A, "lora_B.weight": B, "lora_B.bias": np.arange(3.0), "alpha": np.ones(1) * 4}
    adapter = kohya.read(written(tensors, tmp_path), "x")
    assert adapter.biases["denoiser/layer"].tolist() == [0, 2, 4]


def test_pairs_with_and_without_alpha_are_noted(tmp_path):
    pair = {"lora_down.weight": A, "lora_up.weight": B}
    tensors = {f"lora_unet_{module}.{name}": value for module in ("a", "b") for name, value in pair.items()}
    save_file({**tensors, "lora_unet_a.alpha": np.ones(1)}, tmp_path / "mixed.safetensors")
    assert kohya.read(tmp_path / "mixed.safetensors", "x").notes == ("1 of 2 pairs have no alpha: scale 1.",)


LORA = {"lora_down.weight": A, "lora_up.weight": B}
ROW, COLUMN = np.ones((0, 4), np.float32), np.ones((3, 0), np.float32)
RANK_0 = {"lora_down.weight": ROW, "lora_up.weight": COLUMN}
LOHA_0 = {"hada_w1_a": COLUMN, "hada_w1_b": ROW, "hada_w2_a": COLUMN, "hada_w2_b": ROW, "alpha": np.ones(1)}
EMPTY, TWICE = "has no entries, or no dimensions", "it has both"
REFUSED = {
    "rank 0": (RANK_0 | {"alpha": np.ones(1)}, EMPTY),
    "a core of rank 0": (RANK_0 | {"lora_mid.weight": np.ones((0, 0, 3, 3))}, EMPTY),
    "LoHa of rank 0": (LOHA_0, EMPTY),
    "LoKr of rank 0": ({"lokr_w1_a": COLUMN, "lokr_w1_b": ROW, "lokr_w2": A}, EMPTY),
    "a LoKr factor without dimensions": ({"lokr_w1": np.ones(()), "lokr_w2": A}, EMPTY),
    "two norms": ({"diff": np.ones(3), "w_norm": np.ones(3)}, TWICE),
    "a bias and a norm's": ({"diff_b": np.ones(3), "b_norm": np.ones(3)}, TWICE),
    "two magnitudes": ({**LORA, "dora_scale": np.ones((3, 1)), "lora_magnitude_vector": np.ones(3)}, TWICE),
    "LoKr factor and core": ({"lokr_w1": A, "lokr_w2": B, "lokr_t2": np.ones((2, 2, 3, 3))}, TWICE),
    "an infinite alpha": ({**LORA, "alpha": np.full(1, np.inf)}, r"layer\.alpha holds values that are not finite"),
    "no B": ({"lora_down.weight": A}, "there is no B for it"),
    "alpha alone": ({"alpha": np.ones(1), "diff_b": np.ones(3)}, "it has alpha, and no pair"),
    "alpha of several numbers": ({**LORA, "alpha": np.ones(2)}, "its alpha is .2,.; it must be one number"),
    "alpha of zero": ({**LORA, "alpha": np.zeros(1)}, "its alpha is 0: sd-scripts takes that for alpha = rank"),
    "two spellings": ({**LORA, "lora_A.weight": A}, "contains one tensor under two names"),
    "two kinds": ({**LORA, "lokr_w1": A, "lokr_w2": B}, "it has changes of several kinds"),
    "a pair and a whole change": ({**LORA, "diff": B @ A}, "it has changes of several kinds"),
    "ranks that differ": ({"lora_down.weight": A, "lora_up.weight": B[:, :1]}, "different ranks"),
    "vectors": ({"lora_down.weight": A[0], "lora_up.weight": B}, "both need at least two dimensions"),
    "NaN": ({"lora_down.weight": A * np.nan, "lora_up.weight": B}, "holds values that are not finite"),
    "another kind of key": ({**LORA, "other_blocks": A}, "unknown kinds of tensors: lora_unet_layer.other_blocks"),
    "a core of another rank": ({**LORA, "lora_mid.weight": np.ones((3, 3, 3, 3))}, "make no convolution"),
    "DoRA of the inputs": (
        {**LORA, "dora_scale": np.ones((1, 4))},
        "its DoRA magnitude is .1, 4., and the weight has 3",
    ),
    "DoRA without a pair": ({"dora_scale": np.ones((3, 1)), "diff_b": np.ones(3)}, "it has dora_scale, and no pair"),
    "a LoHa factor is missing": ({"hada_w1_a": B, "hada_w1_b": A, "hada_w2_a": B}, "there is no hada_w2_b for it"),
    "a LoKr factor is missing": ({"lokr_w1": A}, "there is neither lokr_w2 nor lokr_w2_a and lokr_w2_b"),
    "a LoKr factor twice": ({"lokr_w1": A, "lokr_w2": A, "lokr_w2_a": B}, "it has lokr_w2 and lokr_w2_a or lokr_w2_b"),
    "LoKr of two ranks": (
        {"lokr_w1_a": B, "lokr_w1_b": A, "lokr_w2_a": B[:, :1], "lokr_w2_b": A[:1]},
        "have the ranks 1, 2",
    ),
    "two biases": ({**LORA, "lora_B.bias": np.ones(3), "diff_b": np.ones(3)}, "two changes of one bias"),
}


POINT = np.ones((4, 4, 1, 1), np.float32)
POINTS = {
    "a pair": {
        "lora_down.weight": np.ones((2, 4, 1, 1), np.float32),
        "lora_up.weight": np.ones((4, 2, 1, 1), np.float32),
    },
    "a whole change": {"diff": POINT * 2},
    "LoKr": {"lokr_w1": np.ones((2, 2), np.float32), "lokr_w2": np.ones((2, 2, 1, 1), np.float32) * 2},
}


@pytest.mark.parametrize("name", POINTS)
def test_a_convolution_of_size_1_fits_a_square_linear_layer(name, tmp_path):
    save_file({"layer.weight": np.zeros((4, 4), np.float32)}, tmp_path / "base.safetensors")
    merge(tmp_path / "base.safetensors", written(POINTS[name], tmp_path), tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["layer.weight"].tolist() == [[2.0] * 4] * 4


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_by_name(name, tmp_path):
    tensors, message = REFUSED[name]
    with pytest.raises(InputRefused, match=message):
        kohya.read(written(tensors, tmp_path), "x")


def test_the_file_is_the_only_one_of_its_folder(tmp_path):
    path = written(LORA, tmp_path)
    assert adapter_files.weights_of(tmp_path) == adapter_files.weights_of(path) == path
    (tmp_path / "other.safetensors").write_bytes(path.read_bytes())
    assert adapter_files.weights_of(tmp_path) is None
    with pytest.raises(InputRefused, match="is not an adapter of one file"):
        kohya.read(tmp_path, "x")
    (tmp_path / "other.safetensors").unlink()
    (tmp_path / "config.json").write_text("{}")
    assert adapter_files.weights_of(tmp_path) is None  # the folder of a model


def test_a_model_and_a_damaged_file_are_not_recognised(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"layer.weight": A}, path)
    assert not ANY_NAME.recognises(path)
    path.write_bytes(b"damaged")
    assert not ANY_NAME.recognises(path)
    assert not ANY_NAME.recognises(tmp_path / "none.safetensors")


@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "adapter.pt"])
def test_a_pickle_is_read_where_it_is_allowed(name, tmp_path):
    tensors = {f"unet.layer.{part}": torch.from_numpy(value) for part, value in LORA.items()}
    torch.save(tensors, tmp_path / name)
    with pytest.raises(InputRefused, match=r"is a pickle, which can run code when it is opened\. allow_pickle=True"):
        formats.load(tmp_path / name)
    for source in (tmp_path / name, tmp_path):
        adapter = formats.load(source, options=ReadOptions(allow_pickle=True))
        assert adapter.format == "diffusers" and np.array_equal(adapter.pairs["denoiser/layer"].a, A)
