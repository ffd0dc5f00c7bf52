"""Texts of a tokenizer that it reads as the same tokens again: what a server is sent that takes no token ids."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_export.errors import InputRefused
from lora_export.models.processors import open_tokenizer, refusing_failures, render_chat

FEW_TOKENS = 256  # of a vocabulary, of which the first are in every tokenizer
TRIES = 2000  # draws of a token, or of a text
MORE = 8  # tokens that are drawn beyond those needed: the tokenizer joins some


@dataclass(frozen=True, eq=False)
class Texts:
    """The texts of a tokenizer of transformers."""

    tokenizer: Any
    vocabulary: int

    @classmethod
    def of(cls, folder: Path) -> Texts:
        """Those of a model's folder. Raises InputRefused where it has no tokenizer."""
        tokenizer = open_tokenizer(folder, needed=True)
        return cls(tokenizer, len(tokenizer))

    @cached_property
    def begin(self) -> list[int]:
        """The tokens that the tokenizer puts before each text, such as that of its beginning."""
        empty = self.ids("")
        return [token for token in empty[:1] if token == self.tokenizer.bos_token_id]

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, with those that the tokenizer adds at its beginning."""
        with refusing_failures("the tokenizer fails on a text"):
            return list(map(int, self.tokenizer(text, verbose=False)["input_ids"]))

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens, without those that the tokenizer adds."""
        with refusing_failures("the tokenizer fails on its tokens"):
            return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def is_exact(self, ids: Sequence[int]) -> bool:
        """Whether the tokens are those of their text."""
        return self.ids(self.text(ids)) == list(ids)

    def after(self, ids: Sequence[int], piece: str) -> int | None:
        """The one token that a piece of text adds to tokens, which it must leave as they are; None for any other."""
        if not piece or not piece.isprintable() or "\ufffd" in piece:
            return None
        longer = self.ids(self.text(ids) + piece)
        return longer[-1] if longer[:-1] == list(ids) and self.text(longer) == self.text(ids) + piece else None

    @cached_property
    def around(self) -> tuple[int, ...]:
        """The tokens that the tokenizer puts before and after each text."""
        return tuple(self.ids(""))

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def conversation(self, message: str) -> str:
        """What the chat template makes of a user's message, up to the reply. Raises InputRefused where it fails."""
        messages = [{"role": "user", "content": message}]
        return str(render_chat(self.tokenizer, messages, tokenize=False, add_generation_prompt=True))

    def ids_of_conversation(self, text: str) -> list[int]:
        """The tokens of what the chat template made: it has those of a beginning itself."""
        with refusing_failures("the tokenizer fails on a text"):
            return list(map(int, self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))

    def draw(self, length: int, choose: random.Random) -> list[int]:
        """So many tokens of a text, at random, with those around it. Raises InputRefused where texts lose some."""
        for _ in range(TRIES):
            drawn = [self._word(choose) for _ in range(length + MORE)]
            ids = self._cut(self.ids(self.text([*self.begin, *drawn])), length)
            if len(ids) == length and self.is_exact(ids):
                return ids
        raise InputRefused(
            f"the tokenizer makes no text of {length} tokens that it reads as the same tokens again, so that a server "
            "that takes texts alone cannot be compared"
        )

    def _cut(self, ids: list[int], length: int) -> list[int]:
        """The first tokens of a text, and those that are put after each."""
        before = sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, self.around, strict=False))
        )
        after = len(self.around) - before
        return [*ids[: length - after], *ids[len(ids) - after :]]

    def _word(self, choose: random.Random) -> int:
        """A token whose text is printable: the bytes of a letter in several tokens have none by themselves."""
        for _ in range(TRIES):
            token = choose.randrange(self.vocabulary)
            text = self.text([token])
            if text and text.isprintable() and "\ufffd" not in text:
                return token
        raise InputRefused("the tokenizer has hardly a token that is text by itself")
