"""PyTorch as deployed: its dtype, and weights that are rounded."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from lora_export.errors import Undecided
from lora_export.lora import Adapter, LoraPair
from lora_export.models import model, stored_parameter
from lora_export.models.load import load_model
from lora_export.runtime import torch_runners
from lora_export.runtime.runner import Arrays
from lora_export.verification import parity, proof
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.parity import Wide, judging
from lora_export.verification.proof import prove
from lora_export.verification.references.attached_module import AttachedModule, attach_adapters
from lora_export.verification.references.deployed_module import deployed_module, round_activations
from lora_export.verification.references.further_peers import DRAWS_OF_ROUNDING, MERGED_MODULE, MOVED_WEIGHTS
from lora_export.verification.references.half_precision import coarser_dtype
from lora_export.verification.references.quantisation_error import NearestNumbers
from lora_export.verification.references.quantised_weights import DequantisedWeight
from support import FACTORIES
from support.proofs import an_adapter, folded


@pytest.fixture
def scaled() -> model.Model:
    return load_model(f"{FACTORIES}:scaled")


def test_dtype_is_the_coarser_of_candidate_and_model(scaled: model.Model) -> None:
    class NotPyTorch:
        def run(self, inputs: Arrays) -> Arrays:
            return inputs

    half = copy.deepcopy(scaled.module).half()
    assert coarser_dtype(NotPyTorch(), scaled.module) is torch.float32
    assert coarser_dtype(NotPyTorch(), half) is torch.float16
    assert coarser_dtype(torch_runners.ModuleRunner(copy.deepcopy(half).bfloat16()), scaled.module) is torch.bfloat16


def test_weights_rounded_to_a_scheme_are_deployed_in_the_models_dtype(scaled: model.Model) -> None:
    module = attach_adapters(scaled.module.half(), [an_adapter()], None)
    thirds = {"dense.weight": lambda array: np.round(array * 3) / 3}
    deployed = deployed_module(AttachedModule(module, thirds), {}, "cpu")
    assert {value.dtype for value in deployed.parameters()} == {torch.float16}
    steps = deployed.dense.weight.detach().double() * 3
    assert (steps - steps.round()).abs().max() < 1e-2


def test_rounded_weights_of_a_large_module_are_in_memory_once(
    scaled: model.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch in fp32 and the reference share the numbers in bf16; both compute what they do with fp32 weights."""
    inputs = {name: value.numpy() for name, value in scaled.example_inputs().items()}
    module = attach_adapters(scaled.module, [an_adapter()], None)
    rounding = {"dense.weight": "bfloat16"}
    expected = torch_runners.ModuleRunner(deployed_module(AttachedModule(module, rounding), {}, "cpu")).run(inputs)
    monkeypatch.setattr(stored_parameter, "MOST_WIDENED_WEIGHTS", 0)
    monkeypatch.setattr(stored_parameter, "SMALLEST_STREAMED", 0)
    attached = AttachedModule(module, rounding)
    deployed = deployed_module(attached, {}, "cpu")
    assert isinstance(deployed.dense.weight, stored_parameter.StoredParameter)
    assert attached.ready is not None
    assert attached.ready.dense.weight.dtype is torch.bfloat16
    assert deployed.dense.weight.stored().data_ptr() == attached.ready.dense.weight.data_ptr()
    found = torch_runners.ModuleRunner(deployed).run(inputs)
    assert all((found[name] == value).all() for name, value in expected.items())
    again = AttachedModule(module, rounding)
    for runs in (attached, again):
        assert runs.run(["reference"], {"case": inputs})
        assert runs.ready is None


def in_int8(weight: NDArray[np.float32]) -> DequantisedWeight:
    def rounding(_: Wide) -> NearestNumbers:
        raise AssertionError("activations are rounded, not weights")

    return DequantisedWeight("4 bits", weight, 0.0, activation_block=2, rounding=rounding)


@pytest.mark.parametrize("named", [False, True], ids=["by its place", "by its name"])
def test_activations_round_to_127_levels_of_each_block(*, named: bool) -> None:
    module = nn.Module()
    module.layer = nn.Linear(4, 4, bias=False)
    nn.init.eye_(module.layer.weight)
    weight = np.eye(4, dtype=np.float32)
    round_activations(module, {"layer.weight": in_int8(weight)})
    x = torch.tensor([[127.0, 3.4, 0.0, 0.0], [1.0, 0.5, -12.7, 0.34]])
    answer = module.layer(input=x) if named else module.layer(x)
    expected = [[127, 3, 0, 0], [1, 64 / 127, -12.7, 0.3]]
    np.testing.assert_allclose(answer.detach().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["attn.in_proj_weight", "attn.out_proj.weight"])
def test_multihead_attention_in_int8_is_undecided(name: str) -> None:
    module = nn.Module()
    module.attn = nn.MultiheadAttention(4, 2)
    weight = module.get_parameter(name).detach().numpy()
    weights = {name: in_int8(weight)}
    with pytest.raises(Undecided, match=rf"{name} is multiplied in int8, .*an accuracy_level below 4"):
        round_activations(module, weights)
    round_activations(module, {name: dataclasses.replace(weights[name], activation_block=0)})


# --- deployed runs ---


def a_large_adapter(std: float) -> tuple[model.Model, Adapter]:
    """Two wide layers, and an adapter whose change is several times as large as their weights."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 64)).eval()

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.layers(x)
            return output

    def make(sizes: model.Sizes, generator: torch.Generator) -> model.ModelInputs:
        return {"x": torch.randn(sizes["batch"], 64, 256, generator=generator)}

    base = model.Model("layers", Named(), axes={"x": {0: "batch"}}, make_inputs=make, traced_sizes={"batch": 2})
    rng = np.random.default_rng(0)
    pairs = {
        name: LoraPair(a=std * rng.standard_normal((2, 256)), b=std * rng.standard_normal((out, 2)), scale=2.0)
        for name, out in (("layers.0", 256), ("layers.1", 64))
    }
    return base, Adapter(name="a", format="test", pairs=pairs, sha256="0a")


def test_peers_of_a_run_in_fp32_are_its_merge_and_moved_weights() -> None:
    base, adapter = a_large_adapter(0.05)
    references = PyTorchReferences(base, [adapter])
    candidate = folded(base, adapter)
    prepared = references.prepare(candidate, references.inputs(candidate))
    peers = list(prepared.further_peers(lambda _: None, list(prepared.inputs.cases)))
    assert [peer.note for peer in peers] == [MERGED_MODULE, *[MOVED_WEIGHTS] * DRAWS_OF_ROUNDING]
    for name, arrays in prepared.inputs.cases.items():
        own = prepared.deployed.run(arrays)["output_0"]
        outputs = [peer.outputs[name]["output_0"] for peer in peers]
        assert len({output.tobytes() for output in (own, *outputs)}) == len(peers) + 1
        assert max(np.abs(output - own).max() for output in outputs) < 1e-5 * np.abs(own).max()


def test_right_merge_of_a_large_adapter_is_same_beside_a_merged_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = a_large_adapter(1.0)
    # The error of the merge is 1.3 to 3 times that of PyTorch, depending on the processor, and 1 once PyTorch merges.
    with monkeypatch.context() as unmerged:
        unmerged.setattr(proof, "differs_in_precision_alone", lambda _: False)
        comparisons = prove(folded(base, adapter), PyTorchReferences(base, [adapter])).verdict.comparisons
    apart = max(comparison.figures.ratio for comparison in comparisons)
    assert apart > 1.1
    monkeypatch.setattr(judging, "ratio_limit", lambda *_: (1 + apart) / 2)
    result = prove(folded(base, adapter), PyTorchReferences(base, [adapter]))
    assert result.verdict.same and MERGED_MODULE in result.verdict.notes, str(result.verdict)
    assert result.diagnosis is None
    wrong = prove(folded(base, adapter, strength=1.00001), PyTorchReferences(base, [adapter]))
    assert wrong.verdict.outcome is parity.Outcome.DIFFERENT and MERGED_MODULE not in wrong.verdict.notes
    ordinary, usual = a_large_adapter(0.05)
    usual_notes = prove(folded(ordinary, usual), PyTorchReferences(ordinary, [usual])).verdict.notes
    assert MERGED_MODULE not in usual_notes
    monkeypatch.setattr(proof, "differs_in_precision_alone", lambda _: False)
    assert prove(folded(base, adapter), PyTorchReferences(base, [adapter])).verdict.outcome is parity.Outcome.DIFFERENT
