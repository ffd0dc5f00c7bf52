"""What a spelling finds: layers that are missing, and tensors that are made of several of the adapter's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lora_export import plan, sums
from lora_export.errors import MatchError
from lora_export.formats import lora_changes
from lora_export.lora import LoraPair
from lora_export.names.loaded_names import Conversion
from lora_export.pairs import open_shape
from support.plans import holding
from support.spellings import MIXTRAL, NEW, OLD, VIT, base, experts, numbered


@pytest.mark.parametrize(("own", "stored"), [(NEW, OLD), (OLD, NEW)])
@pytest.mark.parametrize("parts", [1, 99], ids=["last-part", "whole-name"])
def test_a_targeted_layer_without_tensors_is_missing(own, stored, parts):
    targets = {".".join(name.split(".")[-parts:]) for name in own}
    short = holding(pairs=numbered(own[:-1]), targets=tuple(targets))
    with pytest.raises(MatchError) as refused:
        plan.make([short], base(stored), rules=VIT)
    assert [misfit.problem for misfit in refused.value.misfits] == [
        "targeted by the adapter's config, but its file has no tensors for it"
    ]


@pytest.mark.parametrize(("own", "stored"), [(NEW, OLD), (OLD, NEW)])
def test_a_target_that_names_one_layer_is_no_target_of_the_others(own, stored):
    some = holding(pairs=numbered(own[1:3]), targets=tuple(own[1:3]))  # v_proj of layer 0, q_proj of layer 1
    assert [step.weight for step in plan.make([some], base(stored), rules=VIT).steps] == [
        f"{name}.weight" for name in stored[1:3]
    ]


@pytest.mark.parametrize("target", ["vit.pooler.dense", "pooler.dense"])
def test_a_target_of_several_parts_is_no_target_by_its_last_part(target):
    targets = (OLD[0], "layer.1.dense", target)
    some = holding(pairs=numbered([OLD[0], "other.layer.1.dense", "vit.pooler.dense"]), targets=targets)
    stored = [NEW[0], "other.layer.0.dense", "other.layer.1.dense", "vit.pooler.dense"]
    made = plan.make([some], base(stored), rules=VIT)
    assert {step.weight.removesuffix(".weight") for step in made.steps} == {*stored} - {"other.layer.0.dense"}


def test_pairs_of_single_experts_are_parts_of_the_stacked_tensor():
    pairs, stacked = experts()
    made = plan.make([holding(pairs=pairs)], stacked, rules=MIXTRAL)
    for spec in stacked:
        expected = np.zeros(spec.shape, np.float32)
        rows = expected.reshape(-1, spec.shape[-1])
        for step in made.by_part[spec.name]:
            rows[step.spec.region.rows] += sums.delta(step)
        for number in range(3):
            own = {
                name: pairs[f"model.layers.0.block_sparse_moe.experts.{number}.{name}"].delta()
                for name in ("w1", "w2", "w3")
            }
            wanted = own["w2"] if "down" in spec.name else np.concatenate([own["w1"], own["w3"]])
            np.testing.assert_array_equal(expected[number], wanted)
    assert "model.layers.0.mlp.experts.gate_up_proj[1, 2:4]" in made.by_weight


def test_a_stack_is_assembled_once_for_all_of_its_experts(monkeypatch):
    assembled, calls = Conversion.assembled, []
    monkeypatch.setattr(Conversion, "assembled", lambda self, *shapes: calls.append(self) or assembled(self, *shapes))
    pairs, stacked = experts()
    assert plan.make([holding(pairs=pairs)], stacked, rules=MIXTRAL).steps
    assert len(calls) == len(set(calls))


def test_pairs_of_more_experts_than_the_stack_has_are_refused():
    pairs, _ = experts(4)
    _, stacked = experts(3)
    with pytest.raises(MatchError, match="of tensors that the adapter lacks in part"):
        plan.make([holding(pairs=pairs)], stacked, rules=MIXTRAL)


def flux_specs(**shapes: tuple[int, ...]) -> list[plan.TensorSpec]:
    return [plan.TensorSpec(f"{name}.weight", shape, "float32", plan.Layout.OUT_IN) for name, shape in shapes.items()]


QKV = {f"transformer_blocks.0.attn.to_{part}": (4, 3) for part in "qkv"}


def test_a_fused_pair_is_split_into_the_modules_of_diffusers():
    pair = LoraPair(a=np.eye(2, 3), b=np.arange(24.0).reshape(12, 2), scale=0.5)
    made = plan.make([holding(pairs={"double_blocks.0.img_attn.qkv": pair})], flux_specs(**QKV))
    assert made.spellings == ("other layout",)
    assert np.array_equal(np.concatenate([sums.delta(made.by_weight[f"{name}.weight"]) for name in QKV]), pair.delta())
    assert "it has the names of Flux in the original model, the base has those of diffusers; matched." in made.notes[0]


def test_a_pair_of_diffusers_is_a_part_of_the_fused_weight():
    pair = LoraPair(a=np.eye(2, 3), b=np.arange(8.0).reshape(4, 2), scale=0.5)
    specs = flux_specs(**{"model.diffusion_model.double_blocks.0.img_attn.qkv": (12, 3)})
    made = plan.make([holding(pairs={"transformer_blocks.0.attn.to_k": pair})], specs)
    (step,) = made.steps
    assert step.weight == "model.diffusion_model.double_blocks.0.img_attn.qkv.weight[4:8]"
    assert np.array_equal(sums.delta(step), pair.delta())


def test_a_change_of_another_size_is_refused_by_name():
    pair = LoraPair(a=np.ones((2, 3)), b=np.ones((9, 2)), scale=1)
    with pytest.raises(
        MatchError, match=r"the layout of Flux in diffusers converts .*qkv.weight: it makes a tensor of .12"
    ):
        plan.make([holding(pairs={"double_blocks.0.img_attn.qkv": pair})], flux_specs(**QKV))


@pytest.mark.parametrize("kind", ["pairs", "replaced", "biases"])
def test_a_change_of_both_layouts_in_one_adapter_is_refused(kind):
    names = {"double_blocks.0.img_attn.qkv": 12, "transformer_blocks.0.attn.to_q": 4}
    changes = {
        "pairs": {name: LoraPair(a=np.ones((2, 3)), b=np.ones((rows, 2)), scale=1) for name, rows in names.items()},
        "replaced": {f"{name}.weight": np.ones((rows, 3), np.float32) for name, rows in names.items()},
        "biases": {name: np.ones(rows, np.float32) for name, rows in names.items()},
    }
    specs = [*flux_specs(**QKV), *(plan.TensorSpec(f"{name}.bias", (4,), "float32") for name in QKV)]
    with pytest.raises(MatchError, match=r"img_attn.qkv.* changes .*to_q.* too: one may repeat the other"):
        plan.make([holding(**{kind: changes[kind]})], specs)


def scales_of(count: int, *, of_inputs: bool) -> LoraPair:
    return lora_changes.input_or_output_scales(np.arange(count, dtype=np.float32), np.array(of_inputs))


FLAT = LoraPair(a=np.arange(8.0).reshape(1, 8) + 1, b=np.ones((6, 1)), scale=1)
POINT = LoraPair(a=np.arange(3.0).reshape(1, 3, 1, 1) + 1, b=np.ones((12, 1, 1, 1)), scale=1)
# What a file has for a module of the original model: the weights of diffusers that it belongs to, with their shapes.
OF_THE_ORIGINAL = {
    "a kernel among the inputs": (
        "blocks.0.mlp.depth_conv.conv",
        FLAT,
        {"transformer_blocks.0.ff.conv_depth": (6, 2, 2, 2)},
    ),
    "a kernel of 1 for a linear layer": ("double_blocks.0.img_attn.qkv", POINT, QKV),
    "scales of outputs": ("double_blocks.0.img_attn.qkv", scales_of(12, of_inputs=False), QKV),
    "scales of inputs": ("double_blocks.0.img_attn.qkv", scales_of(3, of_inputs=True), QKV),
}


@pytest.mark.parametrize("name", OF_THE_ORIGINAL)
def test_a_file_without_all_of_a_shape_fits_the_other_layout(name):
    module, pair, stored = OF_THE_ORIGINAL[name]
    made = plan.make([holding(pairs={module: pair})], flux_specs(**stored))
    whole = (sum(shape[0] for shape in stored.values()), *next(iter(stored.values()))[1:])
    weight = np.arange(float(np.prod(whole)), dtype=np.float32).reshape(whole)
    own = open_shape.laid_on(pair, whole)
    expected = own.change(weight) if own.needs_weight else own.delta()
    found, first = [], 0
    for part, shape in stored.items():
        (term,) = made.by_weight[f"{part}.weight"].terms
        rows = weight[first : first + shape[0]]
        found.append(term.pair.change(rows) if term.pair.needs_weight else term.pair.delta())
        first += shape[0]
    assert expected.any() and np.array_equal(np.concatenate(found), expected)


def test_a_rotation_of_several_modules_is_refused_by_its_key():
    rotation = lora_changes.CHANGE_KINDS[3].make({lora_changes.KeyPart.OFT_BLOCKS: np.eye(12, k=1)[None]}, float)
    with pytest.raises(MatchError, match=r"img_attn.qkv: .*it splits its entries, and it mixes all of them"):
        plan.make([holding(pairs={"double_blocks.0.img_attn.qkv": rotation})], flux_specs(**QKV))


def test_norms_alone_may_have_the_names_of_the_other_layout():
    """LTX-Video's attentions have the same names in both; their norms have not."""
    own = "transformer_blocks.0.attn1"
    pair = LoraPair(a=np.ones((1, 4)), b=np.ones((4, 1)), scale=1)
    specs = [*flux_specs(**{f"{own}.to_q": (4, 4)}), plan.TensorSpec(f"{own}.q_norm.weight", (4,), "float32")]
    adapter = replace(holding(pairs={f"{own}.to_q": pair}), added={f"{own}.norm_q.weight": np.ones(4, np.float32)})
    made = plan.make([adapter], specs)
    assert set(made.by_weight) == {f"{own}.to_q.weight", f"{own}.q_norm.weight"}


def test_a_layer_that_the_base_has_as_a_bare_parameter_is_transposed():
    """A square matrix would fit as it is, too."""
    pair = LoraPair(a=np.arange(4.0)[None], b=np.ones((4, 1)), scale=1)
    specs = [plan.TensorSpec("text_projection", (4, 4), "float32", plan.Layout.UNKNOWN)]
    specs += flux_specs(**{"transformer.resblocks.0.mlp.c_fc": (6, 4)})
    (step,) = plan.make([holding(pairs={"text_projection": pair})], specs).steps
    assert step.spec.stored_name == "text_projection"
    assert np.array_equal(sums.stored_delta(step, slice(0, 4)), pair.delta().T)
