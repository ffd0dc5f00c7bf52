"""The choice of a token: the most probable one, or a seeded draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from lora_export.errors import InputRefused
from lora_export.models.load import load_model
from lora_export.runtime.generation.decoder import Decoder
from lora_export.runtime.generation.loop import (
    NO_RULES,
    Sampling,
    TextLimits,
    TokenRules,
    generate_in_run,
    generate_tokens,
)
from support import FACTORIES
from support.decoders import a_graph

LOGITS = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))


def drawn(sampling: Sampling, count: int, logits: np.ndarray = LOGITS) -> np.ndarray:
    generators = sampling.generators(1)
    return np.array([sampling.choose(logits, generators)[0] for _ in range(count)])


def test_no_temperature_takes_the_most_probable_token_of_each_row() -> None:
    logits = np.array([[1, 3, 2], [5, 0, 9]], np.float32)
    assert Sampling().choose(logits, Sampling().generators(2)).tolist() == [1, 2]


def test_draws_have_the_probabilities_of_the_softmax() -> None:
    tokens = drawn(Sampling(temperature=1.0), 4000)
    shares = np.bincount(tokens, minlength=4) / len(tokens)
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.15, 0.05], atol=0.03)


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-3])
def test_a_tiny_temperature_draws_the_most_probable_token(temperature: float) -> None:
    assert set(drawn(Sampling(temperature), 20)) == {0}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("row", [[np.nan, 1, 2], [np.inf, 1, 2], [-np.inf, -np.inf, -np.inf]])
def test_logits_without_a_largest_number_are_refused(row: list[float], temperature: float) -> None:
    sampling = Sampling(temperature)
    with pytest.raises(InputRefused, match="no token can be chosen"):
        sampling.choose(np.array([[1, 2, 3], row], np.float32), sampling.generators(2))


def test_higher_temperature_evens_the_probabilities_out() -> None:
    tokens = drawn(Sampling(temperature=2.0), 4000)
    expected = np.sqrt([0.5, 0.3, 0.15, 0.05])
    np.testing.assert_allclose(np.bincount(tokens) / len(tokens), expected / expected.sum(), atol=0.03)


@pytest.mark.parametrize(("top_p", "possible"), [(0.5, {0}), (0.51, {0, 1}), (0.8, {0, 1}), (0.94, {0, 1, 2})])
def test_top_p_leaves_out_improbable_tokens(top_p: float, possible: set[int]) -> None:
    assert set(drawn(Sampling(temperature=1.0, top_p=top_p), 500).tolist()) == possible


def test_draws_of_a_row_depend_on_the_seed_and_no_neighbour() -> None:
    logits = np.zeros((1, 50), np.float32)
    one = drawn(Sampling(1.0, seed=3), 20, logits)
    assert one.tolist() == drawn(Sampling(1.0, seed=3), 20, logits).tolist()
    assert one.tolist() != drawn(Sampling(1.0, seed=4), 20, logits).tolist()
    sampling = Sampling(1.0, seed=3)
    generators = sampling.generators(2)
    both = np.array([sampling.choose(np.zeros((2, 50), np.float32), generators) for _ in range(20)])
    assert both[:, 0].tolist() == one.tolist()
    assert both[:, 1].tolist() != one.tolist()


class ChangingRun:
    """Its next token is a sum of those so far, each times 3 where it was computed in a text of more than 6 tokens."""

    def __init__(self) -> None:
        self.sums = np.zeros(2, np.int64)

    def restart(self) -> None:
        self.sums = np.zeros(2, np.int64)

    def step(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        assert mask.shape[1] == positions.max() + 1
        self.sums += ids.sum(1) * (3 if mask.shape[1] > 6 else 1)
        return np.eye(9, dtype=np.float32)[self.sums % 9]


@pytest.mark.parametrize("length", [2, 5, 6, 7])
def test_all_tokens_are_computed_again_beyond_a_length(length: int) -> None:
    prompts = [list(range(1, length + 1)), [2] * length]
    expected = []
    for prompt in prompts:
        text = list(prompt)
        while len(text) < length + 8:
            text.append(sum(text) * (3 if len(text) > 6 else 1) % 9)
        expected.append(text[length:])
    limits = TextLimits((), 8, recomputed_beyond=6)
    assert generate_in_run(ChangingRun(), prompts, limits, Sampling(), lambda *_: None) == expected


TEXTS = [[1, 2, 3, 1, 2], [4, 4, 4, 5, 6]]  # given: 3 tokens; new: 2
SCORES = np.random.default_rng(0).standard_normal((2, 9)).astype(np.float32)


def right(processor: hf.LogitsProcessor, texts: list[list[int]] | None = None) -> np.ndarray:
    return processor(torch.tensor(TEXTS if texts is None else texts), torch.tensor(SCORES)).numpy()


@pytest.mark.parametrize(
    ("rules", "processor"),
    [
        (TokenRules(repetition_penalty=1.3), hf.RepetitionPenaltyLogitsProcessor(1.3)),
        (TokenRules(repetition_penalty=0.7), hf.RepetitionPenaltyLogitsProcessor(0.7)),
        (TokenRules(no_repeat_ngram_size=1), hf.NoRepeatNGramLogitsProcessor(1)),
        (TokenRules(no_repeat_ngram_size=3), hf.NoRepeatNGramLogitsProcessor(3)),
        (TokenRules(no_repeat_ngram_size=9), hf.NoRepeatNGramLogitsProcessor(9)),
        (TokenRules(suppress=(2, 7)), hf.SuppressTokensLogitsProcessor([2, 7])),
    ],
)
def test_rule_is_that_of_transformers(rules: TokenRules, processor: hf.LogitsProcessor) -> None:
    found = rules.apply(SCORES, TEXTS, 2, is_last=False)
    np.testing.assert_array_equal(found, right(processor))
    longest = isinstance(processor, hf.NoRepeatNGramLogitsProcessor) and rules.no_repeat_ngram_size == 9
    assert longest == np.array_equal(found, SCORES)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_rules_are_applied_in_float32_as_in_transformers(dtype: type) -> None:
    logits = np.array([[5.03, 6.55, -1.003, -1.3]]).astype(dtype)
    found = TokenRules(repetition_penalty=1.3).apply(logits, [[1, 2]], 0, is_last=False)
    values = torch.tensor(logits.astype(np.float32))
    expected = hf.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[1, 2]]), values).numpy()
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.float32 and found.argmax() == 1


def test_one_of_several_last_tokens_is_forced() -> None:
    last = TokenRules(forced_eos=(8, 3)).apply(SCORES, TEXTS, 4, is_last=True)
    np.testing.assert_array_equal(last, right(hf.ForcedEOSTokenLogitsProcessor(6, [8, 3], device="cpu")))


def test_a_forced_first_token_does_not_depend_on_the_batch() -> None:
    rules = TokenRules(forced_bos=5, begin_suppress=(1,))
    alone, behind = rules.apply(SCORES, [[1], [2, 3]], 0, is_last=False)
    np.testing.assert_array_equal(alone, right(hf.ForcedBOSTokenLogitsProcessor(5), [[1], [2]])[0])
    assert np.isneginf(behind).nonzero()[0].tolist() == [1]


@pytest.mark.parametrize("rules", [TokenRules(forced_bos=9), TokenRules(forced_eos=(2, 9))])
def test_a_forced_token_that_the_model_lacks_is_refused(rules: TokenRules) -> None:
    with pytest.raises(InputRefused, match="the generation config forces the token 9; the model has 0 to 8"):
        rules.apply(SCORES, [[1], [2]], 0, is_last=True)


def test_first_and_last_tokens_are_forced() -> None:
    rules = TokenRules(forced_bos=5, forced_eos=(8,))
    first = rules.apply(SCORES, [[1], [2]], 0, is_last=False)
    np.testing.assert_array_equal(first, right(hf.ForcedBOSTokenLogitsProcessor(5), [[1], [2]]))
    given = [[1, 2], [3, 4]]  # behind several given tokens, none is forced
    np.testing.assert_array_equal(rules.apply(SCORES, given, 0, is_last=False), SCORES)
    np.testing.assert_array_equal(SCORES, right(hf.ForcedBOSTokenLogitsProcessor(5), given))
    last = rules.apply(SCORES, TEXTS, 4, is_last=True)
    np.testing.assert_array_equal(last, right(hf.ForcedEOSTokenLogitsProcessor(6, 8, device="cpu")))
    np.testing.assert_array_equal(rules.apply(SCORES, TEXTS, 2, is_last=False), SCORES)


def test_tokens_are_suppressed_at_the_begin() -> None:
    rules = TokenRules(begin_suppress=(1, 3))
    first = rules.apply(SCORES, TEXTS, 0, is_last=False)
    assert np.isneginf(first).sum() == 4
    assert np.isneginf(first[:, [1, 3]]).all()
    np.testing.assert_array_equal(rules.apply(SCORES, TEXTS, 1, is_last=False), SCORES)
    behind = TokenRules(begin_suppress=(1, 3), forced_bos=5)
    forced = [[2, 5], [2, 5]]
    assert np.isneginf(behind.apply(SCORES, forced, 1, is_last=False)[:, [1, 3]]).all(), "after the forced one"
    np.testing.assert_array_equal(behind.apply(SCORES, TEXTS, 0, is_last=False), first)


def test_tokens_that_the_model_lacks_are_ignored() -> None:
    np.testing.assert_array_equal(TokenRules(suppress=(50256,)).apply(SCORES, TEXTS, 0, is_last=False), SCORES)


def test_logits_that_are_given_stay_as_they_are() -> None:
    before = SCORES.copy()
    TokenRules(repetition_penalty=2.0, suppress=(0,)).apply(SCORES, TEXTS, 0, is_last=False)
    np.testing.assert_array_equal(SCORES, before)
    assert TokenRules() == NO_RULES


# --- loop ---

PROMPTS = ([1, 2, 3], [4], [5, 6, 7, 8, 9])


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return Decoder(a_graph(tmp_path_factory.mktemp("sums") / "m.onnx", load_model(f"{FACTORIES}:sums")))


def expected(prompt: Sequence[int], count: int) -> list[int]:
    """The most probable token of the sums of all rows so far, again and again."""
    module: Any = load_model(f"{FACTORIES}:sums").module
    table, turned = module.table.weight.detach().numpy(), module.dense.weight.detach().numpy().T
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int((table[tokens].sum(0) @ turned).argmax()))
    return tokens[len(prompt) :]


def generated(decoder: Decoder, prompts: Sequence[Sequence[int]], limits: TextLimits) -> list[list[int]]:
    return generate_tokens(decoder, prompts, limits, Sampling(), lambda _, __: None)


def test_padded_batch_gives_what_each_prompt_gives_alone(decoder: Decoder) -> None:
    found = generated(decoder, PROMPTS, TextLimits((), 12))
    assert found == [expected(prompt, 12) for prompt in PROMPTS]


def test_graph_that_takes_no_padding_runs_in_batches_of_one_length(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "takes_padding", False)
    started: list[int] = []
    start = decoder.start
    monkeypatch.setattr(decoder, "start", lambda batch, *rest: (started.append(batch), start(batch, *rest))[1])
    found = generated(decoder, [*PROMPTS, [1, 1, 1]], TextLimits((), 5))
    assert found == [expected(prompt, 5) for prompt in [*PROMPTS, [1, 1, 1]]]
    assert started == [2, 1, 1]


def test_text_ends_with_its_token_and_the_others_go_on(decoder: Decoder) -> None:
    texts = [expected(prompt, 12) for prompt in PROMPTS]
    end = next(token for token in range(3) if len({text.index(token) for text in texts if token in text}) > 1)
    found = generated(decoder, PROMPTS, TextLimits({end}, 12))
    for text, whole in zip(found, texts, strict=True):
        assert text == (whole[: whole.index(end) + 1] if end in whole else whole)


def test_every_token_is_passed_on_as_it_is_chosen(decoder: Decoder) -> None:
    events: list[tuple[int, int]] = []
    found = generate_tokens(
        decoder, PROMPTS[:2], TextLimits((), 3), Sampling(), lambda row, token: events.append((row, token))
    )
    assert [row for row, _ in events] == [0, 1] * 3
    assert [[token for row, token in events if row == number] for number in range(2)] == found


def test_seeded_draws_do_not_depend_on_the_batch(decoder: Decoder) -> None:
    sampling = Sampling(temperature=1.0, seed=5)
    both = generate_tokens(decoder, PROMPTS[:2], TextLimits((), 20), sampling, lambda _, __: None)
    alone = generate_tokens(decoder, PROMPTS[:1], TextLimits((), 20), sampling, lambda _, __: None)
    assert both[0] == alone[0]
    assert len(np.unique(both[0])) > 1


def test_draws_do_not_depend_on_which_prompts_run_together(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling(temperature=1.0, seed=5)
    together = generate_tokens(decoder, PROMPTS, TextLimits((), 20), sampling, lambda _, __: None)
    monkeypatch.setattr(decoder, "takes_padding", False)
    assert generate_tokens(decoder, PROMPTS, TextLimits((), 20), sampling, lambda _, __: None) == together
