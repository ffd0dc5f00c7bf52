"""Rules for the next token. transformers' own processors are the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from lora_export.runtime.generation.token_rules import NO_RULES, TokenRules

TEXTS = [[1, 2, 3, 1, 2], [4, 4, 4, 5, 6]]  # given: 3 tokens; new: 2
LOGITS = np.random.default_rng(0).standard_normal((2, 9)).astype(np.float32)


def right(processor: hf.LogitsProcessor, texts: list[list[int]] | None = None) -> np.ndarray:
    return processor(torch.tensor(TEXTS if texts is None else texts), torch.tensor(LOGITS)).numpy()


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
    found = rules.apply(LOGITS, TEXTS, 2, is_last=False)
    np.testing.assert_array_equal(found, right(processor))
    longest = isinstance(processor, hf.NoRepeatNGramLogitsProcessor) and rules.no_repeat_ngram_size == 9
    assert longest == np.array_equal(found, LOGITS)


def test_first_and_last_tokens_are_forced() -> None:
    rules = TokenRules(forced_bos=5, forced_eos=8)
    first = rules.apply(LOGITS, [[1], [2]], 0, is_last=False)
    np.testing.assert_array_equal(first, right(hf.ForcedBOSTokenLogitsProcessor(5), [[1], [2]]))
    given = [[1, 2], [3, 4]]  # behind several given tokens, none is forced
    np.testing.assert_array_equal(rules.apply(LOGITS, given, 0, is_last=False), LOGITS)
    np.testing.assert_array_equal(LOGITS, right(hf.ForcedBOSTokenLogitsProcessor(5), given))
    last = rules.apply(LOGITS, TEXTS, 4, is_last=True)
    np.testing.assert_array_equal(last, right(hf.ForcedEOSTokenLogitsProcessor(6, 8, device="cpu")))
    np.testing.assert_array_equal(rules.apply(LOGITS, TEXTS, 2, is_last=False), LOGITS)


def test_tokens_are_suppressed_at_the_begin() -> None:
    rules = TokenRules(begin_suppress=(1, 3))
    first = rules.apply(LOGITS, TEXTS, 0, is_last=False)
    assert np.isneginf(first).sum() == 4
    assert np.isneginf(first[:, [1, 3]]).all()
    np.testing.assert_array_equal(rules.apply(LOGITS, TEXTS, 1, is_last=False), LOGITS)
    behind = TokenRules(begin_suppress=(1, 3), forced_bos=5)
    forced = [[2, 5], [2, 5]]
    assert np.isneginf(behind.apply(LOGITS, forced, 1, is_last=False)[:, [1, 3]]).all(), "after the forced one"
    np.testing.assert_array_equal(behind.apply(LOGITS, TEXTS, 0, is_last=False), first)


def test_tokens_that_the_model_lacks_are_ignored() -> None:
    np.testing.assert_array_equal(TokenRules(suppress=(50256,)).apply(LOGITS, TEXTS, 0, is_last=False), LOGITS)


def test_logits_that_are_given_stay_as_they_are() -> None:
    before = LOGITS.copy()
    TokenRules(repetition_penalty=2.0, suppress=(0,)).apply(LOGITS, TEXTS, 0, is_last=False)
    np.testing.assert_array_equal(LOGITS, before)
    assert TokenRules() == NO_RULES
