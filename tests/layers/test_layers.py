"""Adapters on modules: every expectation is W + strength * scale * B A computed beside the code under test."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from lora_export import layers, plan
from lora_export.errors import InputRefused
from lora_export.lora import Adapter, LoraPair
from lora_export.plan import Layout, Plan
from support.handmade import rounded_sum

# --- Helpers ---


def integers(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).integers(-2, 3, size=shape).astype(np.float32)


def a_pair(out: int, inner: int, *, rank: int = 2, scale: float = 0.5, seed: int = 0) -> LoraPair:
    return LoraPair(a=integers(rank, inner, seed=seed + 1), b=integers(out, rank, seed=seed + 2), scale=scale)


def an_adapter(pairs: Mapping[str, LoraPair], *, name: str = "default", **fields: Any) -> Adapter:
    return Adapter(name=name, format="test", pairs=pairs, **fields)


def plan_for(module: nn.Module, *adapters: Adapter, **options: Any) -> Plan:
    return plan.make(adapters, layers.specs(module), **options)


def by_hand(module: nn.Module, changes: Mapping[str, NDArray[Any]]) -> nn.Module:
    """A plain copy whose tensors are W + ΔW, added in NumPy's fp64."""
    plain = copy.deepcopy(module)
    with torch.no_grad():
        for name, change in changes.items():
            tensor = plain.state_dict()[name]
            tensor.copy_(torch.from_numpy(tensor.double().numpy() + change))
    return plain


def delta(pair: LoraPair, strength: float = 1.0) -> NDArray[np.float64]:
    return strength * pair.scale * (pair.b.astype(np.float64) @ pair.a.astype(np.float64))


def a_linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    """W = [[1, 2, 3], [4, 5, 6]], bias = [1, -1]."""
    linear = nn.Linear(3, 2, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
        linear.bias.copy_(torch.tensor([1.0, -1]))
    return linear


def a_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The layer above under the name `0`."""
    return nn.Sequential(a_linear(dtype))


# ΔW = 2 * [[1], [2]] [[1, 0, -1]] = [[2, 0, -2], [4, 0, -4]]
PAIR = LoraPair(a=np.array([[1, 0, -1]]), b=np.array([[1], [2]]), scale=2.0)
X = torch.tensor([[1.0, 1, 2]])  # W x + bias = [10, 20], ΔW x = [-2, -4]


def equal(left: Tensor, right: Tensor) -> bool:
    return left.dtype is right.dtype and torch.equal(left, right)


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[str]:
    calls: list[str] = []
    real = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


# --- specs ---


def test_specs_are_the_state_dict_in_its_order() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Conv1d(2, 2, 1), nn.Embedding(4, 2))
    module.register_buffer("kept", torch.zeros(1, dtype=torch.bfloat16))
    module.register_buffer("passing", torch.zeros(1), persistent=False)
    specs = layers.specs(module)
    state = module.state_dict()
    assert [spec.name for spec in specs] == list(state)
    assert [spec.shape for spec in specs] == [tuple(tensor.shape) for tensor in state.values()]
    assert [spec.nbytes for spec in specs] == [tensor.nbytes for tensor in state.values()]
    by_name = {spec.name: spec for spec in specs}
    assert by_name["0.weight"].layout is Layout.OUT_IN
    assert (by_name["2.weight"].layout, by_name["2.weight"].matrix) == (Layout.OUT_IN, (2, 2, 1))
    assert (by_name["3.weight"].layout, by_name["3.weight"].matrix) == (Layout.EMBEDDING, (2, 4))
    others = {spec.layout for spec in specs if spec.name not in ("0.weight", "2.weight", "3.weight")}
    assert others == {Layout.OTHER}
    assert (by_name["kept"].dtype, by_name["1.num_batches_tracked"].dtype) == ("bfloat16", "int64")


def test_attention_is_out_in_packed_and_separate() -> None:
    module = nn.ModuleDict({"packed": nn.MultiheadAttention(4, 2), "apart": nn.MultiheadAttention(4, 2, kdim=3)})
    linear = {spec.name: spec.matrix for spec in layers.specs(module) if spec.layout is Layout.OUT_IN}
    assert linear == {
        "packed.in_proj_weight": (12, 4),
        "packed.out_proj.weight": (4, 4),
        "apart.q_proj_weight": (4, 4),
        "apart.k_proj_weight": (4, 3),
        "apart.v_proj_weight": (4, 4),
        "apart.out_proj.weight": (4, 4),
    }


def test_transformers_conv1d_is_in_out() -> None:
    spec = layers.specs(nn.Sequential(Conv1D(5, 3)))[0]
    assert (spec.name, spec.shape, spec.layout, spec.matrix) == ("0.weight", (3, 5), Layout.IN_OUT, (5, 3))


def test_tied_tensors_are_listed_under_both_names() -> None:
    module = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    module["head"].weight = module["embed"].weight
    assert [spec.name for spec in layers.specs(module)] == ["embed.weight", "head.weight"]


def test_a_lazy_module_is_refused() -> None:
    with pytest.raises(InputRefused, match=r"0\.weight has no shape yet"):
        layers.specs(nn.Sequential(nn.LazyLinear(3)))


# --- attach: linear layers ---


def test_a_linear_layer_computes_its_weight_and_its_branch() -> None:
    model = a_model()
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR})))
    assert equal(model(X), torch.tensor([[8.0, 16.0]]))
    assert isinstance(model[0], nn.Linear)


def test_whoever_reads_the_weight_finds_the_change_and_the_state_dict_keeps_the_base() -> None:
    model = a_model()
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR}, name="style")))
    assert equal(model[0].weight, torch.tensor([[3.0, 2, 1], [8, 5, 2]]))
    state = model.state_dict()
    assert list(state) == ["0.weight", "0.bias", "0.lora_A.style", "0.lora_B.style"]
    assert equal(state["0.weight"], a_linear().weight.detach())


def test_the_forward_of_a_linear_layer_does_not_merge() -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1e8, -1e8]]))
    pair = LoraPair(a=np.ones((1, 2)), b=np.ones((1, 1)), scale=1.0)
    layers.attach(model, plan_for(model, an_adapter({"0": pair})))
    assert equal(model[0].weight, torch.tensor([[1e8, -1e8]]))  # 1e8 + 1 is 1e8 in fp32: a merge loses the adapter
    assert equal(model(torch.ones(1, 2)), torch.tensor([[2.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_computes_the_same_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0", "2"], init_lora_weights=False)
    oracle = peft.get_peft_model(copy.deepcopy(base), config)
    state = peft.get_peft_model_state_dict(oracle)
    pairs = {
        name: LoraPair(
            a=state[f"base_model.model.{name}.lora_A.weight"].float().numpy(),
            b=state[f"base_model.model.{name}.lora_B.weight"].float().numpy(),
            scale=1.5,
        )
        for name in ("0", "2")
    }
    adapter_plan = plan_for(base, an_adapter(pairs))
    x = torch.randn(4, 5, dtype=dtype)
    expected = oracle(x)
    attached = copy.deepcopy(base)
    layers.attach(attached, adapter_plan)
    assert equal(attached(x), expected)
    assert not torch.allclose(attached(x), base(x), atol=1e-2)
    merged = oracle.merge_and_unload()
    layers.fold(base, adapter_plan)
    for name, tensor in merged.state_dict().items():  # NumPy and torch may add the products in another order
        torch.testing.assert_close(base.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)


def test_three_adapters_on_one_weight_add_up_at_their_strengths() -> None:
    model = a_model()
    one = an_adapter({"0": PAIR}, name="one")
    two = an_adapter({"0": LoraPair(a=np.array([[0, 1, 0]]), b=np.array([[1], [0]]), scale=1.0)}, name="two")
    three = an_adapter({"0": LoraPair(a=np.array([[0, 0, 1]]), b=np.array([[0], [4]]), scale=1.0)}, name="three")
    layers.attach(model, plan_for(model, one, two, three, strengths=[1.0, -3.0, 0.5]))
    assert equal(model[0].weight, torch.tensor([[3.0, -1, 1], [8, 5, 4]]))
    assert equal(model(X), torch.tensor([[5.0, 20.0]]))
    assert {"0.lora_A.one", "0.lora_B.two", "0.lora_A.three"} <= set(model.state_dict())


def test_adapter_names_that_are_no_parameter_names_stay_apart() -> None:
    model = a_model()
    named = [an_adapter({"0": PAIR}, name=name) for name in ("v1.0", "v1_0", "items", "")]
    layers.attach(model, plan_for(model, *named))
    assert equal(model(X), torch.tensor([[10.0 - 8, 20.0 - 16]]))
    assert [name for name in model.state_dict() if "lora_A" in name] == [
        "0.lora_A.v1_0",
        "0.lora_A.v1_0_",
        "0.lora_A.items_",
        "0.lora_A._",
    ]


def test_a_bias_is_shifted() -> None:
    model = a_model()
    shifted = an_adapter({"0": PAIR}, biases={"0": np.array([10, 20], np.float32)})
    layers.attach(model, plan_for(model, shifted, strengths=[2.0]))
    assert equal(model(X), torch.tensor([[10.0 - 4 + 20, 20.0 - 8 + 40]]))
    assert equal(model[0].bias, torch.tensor([21.0, 39.0]))
    with layers.scale_adapters(model, 0.5):
        assert equal(model(X), torch.tensor([[10.0 - 2 + 10, 20.0 - 4 + 20]]))


def test_a_linear_layer_with_a_forward_of_its_own_runs_it_on_the_adapted_weight() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * F.linear(input, self.weight, self.bias)

    model = nn.Sequential(Doubled(3, 2))
    model.load_state_dict(a_model().state_dict())
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR})))
    assert equal(model(X), torch.tensor([[16.0, 32.0]]))
    assert isinstance(model[0], Doubled)


# --- attach: attention and whole encoders ---

TARGETS = {
    "self_attn": (24, 8),
    "self_attn.out_proj": (8, 8),
    "linear1": (16, 8),
    "linear2": (8, 16),
}


def an_encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    torch.manual_seed(1)
    return nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True, **options)


def encoder_changes(prefix: str = "", seed: int = 0) -> tuple[dict[str, LoraPair], dict[str, NDArray[np.float64]]]:
    pairs = {prefix + key: a_pair(*shape, scale=0.125, seed=seed) for key, shape in TARGETS.items()}
    weights = {key: "in_proj_weight" if key.endswith("self_attn") else "weight" for key in pairs}
    return pairs, {f"{key}.{weights[key]}": delta(pair) for key, pair in pairs.items()}


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "padded"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["norm first", "norm last"])
def test_an_encoder_layer_is_w_plus_sba_in_every_mode(
    monkeypatch: pytest.MonkeyPatch, norm_first: bool, training: bool, grad: bool, masked: bool
) -> None:
    base = an_encoder_layer(norm_first=norm_first).double().train(training)
    pairs, changes = encoder_changes()
    expected = by_hand(base, changes)
    attached = copy.deepcopy(base)
    layers.attach(attached, plan_for(attached, an_adapter(pairs)))
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    mask = torch.arange(5) >= torch.tensor([[5], [3], [2]]) if masked else None
    fast = count_calls(monkeypatch, torch, "_transformer_encoder_layer_fwd")
    with torch.set_grad_enabled(grad):
        ours = attached(x, src_key_padding_mask=mask)
        assert bool(fast) == (not training and not grad)  # the test reached the path that it is about
        theirs = expected(x, src_key_padding_mask=mask)
        plain = base(x, src_key_padding_mask=mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert (ours - plain).abs().max() > 0.1


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_an_encoder_with_nested_tensors_is_w_plus_sba(
    monkeypatch: pytest.MonkeyPatch, training: bool, grad: bool
) -> None:
    base = nn.TransformerEncoder(an_encoder_layer(), 2).train(training)
    pairs, changes = {}, {}
    for number in range(2):
        more_pairs, more_changes = encoder_changes(f"layers.{number}.", seed=10 * number)
        pairs |= more_pairs
        changes |= more_changes
    expected = by_hand(base, changes)
    attached = copy.deepcopy(base)
    layers.attach(attached, plan_for(attached, an_adapter(pairs)))
    x = torch.randn(3, 5, 8)
    mask = torch.arange(5) >= torch.tensor([[5], [3], [2]])
    nested = count_calls(monkeypatch, torch, "_nested_tensor_from_mask")
    with torch.set_grad_enabled(grad):
        ours = attached(x, src_key_padding_mask=mask)
        assert bool(nested) == (not training and not grad)
        theirs = expected(x, src_key_padding_mask=mask)
        plain = base(x, src_key_padding_mask=mask)
    torch.testing.assert_close(ours[~mask], theirs[~mask], rtol=1e-4, atol=1e-5)
    assert (ours - plain)[~mask].abs().max() > 0.1


@pytest.mark.parametrize("kdim", [None, 6], ids=["packed", "separate"])
def test_attention_alone_is_w_plus_sba(kdim: int | None) -> None:
    torch.manual_seed(0)
    base = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, kdim=kdim, vdim=kdim, dtype=torch.float64)}).eval()
    if kdim:
        shapes = {"attn.q_proj_weight": (8, 8), "attn.k_proj_weight": (8, 6), "attn.v_proj_weight": (8, 6)}
        names = dict(zip(shapes, shapes, strict=True))
    else:
        shapes = {"attn": (24, 8), "attn.out_proj": (8, 8)}
        names = {"attn": "attn.in_proj_weight", "attn.out_proj": "attn.out_proj.weight"}
    pairs = {key: a_pair(*shape, scale=0.25, seed=place) for place, (key, shape) in enumerate(shapes.items())}
    expected = by_hand(base, {names[key]: delta(pair) for key, pair in pairs.items()})
    attached = copy.deepcopy(base)
    layers.attach(attached, plan_for(attached, an_adapter(pairs)))
    query, other = torch.randn(4, 8, dtype=torch.float64), torch.randn(5, kdim or 8, dtype=torch.float64)
    ours, weights = attached["attn"](query, other, other)
    theirs, their_weights = expected["attn"](query, other, other)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weights, their_weights, rtol=1e-12, atol=1e-12)
    assert (ours - base["attn"](query, other, other)[0]).abs().max() > 0.1


# --- attach: transformers' Conv1D ---


def test_a_conv1d_computes_its_weight_and_its_branch() -> None:
    model = nn.Sequential(Conv1D(2, 3))
    with torch.no_grad():
        model[0].weight.copy_(a_linear().weight.T)
        model[0].bias.copy_(a_linear().bias)
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR})))
    assert equal(model(X), torch.tensor([[8.0, 16.0]]))
    assert equal(model[0].weight, torch.tensor([[3.0, 8], [2, 5], [1, 2]]))
    assert equal(model(X.expand(2, 1, 3)), torch.tensor([[[8.0, 16.0]], [[8.0, 16.0]]]))


def test_the_forward_of_a_conv1d_does_not_merge() -> None:
    model = nn.Sequential(Conv1D(1, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1e8], [-1e8]]))
    pair = LoraPair(a=np.ones((1, 2)), b=np.ones((1, 1)), scale=1.0)
    layers.attach(model, plan_for(model, an_adapter({"0": pair})))
    assert equal(model(torch.ones(1, 2)), torch.tensor([[2.0]]))


def test_gpt2_is_w_plus_sba() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=8)
    base = GPT2LMHeadModel(config).double().eval()
    pairs = {
        "transformer.h.0.attn.c_attn": a_pair(24, 8),
        "transformer.h.0.attn.c_proj": a_pair(8, 8),
        "transformer.h.0.mlp.c_fc": a_pair(32, 8),
    }
    expected = by_hand(base, {f"{key}.weight": delta(pair).T for key, pair in pairs.items()})
    attached = copy.deepcopy(base)
    layers.attach(attached, plan_for(attached, an_adapter(pairs)))
    tokens = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(attached(tokens).logits, expected(tokens).logits, rtol=1e-10, atol=1e-10)
    assert (attached(tokens).logits - base(tokens).logits).abs().max() > 1e-3


# --- attach: whole tensors ---


def test_a_whole_tensor_stands_in_the_bases_place() -> None:
    model = nn.Sequential(a_linear(), nn.BatchNorm1d(2)).eval()
    whole = {
        "1.weight": np.array([3, 4], ml_dtypes.bfloat16),
        "1.running_mean": np.array([1, 2], np.float32),
        "1.running_var": np.full(2, 1 - 1e-5, np.float32),
        "1.num_batches_tracked": np.array(7, np.int64),
    }
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR}, replaced=whole)))
    torch.testing.assert_close(model(X), torch.tensor([[3 * (8.0 - 1), 4 * (16.0 - 2)]]))
    assert model.state_dict()["1.num_batches_tracked"] == 7
    assert model[1].weight.dtype is torch.float32


def test_the_bias_of_an_adapted_layer_can_be_replaced() -> None:
    model = a_model()
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR}, replaced={"0.bias": np.zeros(2, np.float32)})))
    assert equal(model(X), torch.tensor([[8.0 - 1, 16.0 + 1]]))


# --- attach: training ---


def test_only_a_b_and_whole_tensors_get_gradients() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"encoder": an_encoder_layer(), "head": nn.Linear(8, 3)})
    pairs, _ = encoder_changes("encoder.")
    head = {name: _as_array(tensor) for name, tensor in model.state_dict().items() if name.startswith("head.")}
    layers.attach(model, plan_for(model, an_adapter(pairs, replaced=head)), trainable=True)
    model["head"](model["encoder"](torch.randn(2, 4, 8))).square().sum().backward()
    with_gradients = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    expected = {f"{key}.lora_{side}.default" for key in pairs for side in "AB"} | {"head.weight", "head.bias"}
    assert with_gradients == expected
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters() if parameter.grad is not None)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected


def test_an_adapter_attached_to_be_used_is_not_trained() -> None:
    model = a_model()
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR}, replaced={"0.bias": np.zeros(2, np.float32)})))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {"0.weight"}


def test_a_b_and_the_branch_stay_in_fp32_beside_low_precision() -> None:
    model = a_model(torch.bfloat16)
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR})), trainable=True)
    model(X.bfloat16()).sum().backward()
    assert model.state_dict()["0.lora_A.default"].dtype is torch.float32
    assert model(X.bfloat16()).dtype is torch.bfloat16
    assert model[0].weight.dtype is torch.bfloat16


def test_a_weight_in_low_precision_is_read_summed_in_fp32_and_rounded_once() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False, dtype=torch.bfloat16))
    nn.init.constant_(model[0].weight, 256)
    pair = LoraPair(a=np.ones((1, 1)), b=np.ones((1, 1)), scale=1 + 2**-8)  # as bf16 it is 1, and 257 becomes 256
    layers.attach(model, plan_for(model, an_adapter({"0": pair})))
    assert equal(model[0].weight.detach(), torch.tensor([[258.0]], dtype=torch.bfloat16))


def test_trainable_parameters_are_counted_in_one_call() -> None:
    model = a_model()
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR})), trainable=True)
    count = layers.count_parameters(model)
    assert (count.trained, count.total) == (5, 13)
    assert str(count) == "trainable parameters: 5 of 13 (38.5 %)"
    assert str(layers.ParameterCount(12_288, 22_713_216)) == "trainable parameters: 12,288 of 22,713,216 (0.0541 %)"


# --- attach: the module stays a module ---


def attached_encoder() -> tuple[nn.TransformerEncoderLayer, Tensor]:
    module = an_encoder_layer().eval()
    pairs, _ = encoder_changes()
    layers.attach(module, plan_for(module, an_adapter(pairs)))
    return module, torch.randn(2, 4, 8)


def test_a_deep_copy_is_attached_and_independent() -> None:
    module, x = attached_encoder()
    expected = module(x)
    twin = copy.deepcopy(module)
    assert equal(twin(x), expected)
    layers.detach(module)
    assert equal(twin(x), expected)
    assert not equal(module(x), expected)


def test_double_takes_everything_along() -> None:
    base = an_encoder_layer().eval()
    pairs, changes = encoder_changes()
    expected = by_hand(copy.deepcopy(base).double(), changes)
    module = copy.deepcopy(base)
    layers.attach(module, plan_for(module, an_adapter(pairs)))
    module.double()
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float64}
    torch.testing.assert_close(module(x), expected(x), rtol=1e-13, atol=1e-13)
    layers.detach(module)
    assert equal(module(x), copy.deepcopy(base).double()(x))


def test_bf16_is_rounded_once() -> None:
    module, x = attached_encoder()
    module.to(torch.bfloat16)
    weight = module.linear1._parameters["weight"]
    a, b = (module.state_dict()[f"linear1.lora_{side}.default"] for side in "AB")
    assert equal(module.linear1.weight, (weight + (b @ a) * 0.125).to(torch.bfloat16))
    assert module(x.to(torch.bfloat16)).dtype is torch.bfloat16


def test_a_state_dict_makes_the_round_trip() -> None:
    module, x = attached_encoder()
    twin = an_encoder_layer().eval()
    pairs, _ = encoder_changes(seed=5)
    layers.attach(twin, plan_for(twin, an_adapter(pairs)))
    assert not equal(twin(x), module(x))
    twin.load_state_dict(module.state_dict())
    assert equal(twin(x), module(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_a_trace_keeps_the_adapter_and_other_shapes(grad: bool) -> None:
    module, x = attached_encoder()
    with torch.set_grad_enabled(grad):
        buffer = io.BytesIO()
        # torch's own check of a trace runs without gradients, where an encoder layer takes another path.
        torch.jit.save(torch.jit.trace(module, (x,), check_trace=not grad), buffer)
        buffer.seek(0)
        loaded = torch.jit.load(buffer)
        other = torch.randn(5, 7, 8)
        torch.testing.assert_close(loaded(other), module(other))
    assert "linear1.lora_A.default" in dict(loaded.named_parameters())


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_an_exported_program_keeps_the_adapter_and_other_shapes(grad: bool) -> None:
    module, x = attached_encoder()
    with torch.set_grad_enabled(grad):
        dynamic = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")},)
        program = torch.export.export(module, (x,), dynamic_shapes=dynamic)
        other = torch.randn(5, 7, 8)
        torch.testing.assert_close(program.module()(other), module(other))
    assert "linear1.lora_A.default" in program.state_dict


def test_functional_call_swaps_a_and_b() -> None:
    model = a_model()
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR})))
    zero = {"0.lora_B.default": torch.zeros(2, 1)}
    assert equal(torch.func.functional_call(model, zero, (X,)), torch.tensor([[10.0, 20.0]]))


# --- strength ---


def test_at_strength_zero_everything_is_the_base_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.TransformerEncoder(an_encoder_layer(), 2), nn.Linear(8, 8), Conv1D(4, 8)).eval()
    pairs, _ = encoder_changes("0.layers.0.")
    pairs |= {"1": a_pair(8, 8), "2": a_pair(4, 8)}
    whole = {"0.layers.1.norm1.weight": np.full(8, 3, np.float32)}
    biases = {"1": np.ones(8, np.float32)}
    module = copy.deepcopy(base)
    layers.attach(module, plan_for(module, an_adapter(pairs, replaced=whole, biases=biases)))
    x = torch.randn(2, 4, 8)
    fast = count_calls(monkeypatch, torch, "_transformer_encoder_layer_fwd")
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            before = module(x)
            with layers.scale_adapters(module, 0.0):
                assert equal(module(x), base(x))
                assert equal(module[1].weight, base[1].weight)
            assert equal(module(x), before)
            assert not torch.allclose(before, base(x), atol=0.1)
    assert fast


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_a_strength_multiplies_every_branch(grad: bool) -> None:
    base = an_encoder_layer().double().eval()
    pairs, changes = encoder_changes()
    scaled = by_hand(base, {name: 1.1 * change for name, change in changes.items()})
    module = copy.deepcopy(base)
    layers.attach(module, plan_for(module, an_adapter(pairs)))
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        usual = module(x)
        with layers.scale_adapters(module, 1.1):
            torch.testing.assert_close(module(x), scaled(x), rtol=1e-12, atol=1e-12)
        assert (usual - scaled(x)).abs().max() > 1e-3


def test_strengths_nest_and_end_with_an_exception() -> None:
    model = a_model()
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR}, replaced={"0.bias": np.zeros(2, np.float32)})))
    with pytest.raises(KeyError), layers.scale_adapters(model, 2.0):
        with layers.scale_adapters(model, 3.0):
            assert equal(model(X), torch.tensor([[9.0 - 12, 21.0 - 24]]))
        with layers.scale_adapters(model, 0.0), layers.scale_adapters(model, 0.0):
            assert equal(model(X), torch.tensor([[10.0, 20.0]]))
        assert equal(model(X), torch.tensor([[9.0 - 4, 21.0 - 8]]))
        raise KeyError
    assert equal(model(X), torch.tensor([[9.0 - 2, 21.0 - 4]]))


def test_whole_tensors_can_stay_while_the_pairs_are_off() -> None:
    model = a_model()
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR}, replaced={"0.bias": np.zeros(2, np.float32)})))
    with layers.scale_adapters(model, 0.0, keep_replaced=True):
        assert equal(model(X), torch.tensor([[9.0, 21.0]]))


def test_whole_tensors_at_strength_zero_follow_the_modules_dtype() -> None:
    model = a_model()
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR}, replaced={"0.bias": np.zeros(2, np.float32)})))
    model.double()
    with layers.scale_adapters(model, 0.0):
        assert equal(model(X.double()), torch.tensor([[10.0, 20.0]], dtype=torch.float64))


@pytest.mark.parametrize("turn", [lambda module: layers.scale_adapters(module, 0.0).__enter__(), layers.detach])
def test_without_adapters_there_is_nothing_to_turn(turn: Callable[[nn.Module], None]) -> None:
    with pytest.raises(InputRefused, match="no adapter is attached"):
        turn(a_model())


# --- detach ---


def test_detach_brings_classes_and_tensors_back() -> None:
    base = nn.Sequential(an_encoder_layer(), Conv1D(4, 8)).eval()
    pairs, _ = encoder_changes("0.")
    whole = {"0.norm1.weight": np.full(8, 3, np.float32)}
    biases = {"0.linear1": np.ones(16, np.float32)}
    module = copy.deepcopy(base)
    layers.attach(module, plan_for(module, an_adapter({**pairs, "1": a_pair(4, 8)}, replaced=whole, biases=biases)))
    assert not equal(module(torch.ones(1, 2, 8)), base(torch.ones(1, 2, 8)))
    layers.detach(module)
    assert [type(part) for part in module.modules()] == [type(part) for part in base.modules()]
    assert list(module.state_dict()) == list(base.state_dict())
    for name, tensor in base.state_dict().items():
        assert equal(module.state_dict()[name], tensor)
    assert [set(vars(part)) for part in module.modules()] == [set(vars(part)) for part in base.modules()]
    layers.attach(module, plan_for(module, an_adapter(pairs)))  # and there is room for the next


# --- fold ---


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


def test_fold_in_bf16_rounds_once_as_the_checkpoints_merge_does() -> None:
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


def test_a_result_that_the_dtype_cannot_hold_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(a_linear(torch.float16), a_linear(torch.float16))
    huge = LoraPair(a=np.array([[1e3, 0, 0]]), b=np.array([[1e3], [0]]), scale=1.0)
    with pytest.raises(InputRefused, match=r"1\.weight: 1 values would not be finite: the largest is 1e\+06, float16"):
        layers.fold(model, plan_for(model, an_adapter({"0": PAIR, "1": huge})))
    assert equal(model[0].weight.detach(), a_linear(torch.float16).weight.detach())


def test_a_base_that_is_not_finite_is_named() -> None:
    model = a_model()
    with torch.no_grad():
        model[0].weight[1, 2] = float("-inf")
    with pytest.raises(InputRefused, match=r"0\.weight: 1 values .*: the base's own tensor has some"):
        layers.fold(model, plan_for(model, an_adapter({"0": PAIR})))


# --- what is refused, by attach and by fold ---

both = pytest.mark.parametrize("put", [layers.attach, layers.fold], ids=["attach", "fold"])


@both
@pytest.mark.fault(19)
def test_a_tied_weight_is_refused_with_both_its_names(put: Callable[[nn.Module, Plan], None]) -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=11)
    model = BertForMaskedLM(config).eval()
    head = an_adapter({"cls.predictions.decoder": a_pair(11, 8)})
    before = copy.deepcopy(model.state_dict())
    names = r"bert\.embeddings\.word_embeddings\.weight and cls\.predictions\.decoder\.weight.*Untie them explicitly"
    with pytest.raises(InputRefused, match=names):
        put(model, plan_for(model, head))
    assert all(equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    untouched = an_adapter({"bert.encoder.layer.0.attention.self.query": a_pair(8, 8)})
    put(model, plan_for(model, untouched))  # ties elsewhere are no obstacle


@both
@pytest.mark.fault(19)
def test_one_layer_under_two_names_is_tied_too(put: Callable[[nn.Module, Plan], None]) -> None:
    layer = a_linear()
    model = nn.ModuleDict({"left": layer, "right": layer})
    with pytest.raises(InputRefused, match=r"left\.weight and right\.weight"):
        put(model, plan_for(model, an_adapter({"right": PAIR})))


@both
@pytest.mark.fault(19)
def test_shared_memory_is_tied_too(put: Callable[[nn.Module, Plan], None]) -> None:
    model = nn.ModuleDict({"left": a_linear(), "right": a_linear()})
    model["right"].weight = nn.Parameter(model["left"].weight.detach())
    with pytest.raises(InputRefused, match=r"left\.weight and right\.weight"):
        put(model, plan_for(model, an_adapter({"right": PAIR})))


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
def test_a_whole_tensor_that_the_dtype_cannot_hold_is_refused(put: Callable[[nn.Module, Plan], None]) -> None:
    model = a_model(torch.float16)
    whole = an_adapter({"0": PAIR}, replaced={"0.bias": np.array([1e5, 0], np.float32)})
    with pytest.raises(InputRefused, match=r"0\.bias: 1 values would not be finite: the largest is 1e\+05"):
        put(model, plan_for(model, whole))
    assert type(model[0]) is nn.Linear


def test_a_layer_with_lora_of_its_own_is_refused() -> None:
    model = a_model()
    model[0].lora_A = nn.Parameter(torch.zeros(1, 3))  # as loralib's layers have it
    with pytest.raises(
        InputRefused, match=r"0\.weight: its Linear already has lora_A; give the model without its LoRA layers"
    ):
        layers.attach(model, plan_for(model, an_adapter({"0": PAIR})))


def test_only_a_linear_layers_bias_is_shifted() -> None:
    model = nn.Sequential(nn.LayerNorm(3), a_linear())
    shifted = an_adapter({"1": PAIR}, biases={"0": np.ones(3, np.float32)})
    with pytest.raises(InputRefused, match=r"0\.bias: only the bias of a linear layer or .* shifted, not LayerNorm"):
        layers.attach(model, plan_for(model, shifted))
    assert type(model[1]) is nn.Linear


# --- fresh adapters ---


def a_classifier() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=11, num_labels=3
    )
    return BertForSequenceClassification(config).eval()


def test_a_fresh_adapter_is_the_identity_and_trains_two_layers_and_the_head() -> None:
    model = a_classifier()
    tokens = torch.tensor([[1, 2, 3]])
    before = model(tokens).logits
    adapter = layers.create_adapter(
        model, targets=["query", "value"], rank=2, alpha=4, seed=0, modules_to_save=["classifier"], name="fresh"
    )
    attention = [f"bert.encoder.layer.{number}.attention.self" for number in range(2)]
    assert list(adapter.pairs) == [f"{there}.{name}" for there in attention for name in ("query", "value")]
    assert list(adapter.replaced) == ["classifier.weight", "classifier.bias"]
    assert {pair.scale for pair in adapter.pairs.values()} == {2.0}
    assert (adapter.name, adapter.targets) == ("fresh", ("query", "value"))
    assert adapter.metadata == {"r": 2, "lora_alpha": 4, "use_rslora": False}
    layers.attach(model, plan_for(model, adapter, identity_ok=True), trainable=True)
    assert equal(model(tokens).logits, before)
    assert layers.count_parameters(model).trained == 4 * (2 * 8 + 8 * 2) + 3 * 8 + 3


def test_a_is_kaiming_uniform_and_b_is_zero() -> None:
    model = nn.Sequential(nn.Linear(100, 50))
    pair = layers.create_adapter(model, targets=["0"], rank=16, alpha=8, seed=0, rslora=True).pairs["0"]
    assert (pair.a.shape, pair.b.shape, pair.scale) == ((16, 100), (50, 16), 2.0)
    assert 0.099 < np.abs(pair.a).max() <= 0.1
    assert pair.a.std() == pytest.approx(0.1 / np.sqrt(3), rel=0.05)
    assert not pair.b.any()


def test_a_seed_repeats_and_another_does_not() -> None:
    def first(seed: int) -> NDArray[np.float32]:
        return layers.create_adapter(a_model(), targets="all-linear", rank=1, alpha=1, seed=seed).pairs["0"].a

    assert (first(1) == first(1)).all()
    assert (first(1) != first(2)).any()


def test_all_linear_takes_packed_attention_and_every_linear_layer() -> None:
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(an_encoder_layer(), 1), "head": nn.Linear(8, 3)})
    inner = [f"encoder.layers.0.{key}" for key in TARGETS]
    adapter = layers.create_adapter(model, targets="all-linear", rank=2, alpha=2, seed=0)
    assert list(adapter.pairs) == [*inner, "head"]
    assert {key: pair.shape for key, pair in adapter.pairs.items()} == {
        **{f"encoder.layers.0.{key}": shape for key, shape in TARGETS.items()},
        "head": (3, 8),
    }
    without = layers.create_adapter(model, targets="all-linear", rank=2, alpha=2, seed=0, exclude=["head", "linear1"])
    assert list(without.pairs) == [key for key in inner if not key.endswith("linear1")]
    layers.attach(model, plan_for(model, without, identity_ok=True))


def test_all_linear_leaves_the_output_embeddings_alone() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=8))
    adapter = layers.create_adapter(model, targets="all-linear", rank=2, alpha=2, seed=0)
    assert list(adapter.pairs) == [
        f"transformer.h.0.{key}" for key in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert adapter.pairs["transformer.h.0.mlp.c_fc"].shape == (32, 8)
    layers.attach(model, plan_for(model, adapter, identity_ok=True))
    oracle = peft.get_peft_model(
        GPT2LMHeadModel(model.config), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    )
    assert {key.removeprefix("base_model.model.") for key in oracle.targeted_module_names} == set(adapter.pairs)


def test_a_target_in_the_whole_head_is_left_to_the_head() -> None:
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))})
    adapter = layers.create_adapter(model, targets="all-linear", rank=1, alpha=1, seed=0, modules_to_save=["head"])
    assert list(adapter.pairs) == ["body"]
    assert list(adapter.replaced) == ["head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"]


def test_a_single_layer_is_a_model_too() -> None:
    model = a_linear()
    adapter = layers.create_adapter(model, targets="all-linear", rank=1, alpha=1, seed=0)
    layers.attach(model, plan_for(model, adapter, identity_ok=True), trainable=True)
    assert layers.count_parameters(model).trained == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["qurey"]}, r"`qurey` matches no linear layer; the nearest: query"),
        ({"targets": ["embeddings"]}, r"`embeddings` is no linear layer; the nearest: "),
        (
            {"targets": ["query"], "modules_to_save": ["classifer"]},
            r"`classifer` matches no module; the nearest: classifier",
        ),
        ({"targets": "all-linear", "exclude": ["dense2"]}, r"`dense2` matches no module; the nearest: dense"),
        ({"targets": ["a", "b"]}, r"`a` matches no linear layer.*; `b` matches no linear layer"),
        ({"targets": ["classifier"], "modules_to_save": ["classifier"]}, "no linear layer is left to adapt"),
        ({"targets": ["query"], "rank": 0}, "rank 0 and alpha 1: both must be positive"),
        ({"targets": ["query"], "alpha": float("nan")}, "rank 1 and alpha nan: both must be positive"),
    ],
)
def test_a_wish_that_fits_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        layers.create_adapter(a_classifier(), **{"rank": 1, "alpha": 1, "seed": 0, **options})


# --- read_back ---


def _as_array(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().clone().numpy()


def test_what_was_trained_is_read_back() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "head": nn.Linear(4, 2).to(torch.bfloat16)})
    adapter = layers.create_adapter(
        model, targets=["attn", "out_proj"], rank=1, alpha=2, seed=0, modules_to_save=["head"]
    )
    other = an_adapter({"attn.out_proj": a_pair(4, 4)}, name="other")
    layers.attach(model, plan_for(model, adapter, other, identity_ok=True, strengths=[3.0, 1.0]), trainable=True)
    with torch.no_grad():
        model.get_parameter("attn.lora_B.default").fill_(2)
        model.get_parameter("attn.out_proj.lora_A.default").fill_(3)
        model["head"].weight.fill_(5)
    trained = layers.read_back(model, adapter)
    assert (trained.pairs["attn"].b == 2).all()
    assert (trained.pairs["attn"].a == adapter.pairs["attn"].a).all()
    assert (trained.pairs["attn.out_proj"].a == 3).all()
    assert {pair.scale for pair in trained.pairs.values()} == {2.0}
    assert trained.replaced["head.weight"].dtype == ml_dtypes.bfloat16
    assert (trained.replaced["head.weight"] == 5).all()
    with torch.no_grad():
        model["head"].weight.fill_(6)
    assert (trained.replaced["head.weight"] == 5).all()  # a copy, not a window


def test_the_names_read_back_are_the_adapters_own() -> None:
    model = nn.ModuleDict({"bert": a_model()})
    bare = an_adapter({"0": PAIR}, replaced={"0.bias": np.zeros(2, np.float32)})
    layers.attach(model, plan_for(model, bare))
    trained = layers.read_back(model, bare)
    assert (list(trained.pairs), list(trained.replaced)) == (["0"], ["0.bias"])


def test_what_training_broke_is_named() -> None:
    model = a_model()
    adapter = an_adapter({"0": PAIR})
    layers.attach(model, plan_for(model, adapter))
    with torch.no_grad():
        model.get_parameter("0.lora_B.default")[0] = float("nan")
    with pytest.raises(InputRefused, match="0: B holds 1 values that are not finite"):
        layers.read_back(model, adapter)


def test_only_an_attached_adapter_is_read_back() -> None:
    model = a_model()
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR}, name="one")))
    with pytest.raises(InputRefused, match="the adapter two is not attached"):
        layers.read_back(model, an_adapter({"0": PAIR}, name="two"))


def test_settling_rounds_each_sum_once_and_leaves_plain_layers() -> None:
    module = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 256.0]]))
    pair = LoraPair(a=np.array([[1, 1]]), b=np.array([[0.625]]), scale=1.0)
    holder = nn.Sequential(module)
    adapter = Adapter(name="a", format="test", pairs={"0": pair})
    layers.attach(holder, plan.make([adapter], layers.specs(holder)))
    layers.materialise(holder, {"0.weight": "bfloat16"}, preferred={})
    assert type(holder[0]) is nn.Linear
    # bf16 has steps of 1/128 at 1.625, which it holds, and of 2 at 256.625, which it rounds to 256.
    assert holder[0].weight.tolist() == [[1.625, 256.0]]
    assert holder[0].weight.dtype == torch.float64


def test_settling_takes_the_chosen_neighbour_only_where_fp32_could_not_tell() -> None:
    holder = nn.Sequential(nn.Linear(3, 1, bias=False)).double()
    with torch.no_grad():
        holder[0].weight.copy_(torch.tensor([[256.0, 256.0, 256.0]]))
    # The middle of bf16's 256 and 258 is 257: one sum lies on it, one a little and one well above.
    pair = LoraPair(a=np.array([[1.0, 1.0005, 1.25]]), b=np.array([[1.0]]), scale=1.0)
    adapter = Adapter(name="a", format="test", pairs={"0": pair})
    for chosen in (256.0, 258.0):
        there = copy.deepcopy(holder)
        layers.attach(there, plan.make([adapter], layers.specs(there)))
        layers.materialise(there, {"0.weight": "bfloat16"}, preferred={"0.weight": torch.full((1, 3), chosen)})
        assert there[0].weight.tolist() == [[chosen, chosen, 258.0]]
