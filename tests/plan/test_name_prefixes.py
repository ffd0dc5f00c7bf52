"""Prefixes of an adapter's names that the user replaces, and those that a message proposes."""

from __future__ import annotations

import numpy as np
import pytest

from lora_export import plan
from lora_export.errors import InputRefused, MatchError
from lora_export.lora import TokenRows
from lora_export.plan.match_names import with_prefixes
from support.plans import adapter, holding, matrix, pair, vector

TEXT = "model.layers.0.self_attn.q_proj"
BASE = [matrix("model.language_model.layers.0.self_attn.q_proj.weight"), matrix("lm_head.weight")]


def test_every_name_of_an_adapter_gets_the_other_prefix():
    rows = TokenRows(np.array([1]), np.ones((1, 3), np.float32))
    own = holding(
        pairs={TEXT: pair(), "lm_head": pair()},
        biases={TEXT: np.ones(2, np.float32)},
        replaced={"model.norm.weight": np.ones(2)},
        token_rows={"model.embed.weight": rows},
        layouts={TEXT: "out_in"},
        tied={"lm_head": "model.embed"},
        spelling={TEXT: "key of q", "model.norm.weight": "key of norm"},
    )
    (found,) = with_prefixes([own], {"model.": "m."})
    assert list(found.pairs) == ["m.layers.0.self_attn.q_proj", "lm_head"]
    assert list(found.biases) == list(found.layouts) == ["m.layers.0.self_attn.q_proj"]
    assert (list(found.replaced), list(found.token_rows)) == (["m.norm.weight"], ["m.embed.weight"])
    assert dict(found.tied) == {"lm_head": "m.embed"}
    assert (
        found.spelled("m.layers.0.self_attn.q_proj") == "key of q" and found.spelled("m.norm.weight") == "key of norm"
    )


def test_the_longest_prefix_of_a_name_counts():
    own = adapter(a__b__fc=pair(), a__fc=pair(), fc=pair())
    (found,) = with_prefixes([own], {"a.": "x.", "a.b.": "y.", "": "z."})
    assert list(found.pairs) == ["y.fc", "x.fc", "z.fc"]


def test_a_prefix_that_no_name_has_is_refused():
    with pytest.raises(InputRefused, match=r"begins with 'modle\.'\. The first names are model\.layers\.0"):
        with_prefixes([holding(pairs={TEXT: pair()})], {"modle.": "x."})


def test_two_names_that_become_one_are_refused():
    with pytest.raises(InputRefused, match="the same name"):
        with_prefixes([adapter(a__fc=pair(), b__fc=pair())], {"a.": "b."})


def test_the_message_proposes_the_option_that_fits():
    own = holding(pairs={TEXT: pair(), "lm_head": pair()})
    with pytest.raises(MatchError) as refused:
        plan.make([holding(pairs={TEXT: pair()})], BASE)
    assert 'With prefixes={"model.": "model.language_model."} the adapter\'s names fit the base.' in str(refused.value)
    with pytest.raises(MatchError, match=r"With prefixes=.* the adapter's names fit"):  # one of two adapters fits
        plan.make([adapter("other", lm_head=pair()), holding(pairs={TEXT: pair()})], BASE)
    (fitting,) = with_prefixes([own], {"model.": "model.language_model."})
    assert len(plan.make([fitting], BASE).steps) == 2


def test_every_part_that_fits_is_proposed():
    two = [*BASE, matrix("model.audio.layers.0.self_attn.q_proj.weight")]
    with pytest.raises(MatchError, match=r'language_model\."} or prefixes={"model\.": "model\.audio\."}'):
        plan.make([holding(pairs={TEXT: pair()})], two)


@pytest.mark.parametrize(
    "base",
    [
        [matrix("model.language_model.layers.0.self_attn.q_proj.weight", 4, 3)],  # another shape
        [matrix("model.language_model.layers.1.self_attn.q_proj.weight")],  # another layer
        [vector("model.language_model.layers.0.self_attn.q_proj.bias")],
    ],
)
def test_what_would_not_fit_is_not_proposed(base):
    with pytest.raises(MatchError) as refused:
        plan.make([holding(pairs={TEXT: pair()})], base)
    assert "prefixes=" not in str(refused.value)
