"""Texts, completions and dialogues as tokens, of which some are predicted."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lora_export.errors import InputRefused
from lora_export.training.arrays import IGNORED
from lora_export.training.encoders.classified import padded_tokens
from lora_export.training.losses import Batch, CrossEntropy
from lora_export.training.records.rows import Row

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # marks the assistant's turns in a chat template


class Tokens(NamedTuple):
    """A text as tokens, and which of them are predicted from those before."""

    ids: list[int]
    trained: list[bool]


Tokenise = Callable[[Row], Tokens]


def text_tokens(tokenizer: Any, *, ends: bool) -> Tokenise:
    """For `text`: all tokens are predicted. With `ends`, the text ends with the tokenizer's end of text."""

    def tokenise(row: Row) -> Tokens:
        ids = list(tokenizer(row["text"])["input_ids"])
        ids = ended(tokenizer, ids) if ends else ids
        return Tokens(ids, [True] * len(ids))

    return tokenise


def completion_tokens(tokenizer: Any) -> Tokenise:
    """For `prompt` and `completion`: the completion and the end of the text are predicted.

    Each is tokenised by itself, because a model that answers gets the prompt's tokens alone.
    """

    def tokenise(row: Row) -> Tokens:
        prompt = list(tokenizer(row["prompt"])["input_ids"])
        if prompt and prompt[-1] == tokenizer.eos_token_id:
            prompt.pop()
        answer = ended(tokenizer, list(tokenizer(row["completion"], add_special_tokens=False)["input_ids"]))
        return Tokens(prompt + answer, [False] * len(prompt) + [True] * len(answer))

    return tokenise


def chat_tokens(tokenizer: Any) -> Tokenise:
    """For `messages`: what the tokenizer's template makes of them; the assistant's turns are predicted.

    The turns are those that the template marks by `{% generation %}`. Without marks they are what each message adds
    behind the prompt for it. Raises InputRefused where there is no template, or it changes earlier turns.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise InputRefused(
            "the tokenizer has no chat template (chat_template.jinja beside the model), so that `messages` have no form"
        )
    if not tokenizer.is_fast:
        raise InputRefused("`messages` need a fast tokenizer (tokenizer.json), which knows the place of each token")

    def rendered(messages: Sequence[Any], **options: Any) -> str:
        try:
            text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # a template raises what it wants
            raise InputRefused(f"the chat template refuses the messages ({error})") from error
        return text

    def marked(messages: Sequence[Any]) -> Tokens:
        found = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return Tokens(list(found["input_ids"]), [bool(mask) for mask in found["assistant_masks"]])

    def tokenise(row: Row) -> Tokens:
        messages = row["messages"]
        if isinstance(template, str) and GENERATION.search(template):
            return marked(messages)
        whole = rendered(messages)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = rendered(messages[:number], add_generation_prompt=True)
            after = rendered(messages[: number + 1])
            if not whole.startswith(before) or not whole.startswith(after) or len(after) <= len(before):
                raise InputRefused(
                    f"the chat template changes earlier turns, so that message {number + 1} has no fixed place. "
                    "Mark the assistant's turns in the template by {% generation %}"
                )
            spans.append((len(before), len(after)))
        encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        places = encoded["offset_mapping"]
        trained = [any(begin <= start < end for begin, end in spans) for start, _ in places]
        return Tokens(list(encoded["input_ids"]), trained)

    return tokenise


def ended(tokenizer: Any, ids: list[int]) -> list[int]:
    """The tokens of a text, with the tokenizer's end of text behind them."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def decoder_tensors(
    rows: Sequence[Sequence[int]], start_token: int, pad_token: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a decoder reads, and what it is to predict: each (rows, longest). A token is predicted from those before."""
    longest = max(map(len, rows))
    decoder, labels = torch.full((len(rows), longest), pad_token), torch.full((len(rows), longest), IGNORED)
    for row, ids in enumerate(rows):
        labels[row, : len(ids)] = torch.tensor(ids)
        decoder[row, : len(ids)] = torch.tensor([start_token, *ids[:-1]])
    return decoder, labels


@dataclass(frozen=True, eq=False)
class AnswerEncoder:
    """`prompt` for an encoder, and `completion` for its decoder."""

    tokenizer: Any
    max_length: int
    start_token: int  # with which the decoder begins

    loss = CrossEntropy()

    def encode(self, row: Row) -> tuple[dict[str, Any], list[int]]:
        prompt = dict(self.tokenizer(row["prompt"], truncation=True, max_length=self.max_length))
        target = self.tokenizer(text_target=row["completion"], truncation=True, max_length=self.max_length)
        return prompt, ended(self.tokenizer, list(target["input_ids"]))

    def collate(self, encoded: Sequence[Any], keys: Sequence[tuple[int, int]]) -> Batch:  # noqa: ARG002
        inputs = padded_tokens(self.tokenizer, [prompt for prompt, _ in encoded])
        decoder, labels = decoder_tensors([ids for _, ids in encoded], self.start_token, self.tokenizer.pad_token_id)
        return Batch({**inputs, "decoder_input_ids": decoder}, labels)
