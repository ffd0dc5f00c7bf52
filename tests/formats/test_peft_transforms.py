"""Kinds of PEFT whose change follows from the weight: attached, folded and judged, beside PEFT's own model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.tuners.boft import layer as boft
from safetensors.torch import load_file

import lora_export as le
from lora_export import layers, plan
from lora_export.api.load import load_adapters
from lora_export.errors import InputRefused
from lora_export.lora import LoraPair
from lora_export.pairs.exact_transforms import OF_OUTPUTS, exact_change, independent_axis
from lora_export.storage import block_copy, matrix_on_disk
from lora_export.verification.against_checkpoint import stored_tensor
from support.peft_kinds import CASES, LAYOUT, Case, Layers, Trained, differences, graph_of, trained

# DeLoRA is a pair; "none" of GLoRA changes the bias alone.
TRANSFORMS = ("IA3", "OFT", "HRA", "Hira", "BOFT", "Road", "Deft", "Glora", "Peanut", "OSF", "Frod")
OWN = [name for name in CASES if name.startswith(TRANSFORMS) or name == "Miss: bat"]


def model_of(one: Trained) -> Layers:
    model = Layers()
    model.load_state_dict(load_file(one.base))
    return model.eval()


def plan_of(one: Trained, model: torch.nn.Module, *strengths: float) -> plan.Plan:
    return plan.make(load_adapters([one.adapter]), layers.specs(model), strengths=strengths or None)


def outputs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([each.flatten() for each in model(torch.arange(8).reshape(2, 4))])


@pytest.fixture(scope="module", params=OWN)
def one(request, tmp_path_factory) -> Trained:
    return trained(CASES[request.param], tmp_path_factory.mktemp("trained"))


def test_attached_it_computes_what_peft_computes(one):
    model = model_of(one)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), one.adapter).eval().double()
    model = model.double()
    before, expected = outputs(model), outputs(theirs.base_model.model)
    layers.attach(model, plan_of(one, model))
    scale = (expected - before).abs().max()
    assert (outputs(model) - expected).abs().max() < 1e-6 * scale
    with layers.scale_adapters(model, 0):
        assert torch.equal(outputs(model), before)
    layers.detach(model)
    assert torch.equal(outputs(model), before)


def test_folded_it_is_pefts_merge_times_the_strength(one):
    for strength in (1.0, 0.5):
        model = model_of(one)
        layers.fold(model, plan_of(one, model, strength))
        for name, value in model.state_dict().items():
            before, change = one.before[name], one.merged[name] - one.before[name]
            assert (value - before - strength * change).abs().max() <= 4e-6 * change.abs().max() + 1e-6, name


def pairs_and_weights(one: Trained) -> Iterator[tuple[Any, np.ndarray]]:
    """Each pair of the adapter, and the weight that it changes, (out, in)."""
    (adapter,) = load_adapters([one.adapter])
    for module, stored in adapter.pairs.items():
        weight = one.before[f"{module}.weight"].numpy()
        yield stored, weight.T if module in ("back", "table") else weight


def test_rows_and_the_transpose_give_the_same_change(one):
    for stored, weight in pairs_and_weights(one):
        pair = stored.for_weight(weight.shape)
        whole, (exact, _) = pair.change(weight), exact_change(pair, weight)
        np.testing.assert_allclose(whole, exact, atol=4e-6 * (np.abs(exact).max() + np.abs(weight).max()))
        for each, view in ((pair, weight), (pair.transposed, weight.T)) if weight.ndim == 2 else ((pair, weight),):
            step = each.rows_together or len(view)
            slices = [slice(first, first + step) for first in range(0, len(view), step)]
            found = np.concatenate([each.change(view[rows], rows, strength=-2) for rows in slices])
            expected = -2 * (whole if view is weight else whole.T)
            np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max() + 1e-6)
        flat, axis = weight.reshape(len(weight), -1), independent_axis(pair)
        whole = exact_change(pair, weight)
        for own in (slice(0, 2), slice(2, flat.shape[axis])) if axis is not None else ():
            here = (own,) if axis == OF_OUTPUTS else (slice(None), own)
            for part, value in zip(exact_change(pair, flat[here], own), whole, strict=True):
                np.testing.assert_allclose(part, value.reshape(flat.shape)[here], rtol=1e-12, atol=1e-12)


def test_some_outputs_change_as_in_the_whole_or_are_refused(one):
    for stored, weight in pairs_and_weights(one):
        rows = np.arange(len(weight))[len(weight) // 3 :]
        whole = stored.for_weight(weight.shape).change(weight)
        try:
            pair = stored.part(rows, None).for_weight(weight[rows].shape)
        except InputRefused as error:
            assert "mixes all of them" in str(error)
            assert one.adapter and not np.allclose(whole[rows], 0)
            continue
        np.testing.assert_allclose(pair.change(weight[rows]), whole[rows], atol=1e-5 * np.abs(whole).max())
        np.testing.assert_allclose(exact_change(pair, weight[rows])[0], whole[rows], atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize("name", {name.partition(":")[0]: name for name in reversed(OWN)}.values())
def test_a_merge_in_small_blocks_is_that_of_whole_weights(name, tmp_path, monkeypatch):
    one = trained(CASES[name], tmp_path)
    le.merge(one.base, one.adapter, tmp_path / "whole.safetensors", layout=LAYOUT)
    monkeypatch.setattr(block_copy, "BLOCK", 64)  # bytes: less than two rows
    monkeypatch.setattr(matrix_on_disk, "COLUMNS_BYTES", 64)
    le.merge(one.base, one.adapter, tmp_path / "blocks.safetensors", layout=LAYOUT)
    whole, blocks = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "blocks"))
    for tensor, value in whole.items():
        assert (blocks[tensor] - value).abs().max() <= 2e-6 * value.abs().max(), tensor
    monkeypatch.setattr(stored_tensor, "PIECE_BYTES", 128)
    assert le.verify(tmp_path / "whole.safetensors", base=one.base, adapters=one.adapter, layout=LAYOUT)


@pytest.mark.parametrize(("name", "is_of_weights"), [("HRA: linear", True), ("Road: road_1", False)])
def test_lora_takes_its_change_of_a_base_and_none_of_a_bias(name, is_of_weights, tmp_path):
    one = trained(CASES[name], tmp_path)
    options = {"to": "peft", "as_kind": "lora", "rank": 18}
    with pytest.raises(InputRefused, match="follows from the weight" if is_of_weights else "its bias changes too"):
        le.convert(one.adapter, tmp_path / "lora", **options, **{} if is_of_weights else {"base": one.base})
    if is_of_weights:
        le.convert(one.adapter, tmp_path / "lora", **options, base=one.base, layout=LAYOUT)
        assert all(type(pair) is LoraPair for pair in le.load_adapter(tmp_path / "lora").pairs.values())


@pytest.mark.parametrize("name", ["Deft: qr", "IA3: inputs without biases"])
def test_a_merged_graph_is_proven_against_its_base(tmp_path, name):
    one = trained(CASES[name], tmp_path)
    graph = graph_of(tmp_path / "base.onnx", one, one.changed)
    result = le.export_onnx(graph, tmp_path / "merged.onnx", adapters=one.adapter)
    assert result.proof.verdict


def test_a_plan_counts_the_biases(tmp_path):
    model = Layers()
    text = str(plan_of(trained(CASES["Road: road_2"], tmp_path), model))
    assert text.startswith("2 weights changed, 1 bias changed")
    assert "1 * change by RoAd (adapter)" in text


def test_butterflies_of_boft_are_those_of_peft(tmp_path, monkeypatch):
    """PEFT makes the block-diagonal matrices of several factors by a CUDA kernel. Here PyTorch makes them."""

    def block_diagonal(blocks: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.block_diag(*each) for each in blocks])

    monkeypatch.setattr(boft, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(boft.FastBlockDiag, "apply", block_diagonal)
    options = {"boft_block_size": 2, "boft_n_butterfly_factor": 2}
    one = trained(Case(peft.BOFTConfig, ("up",), options), tmp_path)
    le.merge(one.base, one.adapter, tmp_path / "out.safetensors")
    assert max(differences(one, tmp_path / "out.safetensors").values()) < 3e-6
    assert le.verify(tmp_path / "out.safetensors", base=one.base, adapters=one.adapter)
