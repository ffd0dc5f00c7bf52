"""The pieces of a text, token by token: together they are the whole, whatever the tokenizer joins."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_export.api.generate import CONTEXT, TextStream

TEXT = "The naïve café costs 5 € 😀😀 in 東京, doesn't it? " * 12


def in_bytes() -> PreTrainedTokenizerFast:
    """Each byte is a token, as in the smallest byte-level BPE: most characters above have several."""
    words = Tokenizer(models.BPE({byte: number for number, byte in enumerate(sorted(ALPHABET))}, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def in_words(decoder: Any, mark: str) -> PreTrainedTokenizerFast:
    """Words and parts of words; a decoder joins them, and writes no space before the first."""
    known = ["[S]", *(f"{mark}w{number}" for number in range(9)), *(f"##p{number}" for number in range(9))]
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="[S]"))
    words.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[S]")


ALPHABET = pre_tokenizers.ByteLevel.alphabet()
MANY = [number * 7 % 19 for number in range(200)]
SPECIAL = [1, 2, *[0] * 3 * CONTEXT, 3, 10, 4]  # special tokens have no text
CASES = {
    "bytes": (in_bytes(), in_bytes()(TEXT).input_ids),
    "bytes, cut in a character": (in_bytes(), in_bytes()(TEXT + "😀").input_ids[:-1]),
    "parts of words": (in_words(decoders.WordPiece(), ""), MANY),
    "spaces as marks": (in_words(decoders.Metaspace(), "▁"), MANY),
    "no decoder": (in_words(None, ""), MANY),
    "special tokens": (in_words(decoders.Metaspace(), "▁"), SPECIAL),
    "special tokens first": (in_words(decoders.WordPiece(), ""), [0] * 3 * CONTEXT + MANY),
}


@pytest.mark.parametrize("case", CASES)
def test_the_pieces_are_the_whole_text(case: str) -> None:
    tokenizer, tokens = CASES[case]
    pieces: list[str] = []
    stream = TextStream(3, tokenizer, lambda number, text: pieces.append(text) if number == 3 else None)
    for count, token in enumerate(tokens, 1):
        stream.add(token)
        so_far = tokenizer.decode(tokens[:count], skip_special_tokens=True)
        assert "".join(pieces) == so_far or so_far.endswith("\ufffd")
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    assert stream.end() == "".join(pieces) == whole != ""


def test_a_long_text_decodes_each_token_a_few_times() -> None:
    tokenizer, decoded = in_bytes(), []

    class Counting:
        def decode(self, tokens: list[int], **options: Any) -> str:
            decoded.append(len(tokens))
            return tokenizer.decode(tokens, **options)

    stream = TextStream(0, Counting(), lambda _, __: None)
    tokens = tokenizer(TEXT * 4).input_ids
    for token in tokens:
        stream.add(token)
    assert len(tokens) > 1000 and max(decoded) <= 2 * CONTEXT + 4 and sum(decoded) <= (2 * CONTEXT + 4) * len(tokens)


def test_without_a_tokenizer_there_is_no_text() -> None:
    stream = TextStream(0, None, lambda _, __: pytest.fail("a piece"))
    stream.add(1)
    assert stream.end() is None
