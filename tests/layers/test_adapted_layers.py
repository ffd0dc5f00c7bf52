"""What layers with adapters compute: W + strength * scale * B A, computed here in NumPy."""

from __future__ import annotations

import copy
import io

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_export import formats, layers, plan
from lora_export.errors import InputRefused
from lora_export.layers.adapted_layers import expert_of
from lora_export.layers.attachments import attachment_of, is_attached, low_rank_factors, part_of
from lora_export.lora import Adapter, LoraPair
from support import experts
from support.experts import MODELS, experts_adapter, gates_of, some_experts_of
from support.slow import slow
from support.small_layers import (
    PAIR,
    X,
    a_linear,
    a_model,
    a_pair,
    an_adapter,
    an_encoder_layer,
    by_hand,
    count_calls,
    delta,
    encoder_changes,
    equal,
    plan_for,
)
from support.tiny_models import tiny_gpt2

# --- Linear layers ---


def test_a_linear_layer_adds_its_branch() -> None:
    model = a_model()
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR})))
    assert equal(model(X), torch.tensor([[8.0, 16.0]]))
    assert isinstance(model[0], nn.Linear)


def test_the_weight_includes_the_change_and_the_state_dict_does_not() -> None:
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


def test_adapters_on_one_weight_add_up_at_their_strengths() -> None:
    model = a_model()
    one = an_adapter({"0": PAIR}, name="one")
    two = an_adapter({"0": LoraPair(a=np.array([[0, 1, 0]]), b=np.array([[1], [0]]), scale=1.0)}, name="two")
    three = an_adapter({"0": LoraPair(a=np.array([[0, 0, 1]]), b=np.array([[0], [4]]), scale=1.0)}, name="three")
    layers.attach(model, plan_for(model, one, two, three, strengths=[1.0, -3.0, 0.5]))
    assert equal(model[0].weight, torch.tensor([[3.0, -1, 1], [8, 5, 4]]))
    assert equal(model(X), torch.tensor([[5.0, 20.0]]))
    assert {"0.lora_A.one", "0.lora_B.two", "0.lora_A.three"} <= set(model.state_dict())


def test_a_bias_is_shifted() -> None:
    model = a_model()
    shifted = an_adapter({"0": PAIR}, biases={"0": np.array([10, 20], np.float32)})
    layers.attach(model, plan_for(model, shifted, strengths=[2.0]))
    assert equal(model(X), torch.tensor([[10.0 - 4 + 20, 20.0 - 8 + 40]]))
    assert equal(model[0].bias, torch.tensor([21.0, 39.0]))
    with layers.scale_adapters(model, 0.5):
        assert equal(model(X), torch.tensor([[10.0 - 2 + 10, 20.0 - 4 + 20]]))


def test_a_forward_of_its_own_reads_the_adapted_weight() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * F.linear(input, self.weight, self.bias)

    model = nn.Sequential(Doubled(3, 2))
    model.load_state_dict(a_model().state_dict())
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR})))
    assert equal(model(X), torch.tensor([[16.0, 32.0]]))
    assert isinstance(model[0], Doubled)


class Router(nn.Module):
    """A matrix of its own without a bias, or with a buffer of that name."""

    def __init__(self, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(2, 3))
        if bias is not None:
            self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, getattr(self, "bias", None))


@pytest.mark.parametrize("bias", [None, torch.tensor([5.0, 7.0])])
def test_a_matrix_without_a_bias_can_be_traced(bias: Tensor | None) -> None:
    model = nn.Sequential(Router(bias)).eval()
    expected = by_hand(model, {"0.weight": delta(PAIR)})(X)
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR})))
    for program in (model, torch.jit.trace(model, X), torch.export.export(model, (X,)).module()):
        assert equal(program(X), expected)


def test_a_bf16_weight_is_summed_in_fp32_and_rounded_once() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False, dtype=torch.bfloat16))
    nn.init.constant_(model[0].weight, 256)
    pair = LoraPair(a=np.ones((1, 1)), b=np.ones((1, 1)), scale=1 + 2**-8)  # as bf16 it is 1, and 257 becomes 256
    layers.attach(model, plan_for(model, an_adapter({"0": pair})))
    assert equal(model[0].weight.detach(), torch.tensor([[258.0]], dtype=torch.bfloat16))


# --- Attention and whole encoders ---


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


# --- transformers' Conv1D ---


def test_a_conv1d_adds_its_branch() -> None:
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
    base = tiny_gpt2().double()
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


# --- Convolutions and embeddings ---


def test_a_dilated_convolution_computes_its_merge():
    # PEFT gives its A no dilation: it merges such a convolution, but cannot run it.
    base = nn.ModuleDict({"conv": nn.Conv2d(2, 3, 3, dilation=2, stride=2, padding=1, padding_mode="reflect")}).double()
    rng = np.random.default_rng(0)
    pair = LoraPair(a=rng.normal(size=(2, 2, 3, 3)), b=rng.normal(size=(3, 2, 1, 1)), scale=0.5)
    the_plan = plan.make([Adapter("a", "test", {"conv": pair})], layers.specs(base))
    attached, folded = copy.deepcopy(base), copy.deepcopy(base)
    layers.attach(attached, the_plan)
    layers.fold(folded, the_plan)
    x = torch.randn(2, 2, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(attached["conv"](x), folded["conv"](x), rtol=1e-12, atol=1e-12)
    assert (attached["conv"](x) - base["conv"](x)).abs().max() > 0.1


@pytest.mark.parametrize("dora", [False, True])
def test_the_forward_of_convolution_and_embedding_does_not_merge(dora):
    # 1e8 + 1 is 1e8 in fp32: a merge loses the adapter, and a branch does not.
    conv, words = nn.Conv1d(2, 1, 1, bias=False), nn.Embedding(2, 1)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[[1e8], [-1e8]]]))
        words.weight.copy_(torch.tensor([[1e8], [0]]))
    base = nn.ModuleDict({"conv": conv, "words": words})
    lengths = {"magnitude": [2e8]} if dora else {}
    kernel = LoraPair(a=np.ones((1, 2, 1)), b=np.ones((1, 1, 1)), scale=1.0, **lengths)
    pairs = {"conv": kernel, "words": LoraPair(a=[[1, 1]], b=[[1]], scale=1.0, embedding=True, **lengths)}
    layers.attach(base, plan.make([Adapter("a", "test", pairs)], layers.specs(base)))
    factor = 2e8 / 1e8 if dora else 1
    assert base["conv"](torch.ones(1, 2, 1)).item() == pytest.approx(2 * (factor / 2**0.5 if dora else 1))
    assert base["words"](torch.tensor([1])).item() == pytest.approx(factor)
    assert base["conv"].weight[0, 0, 0].item() == pytest.approx(1e8 * (factor / 2**0.5 if dora else 1))


# --- Copies, casts, traces and exports ---


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


def test_double_converts_the_adapters_too() -> None:
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


def test_a_module_converted_to_bf16_rounds_once() -> None:
    module, x = attached_encoder()
    module.to(torch.bfloat16)
    weight = module.linear1._parameters["weight"]
    a, b = (module.state_dict()[f"linear1.lora_{side}.default"] for side in "AB")
    assert equal(module.linear1.weight, (weight + (b @ a) * 0.125).to(torch.bfloat16))
    assert module(x.to(torch.bfloat16)).dtype is torch.bfloat16


def test_a_state_dict_is_loaded_into_another_attached_module() -> None:
    module, x = attached_encoder()
    twin = an_encoder_layer().eval()
    pairs, _ = encoder_changes(seed=5)
    layers.attach(twin, plan_for(twin, an_adapter(pairs)))
    assert not equal(twin(x), module(x))
    twin.load_state_dict(module.state_dict())
    assert equal(twin(x), module(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_a_trace_has_the_adapter_and_takes_other_shapes(grad: bool) -> None:
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


@pytest.mark.parametrize("grad", [True, slow(False)])
def test_an_exported_program_has_the_adapter_and_takes_other_shapes(grad: bool) -> None:
    module, x = attached_encoder()
    with torch.set_grad_enabled(grad):
        dynamic = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")},)
        program = torch.export.export(module, (x,), dynamic_shapes=dynamic)
        other = torch.randn(5, 7, 8)
        torch.testing.assert_close(program.module()(other), module(other))
    assert "linear1.lora_A.default" in program.state_dict


def test_functional_call_replaces_b() -> None:
    model = a_model()
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR})))
    zero = {"0.lora_B.default": torch.zeros(2, 1)}
    assert equal(torch.func.functional_call(model, zero, (X,)), torch.tensor([[10.0, 20.0]]))


IDS = torch.tensor([[3, 9, 27, 17, 51], [5, 15, 45, 7, 21]])


def logits(module: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return module(ids).logits


@pytest.fixture(scope="module", params=[*sorted(MODELS), "olmoe-router"])
def trained(request, tmp_path_factory):
    """A model, its plan, and the outputs of PEFT's model with the adapter, also one of a router."""
    name, _, router = request.param.partition("-")
    model = experts.tiny_model(name)
    parameters = ["experts.gate_up_proj", "experts.down_proj", *(["gate.weight"] if router else [])]
    wrapped = experts.peft_model(name, model, target_parameters=parameters)
    folder = tmp_path_factory.mktemp(request.param) / "adapter"
    wrapped.save_pretrained(folder)
    adapters = layers.respelled_for(model, [formats.load(folder)])
    return model, plan.make(adapters, layers.specs(model)), logits(wrapped)


def attached_to(model, changes):
    module = copy.deepcopy(model)
    layers.attach(module, changes)
    return module


def test_an_attached_module_computes_what_peft_computes(trained):
    model, changes, expected = trained
    module = attached_to(model, changes)
    assert (logits(model) - expected).abs().max() > 0.05
    torch.testing.assert_close(logits(module), expected, rtol=0, atol=1e-6)
    with layers.scale_adapters(module, 0.0):
        assert torch.equal(logits(module), logits(model))
    layers.detach(module)
    assert torch.equal(logits(module), logits(model))
    assert [type(one) for one in module.modules()] == [type(one) for one in model.modules()]


def test_a_folded_module_computes_what_peft_computes(trained):
    model, changes, expected = trained
    module = copy.deepcopy(model)
    layers.fold(module, changes)
    torch.testing.assert_close(logits(module), expected, rtol=0, atol=1e-6)


def test_materialised_weights_are_rounded_sums(trained):
    model, changes, _ = trained
    module = attached_to(model.double(), changes)
    names = {step.spec.stored_name for step in changes.steps if step.spec.region is not None}
    layers.materialise(module, dict.fromkeys(names, "bfloat16"), {})
    folded = copy.deepcopy(model)
    layers.fold(folded, changes)
    wanted = {name: value.to(torch.bfloat16).double() for name, value in folded.state_dict().items() if name in names}
    assert wanted and all(torch.equal(module.state_dict()[name], value) for name, value in wanted.items())
    model.float()


def test_only_the_experts_that_get_a_token_are_recorded():
    model = experts.tiny_model("mixtral")
    adapter = experts_adapter(model)
    module = attached_to(model, plan.make([adapter], layers.specs(model)))
    chosen: set[int] = set()
    (owner,) = (one for one in module.modules() if is_attached(one))
    hook = owner.register_forward_pre_hook(lambda _, args: chosen.update(args[1].unique().tolist()))
    with layers.recorded_branches() as recorded:
        logits(module, IDS[:1, :1])
    hook.remove()
    assert {expert_of(branch, owner) for branch in recorded} == chosen and len(chosen) == 2
    assert len(attachment_of(owner).branches) == 2 * experts.COUNT


def nodes_of(output):
    """The names of the nodes of autograd below a tensor."""
    found, open_nodes = set(), [output.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is not None and node not in found:
            found.add(node)
            open_nodes += [following for following, _ in node.next_functions]
    return [node.name() for node in found]


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_each_weight_of_experts_is_summed_once_by_one_product(implementation):
    """A sum for each expert, or for each reading of the weight, copies gradients of the whole weight for each."""
    model = experts.tiny_model("mixtral")
    model.set_experts_implementation(implementation)
    module = attached_to(model, plan.make([experts_adapter(model)], layers.specs(model)))
    assert experts.COUNT > 2
    nodes = nodes_of(module(IDS).logits.sum())
    assert nodes.count("BaddbmmBackward0") == 2 and "CopySlices" not in nodes


def test_autocast_does_not_round_the_sums_of_experts():
    model = experts.tiny_model("mixtral")
    module = attached_to(model, plan.make([experts_adapter(model)], layers.specs(model)))
    (owner,) = (one for one in module.modules() if is_attached(one))
    with torch.autocast("cpu", torch.bfloat16):
        summed = owner.gate_up_proj
    assert torch.equal(summed, owner.gate_up_proj)
    program = torch.export.export(module, (IDS,), {"use_cache": False}, strict=False)
    assert not any("autocast" in str(node.target).lower() for node in program.graph.nodes)


@pytest.mark.parametrize(
    "adapters",
    [[gates_of], [some_experts_of], [experts_adapter, some_experts_of]],
    ids=["gates", "some", "all"],
)
def test_parts_of_experts_are_summed_and_trained_as_folded(adapters):
    """The sums are those of a folded weight. A gradient is that of the weight, by the rule of products."""
    model = experts.tiny_model("mixtral").double()
    model.set_experts_implementation("eager")  # PyTorch's product of experts has no fp64
    changes = plan.make([make(model) for make in adapters], layers.specs(model))
    module, folded = copy.deepcopy(model), copy.deepcopy(model)
    layers.attach(module, changes, trainable=True)
    layers.fold(folded, changes)
    for each in (module, folded):
        each(IDS).logits.square().sum().backward()
    torch.testing.assert_close(module(IDS).logits, folded(IDS).logits, rtol=0, atol=1e-12)
    assert (logits(model) - logits(folded)).abs().max() > 0.05
    (owner,) = (one for one in module.modules() if is_attached(one))
    (whole,) = (one for one in folded.modules() if type(one) is attachment_of(owner).original)
    for branch in attachment_of(owner).branches:
        a, b = low_rank_factors(owner, branch)
        gradient = part_of(getattr(whole, branch.weight).grad, branch.region) * branch.scale
        torch.testing.assert_close(a.grad, b.detach().T @ gradient, rtol=0, atol=1e-9)
        torch.testing.assert_close(b.grad, gradient @ a.detach().T, rtol=0, atol=1e-9)


def test_a_part_of_a_linear_layer_is_not_attached():
    module = torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 4)})
    pair = LoraPair(a=torch.ones(1, 4).numpy(), b=torch.ones(2, 1).numpy(), scale=1)
    changes = plan.make([Adapter("ad", "peft", {"fc.weight[0:2]": pair})], layers.specs(module))
    with pytest.raises(
        InputRefused, match=r"fc\.weight\[0:2\] is a part of a layer's weight; only a merge into a chec"
    ):
        layers.attach(module, changes)
