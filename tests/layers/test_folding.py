"""Fold a plan into the weights of a module; its targets, and ties."""

from __future__ import annotations

import copy
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertForMaskedLM
from transformers.pytorch_utils import Conv1D

from lora_export import layers, plan
from lora_export.errors import InputRefused
from lora_export.lora import Adapter, LoraPair, TokenRows
from lora_export.plan import Plan
from support.handmade import rounded_sum
from support.small_layers import (
    PAIR,
    X,
    a_linear,
    a_model,
    a_pair,
    an_adapter,
    an_encoder_layer,
    by_hand,
    encoder_changes,
    equal,
    ones,
    plan_for,
)
from support.tiny_models import tiny_bert


def test_fold_adds_in_place() -> None:
    model = nn.Sequential(a_linear(), Conv1D(2, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 2], [3, 4]]))
    conv = LoraPair(a=np.array([[1, 2]]), b=np.array([[1], [0]]), scale=1.0)  # ΔW (in, out) = [[1, 0], [2, 0]]
    adapter = an_adapter(
        {"0": PAIR, "1": conv},
        biases={"0": np.array([10, 20], np.float32)},
        replaced={"1.bias": np.array([5, 6], ml_dtypes.bfloat16)},
    )
    weight = model[0].weight
    layers.fold(model, plan_for(model, adapter))
    assert model[0].weight is weight
    assert equal(weight.detach(), torch.tensor([[3.0, 2, 1], [8, 5, 2]]))
    assert equal(model[0].bias.detach(), torch.tensor([11.0, 19.0]))
    assert equal(model[1].weight.detach(), torch.tensor([[2.0, 2], [5, 4]]))
    assert equal(model[1].bias.detach(), torch.tensor([5.0, 6.0]))
    assert type(model[0]) is nn.Linear


def test_a_folded_encoder_is_w_plus_sba() -> None:
    base = an_encoder_layer().double().eval()
    pairs, changes = encoder_changes()
    expected = by_hand(base, changes)
    layers.fold(base, plan_for(base, an_adapter(pairs)))
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(base.state_dict()[name], tensor, rtol=1e-15, atol=1e-15)


def test_fold_in_bf16_gives_the_bits_of_a_checkpoint_merge() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32)).to(torch.bfloat16)
    rng = np.random.default_rng(0)
    pairs = [
        LoraPair(a=rng.normal(size=(4, 32)), b=rng.normal(size=(32, 4)) / 50, scale=0.3),
        LoraPair(a=rng.normal(size=(4, 32)), b=rng.normal(size=(32, 4)) / 50, scale=0.7),
    ]
    weight = model[0].weight.detach().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    expected = rounded_sum(weight, pairs[0].delta() + pairs[1].delta())
    layers.fold(
        model, plan_for(model, an_adapter({"0": pairs[0]}, name="one"), an_adapter({"0": pairs[1]}, name="two"))
    )
    assert (weight.view(np.uint16) == expected.view(np.uint16)).all()


def test_fold_in_fp64_computes_the_change_in_fp64() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False)).double()
    nn.init.zeros_(model[0].weight)
    pair = LoraPair(a=np.full((1, 3), 0.1), b=np.full((2, 1), 0.1), scale=0.1)
    layers.fold(model, plan_for(model, an_adapter({"0": pair})))
    tenth = float(np.float32(0.1))
    expected = torch.full((2, 3), tenth * tenth * 0.1, dtype=torch.float64)
    torch.testing.assert_close(model[0].weight.detach(), expected, rtol=1e-15, atol=0)


def test_an_overflow_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(a_linear(torch.float16), a_linear(torch.float16))
    huge = LoraPair(a=np.array([[1e3, 0, 0]]), b=np.array([[1e3], [0]]), scale=1.0)
    with pytest.raises(InputRefused, match=r"1\.weight: 1 value would not be finite: the largest is 1e\+06, float16"):
        layers.fold(model, plan_for(model, an_adapter({"0": PAIR, "1": huge})))
    assert equal(model[0].weight.detach(), a_linear(torch.float16).weight.detach())


def test_a_base_that_is_not_finite_is_refused() -> None:
    model = a_model()
    with torch.no_grad():
        model[0].weight[1, 2] = float("-inf")
    with pytest.raises(InputRefused, match=r"0\.weight: 1 value .*: the base's own tensor has some"):
        layers.fold(model, plan_for(model, an_adapter({"0": PAIR})))


both = pytest.mark.parametrize("put", [layers.attach, layers.fold], ids=["attach", "fold"])


@both
@pytest.mark.fault(19)
def test_a_tied_weight_is_refused_with_both_names(put: Callable[[nn.Module, Plan], None]) -> None:
    model = tiny_bert(BertForMaskedLM, vocab_size=11)
    head = an_adapter({"cls.predictions.decoder": a_pair(11, 8)})
    before = copy.deepcopy(model.state_dict())
    names = r'bert\.embeddings\.word_embeddings\.weight and cls\.predictions\.decoder\.weight.*tied="untie"'
    with pytest.raises(InputRefused, match=names):
        put(model, plan_for(model, head))
    assert all(equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    untouched = an_adapter({"bert.encoder.layer.0.attention.self.query": a_pair(8, 8)})
    put(model, plan_for(model, untouched))  # ties elsewhere are no obstacle


@both
@pytest.mark.fault(19)
def test_one_layer_under_two_names_is_tied(put: Callable[[nn.Module, Plan], None]) -> None:
    layer = a_linear()
    model = nn.ModuleDict({"left": layer, "right": layer})
    with pytest.raises(InputRefused, match=r"left\.weight and right\.weight"):
        put(model, plan_for(model, an_adapter({"right": PAIR})))


@both
@pytest.mark.fault(19)
def test_weights_that_share_memory_are_tied(put: Callable[[nn.Module, Plan], None]) -> None:
    model = nn.ModuleDict({"left": a_linear(), "right": a_linear()})
    model["right"].weight = nn.Parameter(model["left"].weight.detach())
    with pytest.raises(InputRefused, match=r"left\.weight and right\.weight"):
        put(model, plan_for(model, an_adapter({"right": PAIR})))


@both
def test_an_embedding_tied_to_the_head_is_refused(put: Callable[[nn.Module, Plan], None]) -> None:
    tied = nn.ModuleDict({"words": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    tied["head"].weight = tied["words"].weight
    for pairs in ({"words": ones(3, 5, embedding=True)}, {"head": ones(5, 3)}):
        with pytest.raises(InputRefused, match=r"one tensor under several names: words\.weight and head\.weight"):
            put(tied, plan_for(tied, an_adapter(pairs)))


def tied_tables() -> nn.ModuleDict:
    tied = nn.ModuleDict({"words": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    tied["words"].weight = nn.Parameter(torch.arange(15.0).reshape(5, 3))
    tied["head"].weight = tied["words"].weight
    return tied


def outputs(tied: nn.ModuleDict) -> tuple[list[float], list[float]]:
    return tied["words"](torch.tensor([4]))[0].tolist(), tied["head"](torch.eye(3))[:, 4].tolist()


@both
@pytest.mark.parametrize(
    ("replaced", "rows"),
    [
        ({"head.weight": 7}, ([12, 13, 14], [7, 7, 7])),
        ({"words.weight": 7}, ([7, 7, 7], [12, 13, 14])),
        ({"words.weight": 7, "head.weight": 8}, ([7, 7, 7], [8, 8, 8])),
        ({"words.weight": 7, "head.weight": 7}, ([7, 7, 7], [7, 7, 7])),
    ],
)
def test_a_whole_tensor_unties_its_name(put: Callable[[nn.Module, Plan], None], replaced, rows) -> None:
    tied = tied_tables()
    whole = {name: np.full((5, 3), value, np.float32) for name, value in replaced.items()}
    put(tied, plan_for(tied, an_adapter({}, replaced=whole)))
    assert outputs(tied) == rows
    if put is layers.attach:
        layers.detach(tied)
        assert tied["head"].weight is tied["words"].weight and outputs(tied) == ([12, 13, 14], [12, 13, 14])


@both
@pytest.mark.parametrize("names", [["words"], ["words", "head"]])
def test_rows_of_the_first_name_or_of_all_change_all(put: Callable[[nn.Module, Plan], None], names) -> None:
    tied = tied_tables()
    put(tied, plan_for(tied, an_adapter({}, token_rows={f"{name}.weight": row(7) for name in names})))
    assert outputs(tied) == ([7, 7, 7], [7, 7, 7])


@both
@pytest.mark.parametrize("names", [{"head": 7}, {"words": 7, "head": 8}])
def test_rows_of_another_name_alone_are_refused(put: Callable[[nn.Module, Plan], None], names) -> None:
    """PEFT trains these for that name alone."""
    tied = tied_tables()
    rows = {f"{name}.weight": row(value) for name, value in names.items()}
    with pytest.raises(InputRefused, match=r"one tensor under several names: words\.weight and head\.weight"):
        put(tied, plan_for(tied, an_adapter({}, token_rows=rows)))
    assert outputs(tied) == ([12, 13, 14], [12, 13, 14])


def row(value: float) -> TokenRows:
    return TokenRows(np.array([4]), np.full((1, 3), value, np.float32))


@both
def test_equal_pairs_of_all_names_are_added_once(put: Callable[[nn.Module, Plan], None]) -> None:
    tied = tied_tables()
    table = LoraPair(a=[[0, 0, 0, 0, 1]], b=[[1], [2], [3]], scale=10.0, embedding=True)
    head = LoraPair(a=table.b.T, b=table.a.T, scale=10.0)
    put(tied, plan_for(tied, an_adapter({"words": table, "head": head})))
    assert outputs(tied) == ([22, 33, 44], [22, 33, 44])
    assert tied["head"].weight is tied["words"].weight or put is layers.attach


@both
@pytest.mark.parametrize("other", [{"scale": 2.0}, {"a": [[1, 2, 4]]}, {"b": [[0], [0], [0], [1], [0]]}])
def test_unequal_pairs_of_all_names_are_refused(put: Callable[[nn.Module, Plan], None], other) -> None:
    tied = tied_tables()
    table = LoraPair(a=[[0, 0, 0, 0, 1]], b=[[1], [2], [3]], scale=1.0, embedding=True)
    head = LoraPair(**{"a": table.b.T, "b": table.a.T, "scale": 1.0, **other})
    with pytest.raises(InputRefused, match=r"one tensor under several names: words\.weight and head\.weight"):
        put(tied, plan_for(tied, an_adapter({"words": table, "head": head})))


@both
def test_a_whole_tensor_for_a_shared_layer_is_refused(put: Callable[[nn.Module, Plan], None]) -> None:
    layer = a_linear()
    model = nn.ModuleDict({"left": layer, "right": layer})
    whole = {"left.weight": np.ones(tuple(layer.weight.shape), np.float32)}
    with pytest.raises(InputRefused, match=r"left\.weight and right\.weight"):
        put(model, plan_for(model, an_adapter({}, replaced=whole)))


@both
def test_a_second_plan_on_attached_adapters_is_refused(put: Callable[[nn.Module, Plan], None]) -> None:
    model = a_model()
    the_plan = plan_for(model, an_adapter({"0": PAIR}, name="first"))
    layers.attach(model, the_plan)
    with pytest.raises(InputRefused, match=r"attached already \(first\): detach first"):
        put(model, the_plan)
    assert equal(model(X), torch.tensor([[8.0, 16.0]]))


@both
def test_a_head_that_the_module_lacks_is_refused(put: Callable[[nn.Module, Plan], None]) -> None:
    model = a_model()
    added = an_adapter({"0": PAIR}, replaced={"head.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(InputRefused, match=r"the module has no head\.weight"):
        put(model, plan_for(model, added, may_add=True))


@both
def test_a_replaced_tensor_that_overflows_is_refused(put: Callable[[nn.Module, Plan], None]) -> None:
    model = a_model(torch.float16)
    adapter = an_adapter({"0": PAIR}, replaced={"0.bias": np.array([1e5, 0], np.float32)})
    with pytest.raises(InputRefused, match=r"0\.bias: 1 value would not be finite: the largest is 1e\+05"):
        put(model, plan_for(model, adapter))
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("put", [layers.attach, layers.fold])
def test_dora_on_an_output_of_norm_zero_is_refused(put):
    base = nn.Sequential(nn.Linear(2, 3))
    with torch.no_grad():
        base[0].weight.copy_(torch.tensor([[-1.0, -1], [0, 0], [-1, -1]]))
    the_plan = plan.make([Adapter("a", "test", {"0": ones(3, 2, magnitude=np.ones(3))})], layers.specs(base))
    with pytest.raises(InputRefused, match=r"0\.weight: W \+ sBA is zero in 2 of its outputs, to which DoRA cannot"):
        put(base, the_plan)
    assert type(base[0]) is nn.Linear and base[0].weight[0].tolist() == [-1, -1]
