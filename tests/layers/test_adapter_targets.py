"""Which weights of a module a new adapter may change, by name."""

from __future__ import annotations

import pytest
from torch import nn

from lora_export.errors import InputRefused
from lora_export.layers.adapter_targets import AdaptableWeights, matches_ending, nearest
from support import experts
from support.small_layers import Everything, base_of


def test_weights_are_found_by_kind() -> None:
    weights = AdaptableWeights(base_of(Everything))
    assert list(weights.layers) == ["words", "fc", "fan", "one", "two", "three"]
    assert list(weights.linear) == ["fc", "fan"] and not weights.stacked
    stacked = AdaptableWeights(experts.tiny_model("mixtral")).stacked
    assert [name.rpartition(".")[2] for name in stacked] == ["gate_up_proj", "down_proj"]
    attention = AdaptableWeights(nn.MultiheadAttention(8, 2, kdim=4))
    assert list(attention.layers) == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"]


def test_names_and_a_pattern_choose_together() -> None:
    weights = AdaptableWeights(base_of(Everything))
    assert list(weights.chosen(["three", "fc"], "t.*", ())) == ["fc", "two", "three"]
    assert list(weights.chosen([], "f.+", ())) == ["fc", "fan"]
    with pytest.raises(InputRefused, match="`fou` matches no linear layer; the nearest: fc, fan"):
        weights.chosen(["fou"], "", (), linear_only=True)


def test_names_match_whole_parts_of_a_path() -> None:
    assert matches_ending("a.query", ["query"]) and matches_ending("a.query", ["a.query"])
    assert not matches_ending("a.my_query", ["query"]) and not matches_ending("a.query", [])
    assert nearest("qury", ["a.query", "a.key"]) == "query, a.query"
    assert nearest("zzz", []) == "none"
    assert nearest("LayerNorm", ["a", "b", "c", "normal"]).startswith("normal, ")  # none is close
