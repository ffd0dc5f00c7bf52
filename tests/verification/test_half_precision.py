"""Half precision: a pair that changes less than rounding does is missed by every gate, and is told nevertheless."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
from transformers import LlamaForCausalLM

from lora_export import formats
from lora_export.lora import Adapter
from lora_export.models.load import load_model
from lora_export.models.model import Model
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.parity import Findings, Outcome, Verdict
from lora_export.verification.proof import Proof, prove
from support.peft_models import fill
from support.proofs import attached_copy
from support.tiny_models import tiny_llama

pytestmark = pytest.mark.usefixtures("undiagnosed")

LAYERS = range(1)
PAIRS = [f"model.layers.{number}.self_attn.{name}_proj" for number in LAYERS for name in "qk"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Adapter]:
    """A small Llama in float16, and an adapter on all linear layers that changes its logits by some hundredths."""
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    tiny_llama(**sizes, num_hidden_layers=len(LAYERS)).save_pretrained(folder / "base")
    options = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    adapted = peft.get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), options)
    fill(adapted, "lora_B", std=0.004)
    adapted.save_pretrained(folder / "adapter")
    return load_model(str(folder / "base"), dtype=torch.float16), formats.load(folder / "adapter")


def without(adapter: Adapter, *modules: str) -> Adapter:
    pairs = {name: pair for name, pair in adapter.pairs.items() if name not in modules}
    return Adapter(name="a", format="test", pairs=pairs, sha256="0a")


def proven(model: Model, adapter: Adapter, in_candidate: Adapter) -> Proof:
    """The proof of PyTorch in float16 with another implementation of attention: its rounding is its own."""
    candidate = attached_copy(model, [in_candidate])
    candidate.set_attn_implementation("eager")
    return prove(ModuleRunner(candidate), PyTorchReferences(model, [adapter]))


def judged(model: Model, adapter: Adapter, in_candidate: Adapter) -> Verdict:
    return proven(model, adapter, in_candidate).verdict


def test_right_candidate_is_the_same(llama: tuple[Model, Adapter]) -> None:
    verdict = judged(*llama, llama[1])
    assert verdict.same and not verdict.not_judged


@pytest.mark.parametrize("module", PAIRS)
def test_single_pair_of_query_or_key_that_is_missing_is_named(llama: tuple[Model, Adapter], module: str) -> None:
    verdict = judged(*llama, without(llama[1], module))
    assert verdict.outcome is Outcome.DIFFERENT
    assert any(reason.gate == "pairs" and reason.text.startswith(f"{module}: ") for reason in verdict.reasons) or any(
        reason.gate in ("error", "tail", "features") for reason in verdict.reasons
    )


@pytest.mark.slow
def test_missing_pair_is_diagnosed(llama: tuple[Model, Adapter], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # `undiagnosed`
    diagnosis = proven(*llama, without(llama[1], PAIRS[0])).diagnosis
    assert diagnosis is not None and diagnosis.first == PAIRS[0] and "its adapter is missing" in diagnosis.why


@pytest.mark.slow
def test_queries_and_keys_of_a_layer_that_are_missing_are_different(llama: tuple[Model, Adapter]) -> None:
    for number in LAYERS:
        both = [name for name in PAIRS if f".{number}." in name]
        assert judged(*llama, without(llama[1], *both)).outcome is Outcome.DIFFERENT


def test_gates_alone_miss_most_of_them(llama: tuple[Model, Adapter], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lora_export.verification.prepared_pytorch.PreparedPyTorch.control_pairs", lambda *_: Findings()
    )
    missed = [module for module in PAIRS if judged(*llama, without(llama[1], module)).same]
    assert len(missed) >= len(PAIRS) // 2, "this file would test nothing that the gates do not see"


def test_pair_far_below_rounding_is_listed(llama: tuple[Model, Adapter]) -> None:
    model, adapter = llama
    module = PAIRS[0]
    pair = adapter.pairs[module]
    pairs = {**adapter.pairs, module: type(pair)(pair.a, pair.b * np.float32(1e-3), pair.scale)}
    weak = Adapter(name="a", format="test", pairs=pairs, sha256="0a")
    for in_candidate in (weak, without(weak, module)):
        verdict = judged(model, weak, in_candidate)
        assert verdict.same and f"much smaller than rounding: {module}." in verdict.not_judged[0]
        assert verdict.strictly().outcome is Outcome.UNDECIDED
