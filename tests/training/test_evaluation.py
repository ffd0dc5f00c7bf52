"""Loss and accuracy on examples, and the loss of a language model in parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from lora_export.errors import InputRefused
from lora_export.options.train import TrainingSettings
from lora_export.training import evaluation as subject
from lora_export.training.batches import ArrayData, Batch
from lora_export.training.evaluation import HeadLoss, evaluate, evaluate_as_trained, head_loss

CPU = torch.device("cpu")


@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradient_are_those_of_pytorch(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "SCORES_AT_ONCE", 11 * 3)
    monkeypatch.setattr(subject, "LEAST_ROWS_AT_ONCE", 3)  # 7 rows in three parts
    torch.manual_seed(0)
    head = nn.Linear(6, 11, bias=bias).requires_grad_(False)
    states, labels = torch.randn(2, 4, 6), torch.tensor([[1, 10, -100, 3], [0, 5, 6, 7]])
    one, other = states.clone().requires_grad_(), states.clone().requires_grad_()
    expected = F.cross_entropy(head(other).flatten(0, 1), labels.flatten(), reduction="sum")
    found = HeadLoss(head).total(one, Batch({}, labels))
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        own, right = HeadLoss(head).measured(states, Batch({}, labels))
    assert torch.equal(own, found) and right == (head(states).argmax(-1) == labels).sum()
    (found / 7).backward()
    (expected / 7).backward()
    torch.testing.assert_close(one.grad, other.grad)
    assert one.grad is not None and one.grad.abs().max() > 0.01
    with pytest.raises(InputRefused, match="there is a label 11, but the model scores 11 classes"):
        HeadLoss(head).total(one, Batch({}, labels + 1))
    with pytest.raises(InputRefused, match=r"scores are \(2, 4, 11\), the labels \(2, 3\)"):
        HeadLoss(head).total(one, Batch({}, labels[:, :3]))


def data_for(labels: torch.Tensor) -> ArrayData:
    return ArrayData({"input_ids": torch.tensor([[1, 2, 3], [3, 2, 1]])}, labels)


SIZES = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8, "num_attention_heads": 2}
WORDS = torch.tensor([[2, 3, -100], [2, 1, -100]])


def test_a_model_that_returns_what_its_head_returns_gets_it() -> None:
    for model in (LlamaForCausalLM(LlamaConfig(**SIZES)), BertForMaskedLM(BertConfig(**SIZES))):
        model.requires_grad_(False)
        found = head_loss(model, data_for(WORDS), CPU, "no")
        assert found is not None and found.head is model.get_output_embeddings()
        ids = torch.tensor([[1, 2, 3]])
        with torch.no_grad():
            scores = model(ids).logits
            with found.hidden_states():
                states = model(ids).logits
            assert states.shape != scores.shape and torch.equal(found.head(states), scores)
            assert torch.equal(model(ids).logits, scores)


def test_models_that_change_their_scores_or_train_their_head_do_not() -> None:
    one_head = {**SIZES, "num_key_value_heads": 2}
    changed = [
        Gemma2ForCausalLM(Gemma2Config(head_dim=4, final_logit_softcapping=5.0, **one_head)),
        GraniteForCausalLM(GraniteConfig(logits_scaling=2.0, **one_head)),
    ]
    for model in changed:
        assert head_loss(model.requires_grad_(False), data_for(WORDS), CPU, "no") is None
    trained = LlamaForCausalLM(LlamaConfig(**SIZES))
    assert head_loss(trained, data_for(WORDS), CPU, "no") is None  # its head has gradients
    assert head_loss(trained.requires_grad_(False), data_for(WORDS.float()), CPU, "no") is None  # values, not words
    assert head_loss(nn.Linear(2, 2), data_for(WORDS), CPU, "no") is None


def test_no_more_scores_are_computed_at_once_than_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "SCORES_AT_ONCE", 1)
    monkeypatch.setattr(subject, "LEAST_ROWS_AT_ONCE", 2)
    model, sizes = LlamaForCausalLM(LlamaConfig(**SIZES)).eval(), []
    data = ArrayData({"input_ids": torch.arange(32).reshape(8, 4) % 11}, torch.arange(32).reshape(8, 4) % 7)
    expected = evaluate(model, data)  # its head has gradients: all scores at once
    model.requires_grad_(False)
    model.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.logits.shape))
    found = evaluate_as_trained(model, data, TrainingSettings(batch_size=6, accumulate=3), "cpu")
    assert set(sizes[1:]) == {(2, 4, 8)}  # hidden states, after the example that shows what the model returns
    assert (found.accuracy, found.count) == (expected.accuracy, 32) and found.loss == pytest.approx(expected.loss)


def test_ignored_labels_do_not_count() -> None:
    module = nn.Identity()
    scores = torch.eye(3)[[0, 1, 2, 0]]
    data = ArrayData({"input": scores}, torch.tensor([0, 1, 0, -100]))
    score = evaluate(module, data, batch_size=3)
    assert (score.accuracy, score.count) == (pytest.approx(2 / 3), 3)
    right, wrong = np.log(2 + np.e) - 1, np.log(2 + np.e)
    assert score.loss == pytest.approx((2 * right + wrong) / 3)
    assert str(score).startswith("accuracy 66.7 %, loss 0.8")
    with pytest.raises(InputRefused, match="no labelled example to evaluate on"):
        evaluate(module, ArrayData({"input": scores}, torch.full((4,), -100)))
