"""PyTorch as the measure: rounded weights, half precision, token rows, and padding."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from defects import subjects
from lora_export.errors import InputRefused
from lora_export.layers.module_tensors import dtype_name
from lora_export.lora import Adapter, LoraPair, TokenRows
from lora_export.models import model
from lora_export.models.load import load_model
from lora_export.runtime import torch_runners
from lora_export.runtime.runner import Arrays
from lora_export.verification import parity
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.inputs import model_inputs
from lora_export.verification.proof import Proof, prove
from support import FACTORIES
from support.proofs import an_adapter, bf16_merge, folded

pytestmark = pytest.mark.usefixtures("undiagnosed")


@pytest.fixture
def scaled() -> model.Model:
    return load_model(f"{FACTORIES}:scaled")


def test_proof_leaves_the_model_unchanged(scaled: model.Model) -> None:
    """It is in fp64 during the proof, also where the candidate runs the same module."""
    before = {name: value.clone() for name, value in scaled.module.state_dict().items()}
    parameters = list(scaled.module.parameters())
    assert prove(torch_runners.ModuleRunner(scaled.module), PyTorchReferences(scaled)).verdict.same
    after = scaled.module.state_dict()
    assert all(torch.equal(before[name], after[name]) and after[name].dtype is torch.float32 for name in before)
    assert all(one is other for one, other in zip(parameters, scaled.module.parameters(), strict=True))


def test_size_that_the_candidate_fixes_is_undecided_unless_stated(scaled: model.Model) -> None:
    """At one size a part of a model may do nothing: a candidate must not choose how it is tested."""
    made_for_one_length = folded(scaled, an_adapter())
    made_for_one_length.axes = {"rows": (None, 5, 8), "weights": (None, 5)}
    (name,) = {axes[1] for axes in scaled.axes.values()}
    undecided = prove(made_for_one_length, PyTorchReferences(scaled, [an_adapter()], fixed={})).verdict
    assert undecided.outcome is parity.Outcome.UNDECIDED
    assert f"the candidate takes one size of {name}, 5, and the model takes any" in str(undecided)
    for fixed in ({name: 5}, None):
        result = prove(made_for_one_length, PyTorchReferences(scaled, [an_adapter()], fixed=fixed))
        assert result.verdict.same
        assert {shape["rows"][1] for shape in result.about["inputs"].values()} == {5}
        assert any("no other was tried" in note for note in result.verdict.notes)


def test_batch_that_the_candidate_fixes_is_stated(scaled: model.Model) -> None:
    candidate = folded(scaled, an_adapter())

    def proof(size: int) -> Proof:
        fixed = {"batch": size}
        return prove(
            candidate, PyTorchReferences(model_inputs.in_stated_batch(scaled, fixed), [an_adapter()], fixed=fixed)
        )

    candidate.axes = {"rows": (1, None, 8), "weights": (1, None)}
    right, other = proof(1), proof(2).verdict
    assert right.verdict.same and "the candidate was made for one size of batch, 1" in str(right.verdict)
    assert [shape["rows"][0] for shape in right.about["inputs"].values()] == [1] * 3
    assert other.outcome is parity.Outcome.UNDECIDED and "the candidate takes one size of batch, 1" in str(other)
    candidate.axes = {"rows": (1, 5, 8), "weights": (1, 5)}
    labels = list(proof(1).about["inputs"])
    assert len(labels) == 3 and labels[2] == f"{labels[0]}, draw 3"
    candidate.axes = {"rows": (None, None, 8), "weights": (None, None)}
    with pytest.raises(InputRefused, match='fixed="batch": the candidate takes any size of it'):
        proof(1)


def test_axis_that_is_not_fixed_cannot_be_stated(scaled: model.Model) -> None:
    candidate = folded(scaled, an_adapter())
    with pytest.raises(InputRefused, match=r'fixed="sequence": the model has no axis of this name\. It has batch, '):
        prove(candidate, PyTorchReferences(scaled, [an_adapter()], fixed={"sequence": 5}))
    candidate.axes = {"rows": (None, None, 8), "weights": (None, None)}
    (name,) = {axes[1] for axes in scaled.axes.values()}
    with pytest.raises(InputRefused, match="the candidate takes any size of it"):
        prove(candidate, PyTorchReferences(scaled, [an_adapter()], fixed={name: 5}))


@pytest.mark.parametrize(
    ("dtype", "outcome"),
    [(torch.float16, parity.Outcome.SAME), (torch.bfloat16, parity.Outcome.UNDECIDED)],  # too coarse for a tenth more
)
def test_half_precision_model_has_fp64_reference_and_own_peer(
    scaled: model.Model, dtype: torch.dtype, outcome: parity.Outcome
) -> None:
    scaled.module.to(dtype)
    adapter = an_adapter()
    result = prove(folded(scaled, adapter), PyTorchReferences(scaled, [adapter]))
    assert result.verdict.outcome is outcome, str(result.verdict)
    assert "the reference ran in fp64 throughout" in result.verdict.notes
    weight, bias = (value.detach().double().numpy() for value in scaled.module.dense.parameters())
    pair = adapter.pairs["dense"]
    weight = weight + pair.b.astype(np.float64) @ pair.a.astype(np.float64)
    for case in result.cases:
        rows, weights = (result.inputs[case.name][name].astype(np.float64) for name in ("rows", "weights"))
        expected = np.tanh(rows @ weight.T + bias) * weights[..., None]
        np.testing.assert_allclose(case.reference["output_0"], expected, rtol=1e-12, atol=1e-12)
        own = case.deployed["output_0"]
        assert str(own.dtype) == dtype_name(dtype)
        assert 1e-4 < np.abs(own.astype(np.float64) - expected).max() < 0.2  # coarse, as it is deployed
    assert not prove(folded(scaled, adapter, strength=1.1), PyTorchReferences(scaled, [adapter])).verdict.same
    assert all(value.dtype is dtype for value in scaled.module.parameters())


def test_bf16_merge_of_a_bf16_model_is_same(scaled: model.Model) -> None:
    scaled.module.bfloat16()
    stored = {"dense.weight": "bfloat16", "dense.bias": "bfloat16"}
    merged = torch_runners.ModuleRunner(folded(scaled, an_adapter()).module, stored_dtypes=stored)
    result = prove(merged, PyTorchReferences(scaled, [an_adapter()]))
    assert result.verdict.same, str(result.verdict)
    assert all(comparison.figures.merge_loss > 1e-4 for comparison in result.verdict.comparisons)
    for case in result.cases:
        assert str(case.deployed["output_0"].dtype) == "bfloat16" and case.reference["output_0"].dtype == np.float64


def test_bf16_merge_is_same_as_the_rounded_sum(scaled: model.Model) -> None:
    with torch.no_grad():
        scaled.module.dense.weight.copy_(scaled.module.dense.weight.bfloat16())
    result = prove(bf16_merge(scaled, an_adapter()), PyTorchReferences(scaled, [an_adapter()]))
    assert result.verdict.same, str(result.verdict)
    losses = [comparison.figures.merge_loss for comparison in result.verdict.comparisons]
    assert all(1e-4 < loss < 1e-2 for loss in losses)  # reported, and not judged


def test_bf16_merge_with_a_wrong_scale_is_different(scaled: model.Model) -> None:
    wrong = bf16_merge(scaled, an_adapter(), strength=1.1)
    assert prove(wrong, PyTorchReferences(scaled, [an_adapter()])).verdict.outcome is parity.Outcome.DIFFERENT


def test_model_converted_to_bf16_is_same(scaled: model.Model) -> None:
    module = folded(scaled, an_adapter()).module
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())  # the bias too, which no adapter changes
    candidate = torch_runners.ModuleRunner(module, stored_dtypes={"dense.weight": "bfloat16", "dense.bias": "bfloat16"})
    assert not torch.equal(module.dense.bias, scaled.module.dense.bias)
    assert prove(candidate, PyTorchReferences(scaled, [an_adapter()])).verdict.same


def test_adapter_below_bf16_rounding_is_undecided(scaled: model.Model) -> None:
    """The file is what such a merge should be, and next to nothing of the adapter is left in it."""
    weak = an_adapter(2e-5)
    result = prove(bf16_merge(scaled, weak), PyTorchReferences(scaled, [weak]))
    assert result.verdict.outcome is parity.Outcome.UNDECIDED, str(result.verdict)
    assert {reason.gate for reason in result.verdict.reasons} <= {"loss", "effect", "adapter_off", "scale_1.1"}
    unrounded = prove(folded(scaled, weak), PyTorchReferences(scaled, [weak]))
    assert unrounded.verdict.same, str(unrounded.verdict)


def test_base_of_a_rounded_candidate_is_rounded_too(scaled: model.Model) -> None:
    """Otherwise the rounding of the base would count as the adapter's effect."""
    adapter = an_adapter()
    result = prove(bf16_merge(scaled, adapter), PyTorchReferences(scaled, [adapter]))
    module = copy.deepcopy(scaled.module)
    with torch.no_grad():
        module.dense.weight.copy_(module.dense.weight.bfloat16())
    base = torch_runners.Fp64Runner(module.double())
    for case in result.cases:
        expected = base.run(result.inputs[case.name])
        assert all(np.array_equal(case.base[name], value) for name, value in expected.items())
        assert not np.array_equal(case.base["output_0"], case.reference["output_0"])


@pytest.fixture(scope="module")
def llama() -> model.Model:
    return subjects.loaded("llama")


def with_rows(base: model.Model, *tokens: int, pairs: bool = True) -> Adapter:
    """An adapter that also has the embeddings of some tokens."""
    table = base.module.model.embed_tokens.weight.detach().numpy()
    rows = TokenRows(np.array(tokens), table[list(tokens)] + 0.5)
    some = subjects.adapter("llama", "linear").pairs if pairs else {}
    return Adapter(name="rows", format="test", pairs=some, token_rows={"model.embed_tokens.weight": rows}, sha256="00")


@pytest.mark.parametrize("pairs", [True, False])
def test_token_rows_of_an_adapter_are_in_the_inputs(llama: model.Model, pairs: bool) -> None:
    adapter = with_rows(llama, 3, 57, pairs=pairs)
    assert prove(folded(llama, adapter), PyTorchReferences(llama, [adapter])).verdict.same
    for number, arrays in enumerate(
        model_inputs.case_inputs(llama, folded(llama, adapter), adapters=[adapter]).values()
    ):
        plain = list(model_inputs.case_inputs(llama, folded(llama, adapter)).values())[number]
        assert {3, 57} <= set(arrays["input_ids"].flatten()) or arrays["input_ids"].size < 4
        assert (arrays["input_ids"] == plain["input_ids"]).sum() >= arrays["input_ids"].size // 2
    lost = dataclasses.replace(adapter, token_rows={})
    candidate = folded(llama, lost) if pairs else torch_runners.ModuleRunner(llama.module)
    assert prove(candidate, PyTorchReferences(llama, [adapter])).verdict.outcome is parity.Outcome.DIFFERENT


def test_token_rows_that_no_input_reads_are_undecided() -> None:
    """The example inputs of the user's module do not contain the tokens."""
    base = load_model(f"{FACTORIES}:worded")
    pair = LoraPair(a=np.ones((1, 4)), b=np.ones((4, 1)), scale=0.5)
    rows = {"words.weight": TokenRows(np.array([8, 9]), np.ones((2, 4), np.float32))}
    adapter = Adapter(name="a", format="test", pairs={"dense": pair}, token_rows=rows, sha256="0a")
    result = prove(folded(base, dataclasses.replace(adapter, token_rows={})), PyTorchReferences(base, [adapter]))
    assert result.verdict.outcome is parity.Outcome.UNDECIDED
    assert any("words.weight: none of the 2 rows" in reason.text for reason in result.verdict.reasons)


def test_input_that_never_varies_is_undecided_until_the_user_varies_it(tmp_path: Path) -> None:
    base = load_model(f"{FACTORIES}:worded")
    pair = LoraPair(a=np.ones((1, 4)), b=np.ones((4, 1)), scale=0.5)
    adapter = Adapter(name="a", format="test", pairs={"dense": pair}, sha256="0a")
    right = folded(base, adapter)

    class Unmasked(torch_runners.ModuleRunner):
        def run(self, inputs: Arrays) -> Arrays:
            return super().run({**inputs, "mask": np.ones_like(inputs["mask"])})

    for candidate in (right, Unmasked(right.module)):
        verdict = prove(candidate, PyTorchReferences(base, [adapter])).verdict
        assert verdict.outcome is parity.Outcome.UNDECIDED
        assert "the input mask is the same in every draw" in str(verdict)
    np.savez(tmp_path / "own.npz", ids=np.array([[1, 2, 3, 4]]), mask=np.array([[1, 1, 0, 0]]))
    references = PyTorchReferences(base, [adapter], user_inputs=tmp_path / "own.npz")
    assert prove(right, references).verdict.same
    wrong = prove(Unmasked(right.module), references).verdict
    assert wrong.outcome is parity.Outcome.DIFFERENT and "changing the input mask" in str(wrong)


def test_outputs_before_a_rows_first_token_are_not_judged(llama: model.Model) -> None:
    adapter = subjects.adapter("llama", "linear")
    right = folded(llama, adapter)

    class OtherPadding(torch_runners.ModuleRunner):
        """As a decoder with a cache: other outputs where a position attends to nothing."""

        where = staticmethod(lambda mask: np.cumsum(mask, 1) == 0)

        def run(self, inputs: Arrays) -> Arrays:
            logits = super().run(inputs)["logits"].copy()
            logits[self.where(inputs["attention_mask"])] += 1.0
            return {"logits": logits}

    result = prove(OtherPadding(right.module), PyTorchReferences(llama, [adapter]))
    assert result.verdict.same
    assert any("before a row's first token" in note for note in result.verdict.notes)
    OtherPadding.where = staticmethod(lambda mask: np.cumsum(mask, 1) == 1)  # the first token itself
    wrong = prove(OtherPadding(right.module), PyTorchReferences(llama, [adapter]))
    assert wrong.verdict.outcome is parity.Outcome.DIFFERENT


class LeavingOut(nn.Module):
    """A module of the user, whose `attention_mask` is True where a token is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 8)
        self.dense = nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.dense(self.words(ids)) * (~attention_mask)[..., None]
        return {"logits": hidden + hidden.mean(1, keepdim=True)}


def test_every_position_of_a_users_own_module_is_judged() -> None:
    """Its mask may mean the opposite of Hugging Face's: then every real token is "before the first token"."""

    def make(sizes: model.Sizes, generator: torch.Generator) -> model.Inputs:
        shape = (sizes["batch"], 12)
        left_out = torch.arange(12) >= torch.randint(6, 12, (shape[0], 1), generator=generator)
        return {"ids": torch.randint(50, shape, generator=generator), "attention_mask": left_out}

    torch.manual_seed(0)
    axes = {"ids": {0: "batch"}, "attention_mask": {0: "batch"}}
    base = model.Model("words", LeavingOut().eval(), axes, make_inputs=make, traced_sizes={"batch": 2})

    class Invented(torch_runners.ModuleRunner):
        def run(self, inputs: Arrays) -> Arrays:
            real = ~inputs["attention_mask"][..., None]
            made = np.sin(inputs["ids"]).astype(np.float32)[..., None]
            return {"logits": np.where(real, made, super().run(inputs)["logits"])}

    right = folded(base, an_adapter())
    references = PyTorchReferences(base, [an_adapter()])
    assert prove(right, references).verdict.same
    assert prove(Invented(right.module), references).verdict.outcome is parity.Outcome.DIFFERENT


@pytest.mark.parametrize(("own", "outcome"), [(1e-4, parity.Outcome.SAME), (0.03, parity.Outcome.UNDECIDED)])
def test_error_of_pytorch_that_rounding_does_not_explain_allows_nothing(
    scaled: model.Model, monkeypatch: pytest.MonkeyPatch, own: float, outcome: parity.Outcome
) -> None:
    """PyTorch as deployed is off by a few per cent, as beside a reference of another model."""
    right = folded(scaled, an_adapter())
    run = torch_runners.ModuleRunner.run

    def off(runner: torch_runners.ModuleRunner, inputs: Arrays) -> Arrays:
        if runner is right:
            return run(runner, inputs)
        return {name: value * (1 + own) for name, value in run(runner, inputs).items()}

    monkeypatch.setattr(torch_runners.ModuleRunner, "run", off)
    verdict = prove(right, PyTorchReferences(scaled, [an_adapter()])).verdict
    assert verdict.outcome is outcome, str(verdict)
    if outcome is parity.Outcome.UNDECIDED:
        assert "PyTorch's own error is" in str(verdict) and "rounding in float32 explains at most" in str(verdict)


def test_adapter_of_replaced_tensors_alone_has_controls(scaled: model.Model) -> None:
    weight = scaled.module.dense.weight.detach().numpy() + np.float32(0.2)
    adapter = Adapter(name="a", format="test", pairs={}, replaced={"dense.weight": weight}, sha256="0a")
    result = prove(folded(scaled, adapter), PyTorchReferences(scaled, [adapter]))
    assert result.verdict.same, str(result.verdict)
    controls = [control for comparison in result.verdict.comparisons for control in comparison.figures.controls]
    assert {control.name for control in controls} == {"adapter_off", "scale_1.1"}
    assert all(control.detected for control in controls)
    tenth = dataclasses.replace(adapter, replaced={"dense.weight": weight + np.float32(0.02)})
    wrong = prove(folded(scaled, tenth), PyTorchReferences(scaled, [adapter]))
    assert wrong.verdict.outcome is parity.Outcome.DIFFERENT
