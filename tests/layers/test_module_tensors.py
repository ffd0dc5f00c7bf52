"""The tensors that a module holds, and adapters under their names."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from transformers import ViTConfig, ViTForImageClassification
from transformers.pytorch_utils import Conv1D

from lora_export import layers, plan
from lora_export.errors import InputRefused, MatchError
from lora_export.layers.module_tensors import is_in_shares, own_share
from lora_export.plan import Layout
from support import experts
from support.plans import holding
from support.small_layers import PAIR, a_model, an_adapter, plan_for
from support.spellings import filled


def test_specs_follow_the_state_dict() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Conv1d(2, 2, 1), nn.Embedding(4, 2))
    module.register_buffer("persistent", torch.zeros(1, dtype=torch.bfloat16))
    module.register_buffer("other", torch.zeros(1), persistent=False)
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
    assert (by_name["persistent"].dtype, by_name["1.num_batches_tracked"].dtype) == ("bfloat16", "int64")


def test_attention_weights_are_out_in() -> None:
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


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 4))


class OwnNorm(nn.LayerNorm):
    pass


def test_matrices_of_classes_outside_torch_have_an_unknown_layout() -> None:
    module = nn.Sequential(Router(), nn.LayerNorm((3, 4)), OwnNorm((3, 4)), nn.RMSNorm((3, 4)))
    found = {spec.name: spec.layout for spec in layers.specs(module) if spec.name.endswith("weight")}
    assert found.pop("0.weight") is Layout.UNKNOWN
    assert set(found.values()) == {Layout.OTHER}


@pytest.mark.parametrize(
    ("stated", "found"),
    [
        ({"0": "in_out"}, "in_out"),
        ({"0.weight": "out_in"}, "out_in"),
        ({"*": "in_out", "0.*": "out_in"}, "out_in"),
        ({"*": "in_out"}, "in_out"),  # the linear layer stays what it is
        ({"1": "in_out"}, r"states that 1\.weight is in_out, but the model's is out_in"),
        ({"2": "in_out"}, "no matrix of the base has this name"),
    ],
)
def test_a_layout_is_stated_where_no_class_determines_it(stated: dict[str, str], found: str) -> None:
    module = nn.Sequential(Router(), nn.Linear(3, 3))
    if " " in found:
        with pytest.raises(InputRefused, match=found):
            layers.state_layouts(module, stated)
    else:
        assert layers.state_layouts(module, stated)
        assert not layers.state_layouts(nn.Sequential(nn.Linear(3, 3)), {"*": "in_out"})
        assert [spec.layout.value for spec in layers.specs(module)] == [found, "out_in", "other"]


def test_tied_tensors_are_listed_under_both_names() -> None:
    module = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    module["head"].weight = module["embed"].weight
    assert [spec.name for spec in layers.specs(module)] == ["embed.weight", "head.weight"]


def test_a_lazy_module_is_refused() -> None:
    with pytest.raises(InputRefused, match=r"0\.weight has no shape yet"):
        layers.specs(nn.Sequential(nn.LazyLinear(3)))


# --- Weights of which each of several processes holds a share (FSDP): PyTorch's DTensor ---


def test_a_plain_tensor_is_whole() -> None:
    tensor = torch.ones(2)
    assert own_share(tensor) is tensor and not is_in_shares(tensor)


@pytest.mark.usefixtures("process_group")
def test_a_weight_in_shares_is_read_as_it_is() -> None:
    model = a_model()
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR})))
    weight = model[0]._parameters["weight"]
    in_shares = torch.nn.Parameter(distribute_tensor(weight.detach(), init_device_mesh("cpu", (1,)), [Replicate()]))
    assert not torch.equal(model[0].weight, weight)  # W + ΔW
    model[0]._parameters["weight"] = in_shares
    assert model[0].weight is in_shares
    assert is_in_shares(in_shares) and torch.equal(own_share(in_shares), weight)


SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(num_hidden_layers=1, **SIZES)).eval()


def test_an_original_adapter_is_attached_to_the_loaded_module():
    old = holding(pairs={"vit.encoder.layer.0.attention.attention.query": filled(2, 8, 8)})
    new = holding(pairs={"vit.layers.0.attention.q_proj": filled(2, 8, 8)})
    images, outputs = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), []
    for adapter in (old, new):
        module = vit()
        (found,) = layers.respelled_for(module, [adapter])
        layers.attach(module, plan.make([found], layers.specs(module)))
        outputs.append(module(images).logits)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
    assert not torch.allclose(outputs[0], vit()(images).logits, atol=1e-3)


def test_an_adapter_with_the_modules_names_stays_as_it_is():
    new = holding(pairs={"vit.layers.0.attention.q_proj": filled(2, 8, 8)})
    assert layers.respelled_for(vit(), [new]) == [new]
    assert layers.respelled_for(nn.Linear(2, 2), [new]) == [new]
    assert layers.respelled_for(vit(), []) == []


def test_a_layer_of_the_original_names_without_tensors_is_missing():
    old = holding(pairs={"vit.encoder.layer.0.attention.attention.query": filled(2, 8, 8)}, targets=("query",))
    module = ViTForImageClassification(ViTConfig(num_hidden_layers=2, **SIZES))
    with pytest.raises(MatchError, match=r"vit\.layers\.1\.attention\.q_proj: targeted"):
        layers.respelled_for(module, [old])


def test_dtypes_are_known_under_the_names_of_the_module():
    stored = {"vit.encoder.layer.0.attention.attention.query.weight": "bfloat16", "classifier.weight": "float32"}
    found = layers.with_loaded_names(vit(), stored)
    assert found == {**stored, "vit.layers.0.attention.q_proj.weight": "bfloat16"}
    assert layers.with_loaded_names(nn.Linear(2, 2), stored) == stored


def test_a_stack_has_the_dtype_that_all_its_experts_have():
    model = experts.tiny_model("mixtral")
    names = [f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight" for expert in range(experts.COUNT)]
    stack = "model.layers.0.mlp.experts.down_proj"
    assert layers.with_loaded_names(model, dict.fromkeys(names, "bfloat16"))[stack] == "bfloat16"
    assert stack not in layers.with_loaded_names(model, {**dict.fromkeys(names, "bfloat16"), names[1]: "float32"})
