"""Adapters in kohya's format: every kind of change comes back bit for bit, and the rest is refused by name."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from safetensors.numpy import load_file

import lora_export
from lora_export.errors import InputRefused
from lora_export.formats.writers.exact_values import alpha_of
from lora_export.lora import Adapter, LoraPair
from lora_export.structured_pairs import HadamardPair, KroneckerPair, WholePair
from support.one_files import drawn_adapters
from support.written import adapter_of, assert_same_pairs, converted, low_rank


def flat(adapter: Adapter) -> Adapter:
    return adapter.renamed(lambda name: name.replace(".", "_"))


@settings(deadline=None, max_examples=40)
@given(drawn_adapters())
def test_pairs_come_back(adapter: Adapter) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert_same_pairs(converted(adapter, Path(folder), "kohya"), flat(adapter))


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


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


# A scale that is no float divided by 3.
NO_THIRD = next(scale for scale in np.linspace(0.34, 0.49, 1000).tolist() if alpha_of(scale, 3) / 3 != scale)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"denoiser_2/a": low_rank(3, 2, 1)}, "denoiser_2/a: a second transformer"),
        ({"a": low_rank(3, 2, 1, embedding=True)}, "a: a pair of an embedding or of a bare parameter"),
        ({"a.b": low_rank(3, 2, 1), "a_b": low_rank(3, 2, 1)}, "lora_unet_a_b: two modules have this name without"),
        ({"a": KroneckerPair({"w1": numbers(2, 2), "w2": numbers(2, 2)}, 0.7)}, "a: a LoKr of two whole factors with"),
        (
            {"a": KroneckerPair({"w1": numbers(2, 2), "w2": numbers(2, 2)}, 1.0, rows=np.array([1, 0]))},
            "a: a LoKr of a part of a weight, which is no Kronecker product",
        ),
        ({"a": low_rank(3, 2, 3, scale=NO_THIRD)}, "a: its scale .* is no number divided by its rank"),
    ],
)  # fmt: skip
def test_what_the_format_lacks_is_refused_by_name(pairs, message, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=message):
        lora_export.convert(adapter_of(pairs), tmp_path / "out", to="kohya")
    assert list(tmp_path.iterdir()) == []


def test_whole_tensors_are_refused(tmp_path: Path) -> None:
    adapter = adapter_of({"denoiser/a": low_rank(3, 2, 1)}, replaced={"head.weight": numbers(2, 2)})
    with pytest.raises(InputRefused, match=r"head\.weight: a whole tensor"):
        lora_export.convert(adapter, tmp_path / "out", to="kohya")
