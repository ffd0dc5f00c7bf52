"""The text of tokens that come one by one."""

from __future__ import annotations

from typing import Any

from lora_export.models.processors import refusing_failures
from lora_export.options.export import OnText

CONTEXT = 16  # tokens before a new one that are decoded with it, at least; at most twice as many and those of its text


class TextStream:
    """Passes on the text that each token adds. A character may be made of several tokens.

    The text of a token depends on those before it: a tokenizer writes no space before the first word. A few of them
    are enough. With all of them, a text of n tokens would take n² / 2 decoded tokens.
    """

    def __init__(self, number: int, tokenizer: Any, on_text: OnText):
        self.number, self.tokenizer, self.on_text = number, tokenizer, on_text
        self.tokens: list[int] = []
        self.start, self.next_start = 0, 0  # tokens from `start` on are decoded; no character is split at either
        self.shown = 0  # characters of their text

    def add(self, token: int) -> None:
        """Pass on what is certain now. A character that is not complete yet is decoded as U+FFFD."""
        self.tokens.append(token)
        text = self._text(self.start)
        if text is None or text.endswith("\ufffd"):
            return
        self._show(text)
        if len(self.tokens) - self.next_start >= CONTEXT and (later := self._text(self.next_start)):
            self.start, self.next_start, self.shown = self.next_start, len(self.tokens), len(later)

    def end(self) -> str | None:
        """Pass on what is left, and return the whole text; None without a tokenizer."""
        self._show(self._text(self.start) or "")
        return self._text(0)

    def _text(self, start: int) -> str | None:
        if self.tokenizer is None:
            return None
        with refusing_failures("the tokenizer fails on the model's tokens"):
            return str(self.tokenizer.decode(self.tokens[start:], skip_special_tokens=True))

    def _show(self, text: str) -> None:
        if len(text) > self.shown:
            self.on_text(self.number, text[self.shown :])
            self.shown = len(text)
