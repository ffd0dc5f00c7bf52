"""Texts with the invocation tokens of activated LoRAs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_export.layers.activation import active_tokens
from lora_export.verification.inputs.invocations import with_invocations

LENGTH = 16


def active(arrays: dict[str, np.ndarray], invocation: tuple[int, ...]) -> np.ndarray:
    return active_tokens(torch.from_numpy(arrays["input_ids"]), invocation)[..., 0].numpy()


@pytest.mark.parametrize("invocation", [(7,), (7, 8, 9)])
def test_rows_have_the_tokens_at_places_of_their_own(invocation: tuple[int, ...]) -> None:
    ids = np.zeros((4, LENGTH), np.int64)
    made = with_invocations({"input_ids": ids, "other": ids}, [invocation])
    begins = active(made, invocation).argmax(1).tolist()
    assert len(set(begins)) == 4 and begins[2] == LENGTH - len(invocation)
    assert active(made, invocation).any(1).tolist() == [True, True, True, False]  # the last row is the base's
    first = with_invocations({"input_ids": ids[:, : begins[1] + 1]}, [invocation])
    assert active(first, invocation)[1, : begins[1]].any()  # another one is before the second row's
    assert not ids.any() and made["other"] is ids


def test_padding_has_none() -> None:
    mask = np.tile(np.arange(LENGTH) >= LENGTH // 2, (3, 1)).astype(np.int64)
    made = with_invocations({"input_ids": np.zeros((3, LENGTH), np.int64), "attention_mask": mask}, [(7, 8)])
    assert made["input_ids"].any() and not made["input_ids"][mask == 0].any()


def test_each_of_several_adapters_is_invoked() -> None:
    made = with_invocations({"input_ids": np.zeros((4, LENGTH), np.int64)}, [(7, 8), (5,)])
    assert active(made, (7, 8)).any(1).tolist() == [True, False, True, False]
    assert active(made, (5,)).any(1).tolist() == [False, True, False, True]


def test_short_texts_and_other_inputs_stay() -> None:
    short, other = {"input_ids": np.ones((2, 3), np.int64)}, {"x": np.ones(3)}
    assert np.array_equal(with_invocations(short, [(1, 2, 3, 4)])["input_ids"], short["input_ids"])
    assert with_invocations(other, [(7,)]) is other and with_invocations(short, []) is short
