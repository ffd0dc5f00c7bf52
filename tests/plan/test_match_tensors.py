"""Tensors of an adapter against those of a base: shapes, layouts, kinds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

import lora_export as le
from lora_export import plan, sums
from lora_export.errors import MatchError
from lora_export.plan import Layout, TensorSpec
from support.peft_models import fill
from support.plans import BA, adapter, holding, matrix, misfits, pair, rows, table, tied, unknown, vector
from support.tied import WORDS, tied_model


def test_a_whole_tensor_for_one_tied_name_unties_or_refuses():
    whole = np.ones((2, 3), np.float32)
    assert len(misfits([holding(replaced={"emb.weight": whole})], [tied()], may_add=True)) == 1
    made = plan.make([holding(replaced={"head.weight": whole})], [tied()], may_add=True)
    assert [step.weight for step in made.steps] == ["head.weight"] and made.kept == ("emb.weight",)
    assert made.notes == ("the base has no head.weight: it is added, and no longer tied to emb.weight.",)
    both = holding(replaced={"emb.weight": whole, "head.weight": whole}, pairs={"emb": pair()})
    assert len(plan.make([both], [tied()], may_add=True).steps) == 2


def test_a_square_in_out_weight_gets_the_transposed_change():
    # Only the layout tells: the shapes would fit both ways.
    mine = adapter(fc=pair(a=[[1, 2]], b=[[1], [10]]))
    for layout, stored in ((Layout.OUT_IN, [[1, 2], [10, 20]]), (Layout.IN_OUT, [[1, 10], [2, 20]])):
        (step,) = plan.make([mine], [matrix("fc.weight", 2, 2, layout=layout)]).steps
        assert sums.stored_delta(step, slice(None)).tolist() == stored
        assert sums.stored_delta(step, slice(1, 2)).tolist() == stored[1:]
        assert sums.delta(step).tolist() == [[1, 2], [10, 20]]  # always (out, in)


@pytest.mark.parametrize("layout", [Layout.OUT_IN, Layout.IN_OUT, Layout.EMBEDDING, Layout.MATRIX])
def test_the_pair_of_a_bare_parameter_changes_it_as_it_is_stored(layout):
    mine = adapter(fc=replace(pair(a=[[1, 2]], b=[[1], [10]]), as_stored=True))
    (step,) = plan.make([mine], [matrix("fc.weight", 2, 2, layout=layout)]).steps
    assert sums.stored_delta(step, slice(None)).tolist() == [[1, 2], [10, 20]]


def test_a_zero_bias_at_a_packed_projection_is_left_out():
    """PEFT saves it, and neither trains nor uses it."""
    base = [matrix("attn.in_proj_weight"), vector("attn.in_proj_bias")]
    zero, other = (holding(pairs={"attn": pair()}, biases={"attn": np.full(2, value, np.float32)}) for value in (0, 1))
    assert [step.weight for step in plan.make([zero], base).steps] == ["attn.in_proj_weight"]
    (misfit,) = misfits([other], base)
    assert "PEFT up to 0.21 does not use the bias of B at the packed projection" in misfit


def test_the_change_of_a_vector_has_the_prefix_of_the_pairs():
    own = holding(pairs={"fc": pair()}, added={"norm.weight": np.ones(2, np.float32)})
    made = plan.make([own], [matrix("model.fc.weight"), vector("model.norm.weight")])
    assert [step.weight for step in made.steps] == ["model.fc.weight", "model.norm.weight"]


def test_an_in_out_weight_is_matched_by_its_out_in_view():
    (step,) = plan.make([adapter(fc=pair())], [matrix("fc.weight", 3, 2, layout=Layout.IN_OUT)]).steps
    assert sums.stored_delta(step, slice(None)).tolist() == np.transpose(BA).tolist()


@pytest.mark.parametrize("layout", [Layout.EMBEDDING, Layout.MATRIX])
def test_an_embedding_pair_changes_rows_of_words(layout):
    (step,) = plan.make([adapter(emb=table())], [matrix("emb.weight", 3, 2, layout=layout)]).steps  # 3 words, 2 wide
    assert step.spec.layout is Layout.EMBEDDING
    assert sums.delta(step).tolist() == BA
    assert sums.stored_delta(step, slice(1, 3)).tolist() == np.transpose(BA)[1:].tolist()


def test_a_step_has_the_layout_that_the_pair_determines():
    (step,) = plan.make([adapter(fc=pair())], [matrix("fc.weight", layout=Layout.MATRIX)]).steps
    assert (step.spec.layout, sums.stored_delta(step, slice(None)).tolist()) == (Layout.OUT_IN, BA)


def test_pairs_of_embeddings_and_linear_layers_are_not_confused():
    # All are square: no shape would tell.
    square = {"a": [[1, 2]], "b": [[1], [10]]}
    mine = adapter(emb=table(**square), fc=pair(**square), other=table(**square))
    base = [
        matrix("emb.weight", 2, 2),
        matrix("fc.weight", 2, 2, layout=Layout.EMBEDDING),
        matrix("other.weight", 2, 2, layout=Layout.IN_OUT),
    ]
    assert misfits([mine], base) == [
        "emb: emb.weight is the weight of a linear layer, the adapter was trained on an embedding",
        "fc: fc.weight is the weight of an embedding, the adapter was trained on a linear layer",
        "other: other.weight is the weight of a linear layer, the adapter was trained on an embedding",
    ]
    two = [adapter("one", fc=pair(**square)), adapter("two", fc=table(**square))]
    assert misfits(two, [matrix("fc.weight", 2, 2, layout=Layout.MATRIX)]) == [
        "fc.weight: two was trained with fc.weight as an embedding, one as a linear layer"
    ]


def test_a_misfit_of_a_table_lists_width_and_rows():
    assert misfits([adapter(emb=table())], [matrix("emb.weight", 4, 2, layout=Layout.MATRIX)]) == [
        "emb: emb.weight is (2, 4) (width, rows), the adapter was trained on (2, 3)"
    ]


def test_rows_that_do_not_fit_are_misfits():
    base = [matrix("emb.weight", 5), matrix("wide.weight", 5, 4), matrix("small.weight", dtype="int8"), vector("bias")]
    names = ("emb.weight", "wide.weight", "small.weight", "bias", "other.weight")
    assert misfits([holding(token_rows=dict.fromkeys(names, rows(5)))], base) == [
        "emb.weight: emb.weight has 5 rows, the adapter replaces row 5",
        "wide.weight: wide.weight is (5, 4) float32, the adapter replaces rows of 3 floats",
        "small.weight: small.weight is (2, 3) int8, the adapter replaces rows of 3 floats",
        "bias: bias is (2,) float32, the adapter replaces rows of 3 floats",
        "other.weight: the base has no other.weight, of which the adapter replaces rows",
    ]


def test_a_new_tensor_is_a_misfit_without_may_add():
    lines = misfits([holding(replaced={"heat.weight": np.ones((2, 3))})], [matrix("head.weight")])
    assert lines == [
        "heat.weight: the base has no heat.weight, which the adapter replaces; the nearest name is head.weight"
    ]


@pytest.mark.fault(6, 15, 20)
def test_every_misfit_is_listed_with_its_key_and_the_nearest_name():
    first = holding(
        "first",
        pairs={"good": pair(), "layer.attn.q": pair(), "narrow": pair(), "norm": pair(), "int8": pair()},
        biases={"good": np.ones(3, np.float32), "narrow": np.ones(2, np.float32)},
        replaced={"head.weight": np.ones((4, 4))},
        spelling={"layer.attn.q": "base_model.model.layer.attn.q.lora_A.weight", "good.bias": "good.lora_B.bias"},
    )
    second = adapter("second", xyz=pair())
    base = [
        matrix("good.weight"),
        vector("good.bias"),
        matrix("layer.attention.q.weight"),
        matrix("narrow.weight", 2, 5),
        TensorSpec("norm.weight", (2, 3), "float32", Layout.OTHER),
        matrix("int8.weight", dtype="int8"),
        matrix("head.weight", 4, 5),
    ]
    with pytest.raises(MatchError) as refused:
        plan.make([first, second], base, may_add=True)
    assert str(refused.value).startswith("8 of 9 targets do not fit the base.\n")
    assert [misfit.adapter for misfit in refused.value.misfits] == ["first"] * 7 + ["second"]
    assert list(map(str, refused.value.misfits)) == [
        "base_model.model.layer.attn.q.lora_A.weight: the base has no weight for layer.attn.q; "
        "the nearest name is layer.attention.q.weight",
        "narrow: narrow.weight is (2, 5) (out, in), the adapter was trained on (2, 3)",
        "norm: norm.weight (2, 3) is not the weight of a linear layer, a convolution or an embedding",
        "int8: int8.weight is int8: a quantised weight is never merged silently. Use the original float base, "
        "or dequantise this one first",
        "good.lora_B.bias: the base's good.bias has shape (2,), the adapter adds (3,)",
        "narrow.bias: the base has no narrow.bias, which the adapter changes",
        "head.weight: head.weight is (4, 5), the adapter replaces it with (4, 4)",
        "xyz: the base has no weight for xyz",
    ]
    assert refused.value.exit_code == 3


def test_a_matrix_that_fits_in_neither_layout_is_a_misfit():
    assert misfits([adapter(fc=pair())], [unknown("fc.weight", 2, 5)]) == [
        "fc: fc.weight is (2, 5), the adapter was trained on (2, 3) (out, in)"
    ]


# --- Words that were added to the model: the refusal names the sizes, and the way out ---

NEW = WORDS + 3
TRAINED = {
    "pairs": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "whole tables": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


def trained(base: Path, **how: object) -> PeftModel:
    """An adapter of a model with new words, as after training. Its tables are not tied."""
    model = LlamaForCausalLM.from_pretrained(base, tie_word_embeddings=False)
    model.lm_head.weight.data = model.model.embed_tokens.weight.data.clone()
    model.resize_token_embeddings(NEW, mean_resizing=False)
    adapted = get_peft_model(model, LoraConfig(r=2, **how))
    fill(adapted)
    return adapted.eval()


@pytest.mark.parametrize("how", TRAINED)
def test_the_refusal_has_the_sizes_and_the_way_out(how, tmp_path):
    model = tied_model(tmp_path / "base")
    adapted = trained(model.base, **TRAINED[how])
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(MatchError) as refused:
        le.merge(model.base, tmp_path / "adapter", tmp_path / "out", tied="untie")
    (last,) = str(refused.value).splitlines()[-1:]
    assert last.startswith(f"adapter was trained with {NEW} words, and ") and f"has {WORDS}." in last
    assert f"resize_token_embeddings({NEW}), save_pretrained" in last

    resized = LlamaForCausalLM.from_pretrained(model.base, tie_word_embeddings=False)
    resized.resize_token_embeddings(NEW)
    resized.save_pretrained(tmp_path / "resized")
    le.merge(tmp_path / "resized", tmp_path / "adapter", tmp_path / "out")
    found = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(NEW).reshape(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)


def test_new_words_that_an_adapter_lacks_are_named(tmp_path):
    model = tied_model(tmp_path / "base")
    adapted = trained(model.base, target_modules=["embed_tokens"])
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(MatchError, match="has no rows for the new words: save it with save_embedding_layers=True"):
        le.merge(model.base, tmp_path / "adapter", tmp_path / "out", tied="untie")
