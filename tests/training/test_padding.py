"""Parts of a batch with less padding: what they cost, that they add up to the batch, and where there are none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lora_export import layers, plan
from lora_export.options.train import TrainingSettings
from lora_export.training import loop, padding
from lora_export.training.batches import ArrayData, Batch, CosineError, CrossEntropy, Loss, OwnLoss, SquaredError
from lora_export.training.evaluation import evaluate
from lora_export.training.padding import TextParts, groups_by_length, parts_with_less_padding, text_lengths_of

LENGTHS = (3, 40, 5, 38, 4, 17)
WIDTH = 40
SIZES = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "num_attention_heads": 2}


def less_padded(batch: Batch, loss: Any, device: str) -> list[Batch]:
    return parts_with_less_padding(batch, loss, device, text_lengths_of(batch))


@pytest.fixture(autouse=True)
def small_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of a few tokens are worth a part of their own."""
    monkeypatch.setitem(padding.PART_COST, "cpu", 4)


def texts(lengths: Sequence[int] = LENGTHS) -> dict[str, Tensor]:
    ids = torch.randint(1, 23, (len(lengths), WIDTH), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(WIDTH) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def groupings(items: list[int]) -> Iterator[list[list[int]]]:
    """All ways to put items into groups."""
    if not items:
        yield []
        return
    first, *others = items
    for rest in groupings(others):
        yield [[first], *rest]
        for number, group in enumerate(rest):
            yield [*rest[:number], [first, *group], *rest[number + 1 :]]


@pytest.mark.parametrize("lengths", [(7, 1, 7, 2, 30, 29), (5, 5, 5), (1, 2, 3, 4, 5, 6), (9,)])
@pytest.mark.parametrize("group_cost", [0, 3, 1000])
def test_no_grouping_costs_less(lengths: Sequence[int], group_cost: float) -> None:
    def cost(groups: list[list[int]]) -> float:
        return sum(len(group) * max(lengths[item] for item in group) + group_cost for group in groups)

    found = groups_by_length(lengths, group_cost)
    assert sorted(item for group in found for item in group) == list(range(len(lengths)))
    assert cost(found) == min(map(cost, groupings(list(range(len(lengths))))))
    longest = [max(lengths[item] for item in group) for group in found]
    assert longest == sorted(longest, reverse=True)
    assert (len(found) == 1) == (group_cost == 1000 or len(set(lengths)) == 1)


def classes() -> Tensor:
    return torch.arange(6) % 3


def by_token() -> Tensor:
    """A label for each token but the first, and for none that is padding."""
    inputs = texts()
    labels = inputs["input_ids"] % 3
    labels[:, 0] = -100
    return labels.masked_fill(inputs["attention_mask"] == 0, -100)


def next_token() -> Tensor:
    inputs = texts()
    following = torch.cat([inputs["input_ids"][:, 1:], torch.full((len(LENGTHS), 1), 0)], 1)
    return following.masked_fill(following == 0, -100)


T5_SIZES = {"vocab_size": 23, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
DECODED = torch.tensor([[1, 2, -100], [3, 4, 5], [6, -100, -100], [7, 8, 9], [10, 11, -100], [12, 13, 14]])
MORE_INPUTS = {"answers": {"decoder_input_ids": DECODED.clamp(min=0)}}

CASES: dict[str, tuple[Callable[[], Any], Callable[[], Tensor], Loss]] = {
    "classes": (lambda: BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)), classes, CrossEntropy()),
    "tags": (lambda: BertForTokenClassification(BertConfig(**SIZES, num_labels=3)), by_token, CrossEntropy()),
    "next token": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), next_token, CrossEntropy()),
    "answers": (lambda: T5ForConditionalGeneration(T5Config(**T5_SIZES)), lambda: DECODED, CrossEntropy()),
    "pairs of texts": (lambda: BertModel(BertConfig(**SIZES)), lambda: torch.tensor([0.1, 0.9, -0.5]), CosineError()),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_parts_add_up_to_the_batch(case: str) -> None:
    torch.manual_seed(0)
    make, labels, loss = CASES[case]
    module = make().eval().double()
    whole = Batch(texts() | MORE_INPUTS.get(case, {}), labels())

    def computed(batches: list[Batch]) -> tuple[Tensor, list[Tensor]]:
        total = sum((loss.total(module(**batch.inputs), batch) for batch in batches), torch.zeros(()))
        parameters = [each for each in module.parameters() if each.requires_grad]
        found = torch.autograd.grad(total, parameters, allow_unused=True)
        return total, [gradient for gradient in found if gradient is not None]

    parts = less_padded(whole, loss, "cpu")
    sizes = [tuple(part.inputs["input_ids"].shape) for part in parts]
    assert len(parts) > 1 and sum(rows for rows, _ in sizes) == 6
    assert sum(rows * width for rows, width in sizes) < 0.85 * 6 * WIDTH
    assert sizes[0][1] == WIDTH and sum(loss.count(part.labels) for part in parts) == loss.count(whole.labels)
    (expected, gradients), (total, found) = computed([whole]), computed(parts)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)  # a loss is summed in fp32
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    for own, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-6 * largest)


def test_rows_of_one_label_stay_together() -> None:
    """The texts of label 1 are as long as the longer of them."""
    parts = less_padded(Batch(texts((3, 40, 5, 3, 4, 17)), torch.arange(3.0)), CosineError(), "cpu")
    found = {tuple(part.labels.tolist()): part.inputs["attention_mask"].sum(1).tolist() for part in parts}
    assert found == {(1,): [40, 4], (2,): [5, 17], (0,): [3, 3]}


def test_labels_of_padding_that_count_are_kept() -> None:
    labels = torch.full((6, WIDTH), -100)
    labels[0, 30] = 1
    parts = less_padded(Batch(texts(), labels), CrossEntropy(), "cpu")
    assert len(parts) > 1 and sum(CrossEntropy().count(part.labels) for part in parts) == 1


WHOLE: dict[str, tuple[dict[str, Any], Loss]] = {
    "no mask": ({"input_ids": texts()["input_ids"]}, CrossEntropy()),
    "padding in front": ({name: value.flip(1) for name, value in texts().items()}, CrossEntropy()),
    "no padding": (texts([WIDTH] * 6), CrossEntropy()),
    "perhaps one value a token": (texts() | {"weights": torch.ones(6, WIDTH)}, CrossEntropy()),
    "no row for each text": (texts() | {"positions": torch.ones(1, 3)}, CrossEntropy()),
    "sounds": ({"input_values": torch.ones(6, WIDTH), "attention_mask": texts()["attention_mask"]}, CrossEntropy()),
    "a loss that is no sum": (texts(), OwnLoss(lambda outputs, labels: outputs.mean())),
}


@pytest.mark.parametrize("case", WHOLE)
def test_other_batches_stay_whole(case: str) -> None:
    inputs, loss = WHOLE[case]
    batch = Batch(inputs, torch.arange(6))
    (only,) = less_padded(batch, loss, "cpu")
    assert only is batch


@pytest.mark.parametrize("shape", [(6, WIDTH), (6, WIDTH, 2)])
def test_values_of_tokens_have_no_parts(shape: tuple[int, ...]) -> None:
    """Nothing in floats says which of them are of padding; perhaps they are classes, as many as tokens."""
    batch = Batch(texts(), torch.rand(shape))
    assert less_padded(batch, SquaredError(), "cpu") == [batch]


def test_the_part_of_most_tokens_is_the_first() -> None:
    """The memory of activations is measured in it."""
    parts = less_padded(Batch(texts((40, 20, 20, 20, 20, 20)), classes()), CrossEntropy(), "cpu")
    assert [part.inputs["input_ids"].shape for part in parts] == [(5, 20), (1, 40)]


WIDE = SIZES | {"max_position_embeddings": 512}
PADDING_COUNTS: dict[str, Callable[[], Any]] = {
    "ConvBERT": lambda: hf.ConvBertForSequenceClassification(hf.ConvBertConfig(**WIDE, embedding_size=16)),
    "XLNet": lambda: hf.XLNetForSequenceClassification(hf.XLNetConfig(vocab_size=23, d_model=16, n_layer=1, n_head=2)),
    "FNet": lambda: hf.FNetForSequenceClassification(hf.FNetConfig(vocab_size=23, hidden_size=16, num_hidden_layers=1)),
    "BigBird": lambda: hf.BigBirdForSequenceClassification(
        hf.BigBirdConfig(**WIDE, block_size=4, num_random_blocks=1, attention_type="block_sparse")
    ),
}


@pytest.mark.parametrize("name", PADDING_COUNTS)
def test_models_that_compute_padding_get_whole_batches(name: str, measured: list[Batch]) -> None:
    torch.manual_seed(0)
    module, batch = PADDING_COUNTS[name]().train(), Batch(texts(), classes())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(5)  # so that attention differs from a mean
    before = repr(module)
    parts = TextParts(module, CrossEntropy(), "cpu")
    assert parts.of(batch) == [batch] and parts.of(batch) == [batch]
    assert len(measured) == 1  # parts that are not used are not made
    assert repr(module) == before and module.training


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """The batches whose lengths were computed."""
    found: list[Batch] = []
    lengths_of = padding.text_lengths_of
    monkeypatch.setattr(padding, "text_lengths_of", lambda batch: found.append(batch) or lengths_of(batch))
    return found


def test_a_model_without_padding_in_a_text_gets_parts(measured: list[Batch]) -> None:
    batch, parts = Batch(texts(), classes()), TextParts(adapted(), CrossEntropy(), "cpu")
    assert len(parts.of(batch)) > 1 and len(parts.of(batch)) > 1
    assert len(measured) == 2


def test_a_model_that_cannot_be_copied_gets_whole_batches() -> None:
    module, batch = adapted(), Batch(texts(), classes())
    module.lock = threading.Lock()
    assert TextParts(module, CrossEntropy(), "cpu").of(batch) == [batch]


def test_another_accelerator_is_taken_as_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(texts(), classes())
    assert less_padded(batch, CrossEntropy(), "mps") == [batch]
    monkeypatch.setitem(padding.PART_COST, "cuda", 4)
    assert len(less_padded(batch, CrossEntropy(), "mps")) > 1


def test_rows_without_a_text_have_one_token() -> None:
    parts = less_padded(Batch(texts((0, 40, 0, 0, 0, 40)), classes()), CrossEntropy(), "cpu")
    assert [tuple(part.inputs["input_ids"].shape) for part in parts] == [(2, 40), (4, 1)]


@pytest.mark.parametrize("refused", [range(10), range(10, 30)])
def test_a_model_that_fails_on_a_shorter_text_gets_whole_batches(refused: range) -> None:
    module, batch = adapted(), Batch(texts(), classes())

    def refuse(_: Any, __: Any, inputs: Any) -> None:
        if inputs["input_ids"].shape[1] in refused:
            raise ValueError("no such length")

    module.register_forward_pre_hook(refuse, with_kwargs=True)
    assert TextParts(module, CrossEntropy(), "cpu").of(batch) == [batch]


def adapted() -> Any:
    torch.manual_seed(0)
    config = BertConfig(**SIZES, num_labels=3, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    module = BertForSequenceClassification(config)
    adapter = layers.create_adapter(module, targets=["query", "value"], rank=2, alpha=4, seed=0)
    layers.attach(module, plan.make([adapter], layers.specs(module), identity_ok=True), trainable=True)
    return module


def test_a_training_and_an_evaluation_compute_less_and_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data, losses, scores, trained, evaluated = ArrayData(texts(), classes()), [], [], [], []
    settings = TrainingSettings(epochs=4, learning_rate=0.02, batch_size=6, seed=0)
    for cost in (4, 1e9):
        monkeypatch.setitem(padding.PART_COST, "cpu", cost)
        module, seen = adapted(), list[int]()
        module.register_forward_pre_hook(
            lambda _, args, inputs, seen=seen: seen.append(inputs["input_ids"].numel()), with_kwargs=True
        )
        losses.append(loop.fit(module, data, settings).losses)
        trained.append(sum(seen))
        scores.append(evaluate(module, data, batch_size=6))
        evaluated.append(sum(seen) - trained[-1])
    assert trained[0] < 0.7 * trained[1] and evaluated[0] < 0.9 * evaluated[1]  # once, two texts are run alone
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][0] != losses[0][-1]
    assert scores[0].loss == pytest.approx(scores[1].loss, rel=1e-5)
    assert scores[0].accuracy == scores[1].accuracy and scores[0].count == 6


@pytest.mark.parametrize("reason", ["compiled", "batch norm"])
def test_where_the_batch_is_what_counts_it_stays_whole(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled forward would be compiled for each width; a trained batch norm computes with the batch's mean."""
    monkeypatch.setattr(loop, "compiled", lambda module: module)
    module, widths = adapted(), list[tuple[int, ...]]()
    if reason == "batch norm":
        module.classifier = torch.nn.Sequential(module.classifier, torch.nn.BatchNorm1d(3))
    module.register_forward_pre_hook(
        lambda _, args, inputs: widths.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    settings = TrainingSettings(epochs=1, learning_rate=0.02, batch_size=6, seed=0, compile=reason == "compiled")
    loop.fit(module, ArrayData(texts(), classes()), settings)
    assert widths[-1] == (6, WIDTH)
