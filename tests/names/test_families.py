"""Names, order and joins of a family's layers; names and axes of experts. The formats compare the values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.formats.litgpt import names_of_family
from lora_export.lora import ExpertAxes, LoraPair
from lora_export.names.families import (
    STORED_IN_OUT,
    TRANSPOSED_CLASSES,
    FamilyNames,
    column,
    fuse_outputs,
    is_turned,
    joined_outputs,
    model_types,
    read_rows,
)
from lora_export.names.row_orders import Heads
from lora_export.names.table import KNOWN_MODEL_TYPES
from support.stacked_parameters import classes_of_experts


def pair(outputs: int, rank: int = 1, **fields: Any) -> LoraPair:
    rng = np.random.default_rng(outputs)
    a, b = rng.integers(1, 5, (rank, 3)), rng.integers(1, 5, (outputs, rank))
    return LoraPair(a=a, b=b, **{"scale": 2.0, **fields})


def test_outputs_without_a_pair_do_not_change() -> None:
    q, v = pair(2), pair(3, rank=2)
    fused = fuse_outputs({2: v, 0: q}, [2, 1, 3])
    assert fused.delta().tolist() == [*q.delta().tolist(), [0, 0, 0], *v.delta().tolist()]
    assert (fused.rank, fused.magnitude) == (3, None)


def test_magnitudes_of_all_outputs_are_joined() -> None:
    one, other = pair(1, magnitude=np.array([7])), pair(2, magnitude=np.array([8, 9]))
    fused = fuse_outputs({0: one, 1: other}, [1, 2])
    assert fused.magnitude is not None and fused.magnitude.tolist() == [7, 8, 9]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (pair(3), r"B is \(3, 1\), and the base has 2 outputs there"),
        (pair(2, scale=3.0), "different scales or inputs"),
        (pair(2, magnitude=np.ones(2)), "DoRA on some outputs of a fused layer is not supported"),
    ],
)
def test_pairs_that_make_no_layer_are_refused(other: LoraPair, message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        fuse_outputs({0: pair(1), 1: other}, [1, 2])


def test_outputs_are_reordered_with_their_magnitudes() -> None:
    before = pair(3, magnitude=np.array([5, 6, 7]))
    after = before.part(np.array([2, 0, 1]), None)
    assert after.delta().tolist() == before.delta()[[2, 0, 1]].tolist()
    assert after.magnitude is not None and after.magnitude.tolist() == [7, 5, 6]


def test_a_scale_that_is_a_power_of_two_apart_moves_into_b() -> None:
    one, other = pair(2, scale=3.0), pair(3, rank=2, scale=0.75)
    fused = fuse_outputs({0: one, 1: other}, [2, 3])
    assert fused.scale == 3.0
    assert np.array_equal(fused.delta(), np.concatenate([one.delta(), other.delta()]))


def test_one_a_is_kept_where_every_output_has_it() -> None:
    one = pair(2, rank=2, magnitude=np.array([5, 6]))
    other = LoraPair(a=one.a, b=pair(3, rank=2).b, scale=one.scale, magnitude=np.array([7, 8, 9]))
    joined = joined_outputs({0: one, 1: other}, [2, 3])
    assert joined.rank == 2 and np.array_equal(joined.delta(), np.concatenate([one.delta(), other.delta()]))
    assert joined.magnitude is not None and joined.magnitude.tolist() == [5, 6, 7, 8, 9]
    assert joined_outputs({0: one, 1: pair(3, rank=2, magnitude=np.ones(3))}, [2, 3]).rank == 4
    plain = LoraPair(a=one.a, b=one.b, scale=one.scale)
    assert joined_outputs({1: plain}, [3, 2]).delta().tolist() == [[0.0] * 3] * 3 + plain.delta().tolist()


def numbered(rows: int, first: int = 0, scale: float = 2.0) -> LoraPair:
    """A pair of rank 1 whose row k of B is first + k."""
    return LoraPair(a=np.ones((1, 2)), b=np.arange(first, first + rows)[:, None], scale=scale)


@pytest.mark.parametrize(
    ("name", "mlp_class", "joined", "output"),
    [
        ("Llama-3.2-1B", "LLaMAMLP", "", "model.layers.3.self_attn.o_proj"),
        ("OLMo-2-7B", "LLaMAMLP", "", "model.layers.3.self_attn.o_proj"),
        ("Gemma-2-2b", "GemmaMLP", "", "model.layers.3.self_attn.o_proj"),
        ("Phi-4", "LLaMAMLP", "self_attn.qkv_proj", "model.layers.3.self_attn.o_proj"),
        ("phi-1_5", "GptNeoxMLP", "", "model.layers.3.self_attn.dense"),
        ("falcon-40b", "GptNeoxMLP", "self_attention.query_key_value", "transformer.h.3.self_attention.dense"),
        ("pythia-14m", "GptNeoxMLP", "attention.query_key_value", "gpt_neox.layers.3.attention.dense"),
    ],
)
def test_a_family_of_litgpt_is_found_by_name_and_class(name: str, mlp_class: str, joined: str, output: str) -> None:
    names = names_of_family(name, mlp_class)
    assert names.renamed("transformer.h.3.attn.proj") == output
    assert joined == next(iter(names.joined), "")
    assert names.renamed("transformer.h.3.attn.other") is None


@pytest.mark.parametrize(
    ("name", "expected"), [("Qwen3-30B-A3B", "mlp.experts.5.up_proj"), ("Mixtral", "block_sparse_moe.experts.5.w3")]
)
def test_the_numbers_of_layer_and_expert_are_kept(name: str, expected: str) -> None:
    names = names_of_family(name, "LLaMAMoE")
    assert names.renamed("transformer.h.3.mlp.experts.5.fc_2") == f"model.layers.3.{expected}"


def test_a_class_without_a_conversion_is_refused() -> None:
    with pytest.raises(InputRefused, match="has mlp_class_name 'NewMLP', and litgpt has no conversion of it"):
        names_of_family("New-1B", "NewMLP")


def test_the_parts_of_a_layer_are_one_pair_in_its_order() -> None:
    names = FamilyNames.of({"joined": {"attn.qkv": {"of": ["attn.q", "attn.k", "attn.v"], "sizes": "heads"}}})
    pairs = {"m.0.attn.v": numbered(1, 20), "m.0.fc": numbered(2), "m.0.attn.q": numbered(2, 1)}
    found, keys = names.with_joined(pairs, {name: f"key of {name}" for name in pairs}, Path("f"), Heads(2, 1, 1))
    assert found["m.0.attn.qkv"].delta()[:, 0].tolist() == [2, 4, 0, 40]  # k has no pair
    assert keys == {"m.0.attn.qkv": "key of m.0.attn.v", "m.0.fc": "key of m.0.fc"}


def test_gate_and_up_of_each_expert_alternate() -> None:
    names = FamilyNames.of(column("mlx")["gpt_oss"])
    pairs = {f"m.experts.{name}_proj[{n}]": numbered(2, 10 * n) for n in range(2) for name in ("gate", "up")}
    found, _ = names.with_joined(pairs, dict.fromkeys(pairs, "key"), Path("f"))
    assert list(found) == ["m.experts.gate_up_proj[0]", "m.experts.gate_up_proj[1]"]
    assert found["m.experts.gate_up_proj[1]"].delta()[:, 0].tolist() == [20, 20, 22, 22]
    assert found["m.experts.gate_up_proj[1]"].as_stored


def test_parts_that_make_no_layer_are_refused_by_their_key() -> None:
    names = FamilyNames.of({"joined": {"mlp.gate_up": {"of": ["mlp.gate", "mlp.up"]}}})
    pairs = {"m.mlp.gate": numbered(2), "m.mlp.up": numbered(2, scale=3.0)}
    with pytest.raises(InputRefused, match=r"file: key: .* different scales"):
        names.with_joined(pairs, dict.fromkeys(pairs, "key"), Path("file"))


# --- The data ---


def test_every_row_is_of_a_model_type_that_transformers_has() -> None:
    assert set(read_rows("families.json")["model_types"]) <= KNOWN_MODEL_TYPES


def test_every_column_has_its_source() -> None:
    rows = read_rows("families.json")
    assert {name for row in rows["model_types"].values() for name in row} == set(rows["sources"])
    assert all(re.search(r" \d+\.\d+", source) for source in rows["sources"].values()), "which version?"


@pytest.mark.parametrize("program", ["gguf", "mlx", "torchtune"])
def test_every_row_can_be_carried_out(program: str) -> None:
    for row in column(program).values():
        names = FamilyNames.of(row, read_rows("families.json")["torchtune_modules"])
        assert len(set(names.modules.values())) == len(names.modules), "two layers would have one name"


def test_every_family_of_litgpt_names_each_layer_once() -> None:
    for row in read_rows("litgpt.json")["families"].values():
        names = FamilyNames.of(row)
        assert len(set(names.modules.values())) == len(names.modules)
        assert all(own.count("{}") == other.count("{}") for own, other in names.modules.items())


def test_the_architectures_are_those_of_the_gguf_package() -> None:
    assert {row["architecture"] for row in column("gguf").values()} <= set(gguf.MODEL_ARCH_NAMES.values())


GPT_OSS, LLAMA_4, MIXTRAL = {"gpt_oss"}, {"llama4", "llama4_text"}, {"mixtral"}


@pytest.mark.parametrize(
    ("axes", "wanted", "types", "expected"),
    [
        (ExpertAxes.OUT_IN, ExpertAxes.OUT_IN, (), False),
        (ExpertAxes.STORED, ExpertAxes.OUT_IN, GPT_OSS, True),
        (ExpertAxes.STORED, ExpertAxes.OUT_IN, LLAMA_4, True),
        (ExpertAxes.STORED, ExpertAxes.OUT_IN, MIXTRAL, False),
        (ExpertAxes.STORED, ExpertAxes.OUT_IN, (), None),
        (ExpertAxes.BY_CLASS, ExpertAxes.OUT_IN, GPT_OSS, False),
        (ExpertAxes.BY_CLASS, ExpertAxes.OUT_IN, LLAMA_4, True),
        (ExpertAxes.TRANSPOSED, ExpertAxes.OUT_IN, MIXTRAL, True),
        (ExpertAxes.TRANSPOSED, ExpertAxes.OUT_IN, GPT_OSS, False),
        (ExpertAxes.UNKNOWN, ExpertAxes.OUT_IN, MIXTRAL, None),
        (ExpertAxes.OUT_IN, ExpertAxes.BY_CLASS, GPT_OSS, False),
        (ExpertAxes.OUT_IN, ExpertAxes.BY_CLASS, LLAMA_4, True),
        (ExpertAxes.OUT_IN, ExpertAxes.BY_CLASS, MIXTRAL, False),
        (ExpertAxes.STORED, ExpertAxes.BY_CLASS, GPT_OSS, True),
        (ExpertAxes.STORED, ExpertAxes.BY_CLASS, LLAMA_4, False),
        (ExpertAxes.BY_CLASS, ExpertAxes.BY_CLASS, (), False),
    ],
)
def test_a_pair_is_turned_where_its_axes_are_not_those(axes, wanted, types, expected):
    assert is_turned(axes, wanted, types) is expected


def test_the_classes_are_those_of_transformers():
    packages = {one.package for one in classes_of_experts() if one.is_transposed}
    assert packages == TRANSPOSED_CLASSES - {"aria_text"}
    assert {"llama4", "llama4_text"} == STORED_IN_OUT - TRANSPOSED_CLASSES


def test_model_types_of_nested_configs_are_found():
    config = {"model_type": "llama4", "text_config": {"model_type": "llama4_text"}, "vision_config": {"model_type": 7}}
    assert model_types(config) == {"llama4", "llama4_text"}
