"""Examples as batches of tensors."""

from __future__ import annotations

import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.training.batches import array_data, token_data
from lora_export.training.data import Examples
from support.letters import LettersTokenizer


def test_texts_are_padded_to_the_longest_of_their_batch() -> None:
    examples = Examples(np.array([0, 1, 2]), texts=("a", "abc", "abcdefgh"))
    data = token_data(examples, LettersTokenizer(), max_length=7)
    inputs, labels = data.batch([0, 1])
    assert inputs["input_ids"].tolist() == [[1, 0, 0], [1, 2, 3]]
    assert inputs["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert labels.tolist() == [0, 1]
    assert data.batch([2])[0]["input_ids"].tolist() == [[1, 2, 3, 4]]  # the model ends before max_length
    shorter = token_data(examples, LettersTokenizer(), max_length=2)
    assert shorter.batch([2])[0]["input_ids"].tolist() == [[1, 2]]


def test_texts_and_arrays_are_refused_where_the_other_is_needed() -> None:
    texts = Examples(np.array([0]), texts=("a",))
    with pytest.raises(InputRefused, match="the model has no tokenizer"):
        array_data(texts)
    with pytest.raises(InputRefused, match="nothing to tokenise"):
        token_data(Examples(np.array([0]), inputs={"x": np.ones(1)}), LettersTokenizer())
    unpadded = LettersTokenizer()
    unpadded.pad_token = None
    with pytest.raises(InputRefused, match="no padding token"):
        token_data(texts, unpadded)
