"""Rows as inputs and labels of a model: texts and images with labels, tokens of which some are predicted, and sounds.

Sounds have transcripts: for models with a decoder (Whisper), and for those that score each frame (CTC).
"""

from __future__ import annotations

import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.nn.utils.rnn import pad_sequence

from lora_export.errors import InputRefused
from lora_export.models.processors import (
    PIXELS,
    chat_template_of,
    features_of,
    image_pixels,
    read_image,
    read_sound,
    refuse_longer,
    render_chat,
    sound_header,
    tokenised,
)
from lora_export.options.spelling import named
from lora_export.training.batches import (
    Batch,
    BinaryCrossEntropy,
    CosineError,
    CrossEntropy,
    Loss,
    LossOfTheModel,
    SquaredError,
)
from lora_export.training.records.opening import IGNORED
from lora_export.training.records.rows import AUDIO, IMAGE, Records, Row, file_in
from lora_export.training.row_forms import LabelKind, label_value, tools_of


def padded_rows(rows: Iterable[ArrayLike], padding: int, side: str = "right") -> torch.Tensor:
    """Rows of integers as int64 (rows, longest)."""
    tensors = [torch.from_numpy(np.asarray(row, np.int64)) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=padding, padding_side=side)


@dataclass(frozen=True, eq=False)
class LabelEncoder:
    """A label as a number, a row of zeros and ones, or a value."""

    kind: LabelKind
    classes: tuple[str | int, ...]

    @cached_property
    def index_of(self) -> dict[str | int, int]:
        return {label: number for number, label in enumerate(self.classes)}

    @property
    def loss(self) -> Loss:
        if self.kind is LabelKind.CLASS:
            return CrossEntropy()
        return BinaryCrossEntropy() if self.kind is LabelKind.CLASSES else SquaredError()

    def tensor(self, labels: Sequence[Any]) -> torch.Tensor:
        """int64 (n,) of classes, float32 (n, classes) of several at once, or float32 (n,) of values."""
        if self.kind is LabelKind.CLASS:
            return torch.tensor([self.index_of[label_value(label, self.classes)] for label in labels])
        if self.kind is LabelKind.VALUE:
            return torch.tensor([float(label) for label in labels])
        chosen = torch.zeros(len(labels), len(self.classes))
        for row, group in enumerate(labels):
            chosen[row, [self.index_of[label] for label in group]] = 1
        return chosen


@dataclass(frozen=True, eq=False)
class _Tokenised:
    """For rows of texts, which are cut to a length."""

    tokenizer: Any
    max_length: int

    def tokens(self, *texts: Any, **options: Any) -> Any:
        return tokenised(self.tokenizer, *texts, truncation=True, max_length=self.max_length, **options)

    def padded(self, encoded: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Tokenised texts as tensors, padded to the longest of them."""
        return dict(self.tokenizer.pad(list(map(dict, encoded)), return_tensors="pt"))


@dataclass(frozen=True, eq=False)
class TextEncoder(_Tokenised):
    """`text`, with `text_pair` where the row has one, and `label`."""

    labels: LabelEncoder

    @property
    def loss(self) -> Loss:
        return self.labels.loss

    def encode(self, row: Row) -> tuple[Any, Any]:
        texts = [row["text"]] if row.get("text_pair") is None else [row["text"], row["text_pair"]]
        return self.tokens(*texts), row["label"]

    def collate(self, encoded: Sequence[Any]) -> Batch:
        tokens, labels = zip(*encoded, strict=True)
        return Batch(self.padded(tokens), self.labels.tensor(labels))


@dataclass(frozen=True, eq=False)
class TagEncoder(_Tokenised):
    """`tokens`, the words of a text, with `tags`. The first token of a word has its tag; the others are ignored."""

    labels: LabelEncoder

    loss = CrossEntropy()

    def encode(self, row: Row) -> tuple[Any, list[int]]:
        if not self.tokenizer.is_fast:
            raise InputRefused("tags need a fast tokenizer (tokenizer.json), which knows the word of each token")
        tokens = self.tokens(row["tokens"], is_split_into_words=True)
        numbers = [self.labels.index_of[tag] for tag in row["tags"]]
        words = itertools.pairwise([None, *tokens.word_ids()])
        return tokens, [IGNORED if word is None or word == last else numbers[word] for last, word in words]

    def collate(self, encoded: Sequence[Any]) -> Batch:
        inputs = self.padded([tokens for tokens, _ in encoded])
        side = getattr(self.tokenizer, "padding_side", "right")
        return Batch(inputs, padded_rows([tags for _, tags in encoded], IGNORED, side))


@dataclass(frozen=True, eq=False)
class SimilarityEncoder(_Tokenised):
    """`sentence1`, `sentence2` and their `score`: a batch has all first sentences, then all second ones."""

    loss = CosineError()

    def encode(self, row: Row) -> tuple[Any, Any, float]:
        return self.tokens(row["sentence1"]), self.tokens(row["sentence2"]), float(row["score"])

    def collate(self, encoded: Sequence[Any]) -> Batch:
        first, second, scores = zip(*encoded, strict=True)
        return Batch(self.padded([*first, *second]), torch.tensor(scores))


@dataclass(frozen=True, eq=False)
class ImageEncoder:
    """`image`, a file, bytes or an image of Pillow, prepared as the model's own processor does, and `label`."""

    records: Records
    processor: Any  # transformers' image processor
    labels: LabelEncoder

    @property
    def loss(self) -> Loss:
        return self.labels.loss

    def encode(self, row: Row) -> tuple[torch.Tensor, Any]:
        return image_pixels(self.processor, read_image(file_in(self.records, row[IMAGE], IMAGE))), row["label"]

    def collate(self, encoded: Sequence[Any]) -> Batch:
        pixels, labels = zip(*encoded, strict=True)
        return Batch({PIXELS: torch.stack(pixels)}, self.labels.tensor(labels))


GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # marks the assistant's turns in a chat template


class Tokens(NamedTuple):
    """A text as tokens, and which of them are predicted from those before."""

    ids: list[int]
    trained: list[bool]


Tokenise = Callable[[Row], Tokens]


def text_tokens(tokenizer: Any, *, ends: bool) -> Tokenise:
    """For `text`: all tokens are predicted. With `ends`, the text ends with the tokenizer's end of text."""

    def tokenise(row: Row) -> Tokens:
        ids = list(tokenised(tokenizer, row["text"])["input_ids"])
        ids = ended(tokenizer, ids) if ends else ids
        return Tokens(ids, [True] * len(ids))

    return tokenise


def completion_tokens(tokenizer: Any) -> Tokenise:
    """For `prompt` and `completion`: the completion and the end of the text are predicted.

    Each is tokenised by itself, because a model that answers gets the prompt's tokens alone.
    """

    def tokenise(row: Row) -> Tokens:
        prompt = list(tokenised(tokenizer, row["prompt"])["input_ids"])
        if prompt and prompt[-1] == tokenizer.eos_token_id:
            prompt.pop()
        answer = ended(tokenizer, list(tokenised(tokenizer, row["completion"], add_special_tokens=False)["input_ids"]))
        return Tokens(prompt + answer, [False] * len(prompt) + [True] * len(answer))

    return tokenise


def chat_tokens(tokenizer: Any) -> Tokenise:
    """For `messages`: what the tokenizer's template makes of them, and of `tools`; the assistant's turns are predicted.

    The turns are those that the template marks by `{% generation %}`. Without marks they are what each message adds
    behind the prompt for it. Raises InputRefused where there is no template, or it changes earlier turns.
    """
    template = chat_template_of(tokenizer)
    if not tokenizer.is_fast:
        raise InputRefused("`messages` need a fast tokenizer (tokenizer.json), which knows the place of each token")

    def rendered(messages: Sequence[Any], **options: Any) -> str:
        return str(render_chat(tokenizer, messages, tokenize=False, **options))

    def marked(messages: Sequence[Any], **options: Any) -> Tokens:
        options |= {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        found = render_chat(tokenizer, messages, **options)
        return Tokens(list(found["input_ids"]), [bool(mask) for mask in found["assistant_masks"]])

    def tokenise(row: Row) -> Tokens:
        messages, options = row["messages"], {"tools": tools} if (tools := tools_of(row)) else {}
        if isinstance(template, str) and GENERATION.search(template):
            return marked(messages, **options)
        whole = rendered(messages, **options)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = rendered(messages[:number], add_generation_prompt=True, **options)
            after = rendered(messages[: number + 1], **options)
            if not whole.startswith(before) or not whole.startswith(after) or len(after) <= len(before):
                raise InputRefused(
                    f"the chat template changes earlier turns, so that message {number + 1} has no fixed place. "
                    "Mark the assistant's turns in the template by {% generation %}"
                )
            spans.append((len(before), len(after)))
        tokens = tokenised(tokenizer, whole, add_special_tokens=False, return_offsets_mapping=True)
        places = tokens["offset_mapping"]
        trained = [any(begin <= start < end for begin, end in spans) for start, _ in places]
        return Tokens(list(tokens["input_ids"]), trained)

    return tokenise


def ended(tokenizer: Any, ids: list[int]) -> list[int]:
    """The tokens of a text, with the tokenizer's end of text behind them."""
    end = tokenizer.eos_token_id
    before_language = ids[-2:-1] == [end] and ids[-1] in tokenizer.all_special_ids  # as mBART's tokenizer writes it
    return ids if end is None or ids[-1:] == [end] or before_language else [*ids, end]


Shift = Callable[[torch.Tensor], torch.Tensor]


def decoder_shift(module: Any) -> Shift:
    """A function from labels (rows, tokens; IGNORED after a text's end) to what an encoder-decoder's decoder reads.

    Each token is predicted from those before it. The module's own rule counts where it has one: mBART begins with the
    last token of the text. Raises InputRefused where it is not known what a decoder begins with.
    """
    pad, start = module.config.pad_token_id, getattr(module.config, "decoder_start_token_id", None)
    own = getattr(module, "prepare_decoder_input_ids_from_labels", None)
    if own is not None and pad is not None:
        return lambda labels: own(labels=labels.clone())  # FSMT's fills them in place
    if start is None:
        lacking = "decoder_start_token_id" if own is None else "pad_token_id"
        raise InputRefused(f"the config of {type(module).__name__} has no {lacking}, which its decoder needs to begin")

    def shifted(labels: torch.Tensor) -> torch.Tensor:
        tokens = labels.masked_fill(labels == IGNORED, pad or 0)
        return torch.cat([torch.full_like(tokens[:, :1], start), tokens[:, :-1]], 1)

    return shifted


@dataclass(frozen=True, eq=False)
class AnswerEncoder(_Tokenised):
    """`prompt` for an encoder, and `completion` for its decoder."""

    shift: Shift

    loss = CrossEntropy()

    def encode(self, row: Row) -> tuple[Any, list[int]]:
        target = self.tokens(text_target=row["completion"])
        return self.tokens(row["prompt"]), ended(self.tokenizer, list(target["input_ids"]))

    def collate(self, encoded: Sequence[Any]) -> Batch:
        inputs = self.padded([prompt for prompt, _ in encoded])
        labels = padded_rows([ids for _, ids in encoded], IGNORED)
        return Batch({**inputs, "decoder_input_ids": self.shift(labels)}, labels)


Encoded = tuple[NDArray[np.float32], list[int]]  # samples, and the tokens of the transcript


@dataclass(frozen=True, eq=False)
class SoundReader:
    """The sounds of rows, as the model's own extractor takes them."""

    records: Records
    extractor: Any  # transformers' feature extractor

    def samples(self, row: Row) -> NDArray[np.float32]:
        """(samples,), at the extractor's rate. Raises InputRefused for a sound that is longer than the model hears."""
        found = file_in(self.records, row[AUDIO])
        refuse_longer(sound_header(found).seconds, self.extractor)
        return read_sound(found, self.extractor.sampling_rate)

    def check(self, row: Row) -> int:
        """How many samples a sound has at the extractor's rate, from its header. Raises InputRefused as `samples`."""
        header = sound_header(file_in(self.records, row[AUDIO]))
        refuse_longer(header.seconds, self.extractor)
        return header.samples_at(self.extractor.sampling_rate)

    def inputs(self, sounds: Sequence[NDArray[np.float32]]) -> dict[str, torch.Tensor]:
        """What the model reads of these sounds, one row each."""
        return {name: torch.from_numpy(values) for name, values in features_of(sounds, self.extractor).items()}


@dataclass(frozen=True, eq=False)
class SpeechEncoder(ABC):
    """`audio`, and the tokens of `text`."""

    sounds: SoundReader
    tokenizer: Any

    def check(self, row: Row) -> None:
        """Raise InputRefused for a row that cannot be trained on. Reads the header of its sound alone."""
        self.sounds.check(row)
        self.tokens(row)

    def encode(self, row: Row) -> Encoded:
        return self.sounds.samples(row), self.tokens(row)

    @abstractmethod
    def tokens(self, row: Row) -> list[int]:
        """The tokens of the transcript. Raises InputRefused for one that cannot be trained on."""


@dataclass(frozen=True, eq=False)
class TranscriptEncoder(SpeechEncoder):
    """`audio` for an encoder, and `text` for its decoder."""

    max_length: int  # tokens of a transcript
    start_token: int  # with which the decoder begins
    shift: Shift

    loss = CrossEntropy()

    def tokens(self, row: Row) -> list[int]:
        ids = ended(self.tokenizer, list(tokenised(self.tokenizer, row["text"])["input_ids"]))
        ids = ids[1:] if ids[0] == self.start_token else ids
        if len(ids) > self.max_length:
            raise InputRefused(
                f"the transcript has {len(ids)} tokens, and {self.max_length} are allowed ({named('max_length')})"
            )
        return ids

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        inputs = self.sounds.inputs([samples for samples, _ in encoded])
        labels = padded_rows([ids for _, ids in encoded], IGNORED)
        return Batch({**inputs, "decoder_input_ids": self.shift(labels)}, labels)


@dataclass(frozen=True, eq=False)
class FrameEncoder(SpeechEncoder):
    """`audio`, and the characters of `text`, which a model finds in its frames (CTC). The model computes its loss."""

    frames: Callable[[int], int] | None  # of so many samples; None where it is not known
    is_mean: bool  # whether the model's loss is a mean over the rows of a batch, not their sum

    @property
    def loss(self) -> Loss:
        return LossOfTheModel(self.is_mean)

    def check(self, row: Row) -> None:
        samples, ids = self.sounds.check(row), self.tokens(row)
        needed = len(ids) + sum(one == other for one, other in itertools.pairwise(ids))
        if self.frames is not None and self.frames(samples) < needed:
            raise InputRefused(
                f"the transcript needs {needed} frames, and the sound has {self.frames(samples)}: it is too short"
            )

    def tokens(self, row: Row) -> list[int]:
        ids = list(tokenised(self.tokenizer, row["text"])["input_ids"])
        if self.tokenizer.unk_token_id in ids:
            known = {" ", *self.tokenizer.get_vocab()}
            missing = ", ".join(map(repr, sorted(set(row["text"]) - known)))
            raise InputRefused(f"the tokenizer has no token for {missing or 'a part of the transcript'}")
        return ids

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        inputs = self.sounds.inputs([samples for samples, _ in encoded])
        labels = padded_rows([ids for _, ids in encoded], IGNORED)
        return Batch({**inputs, "labels": labels}, labels)
