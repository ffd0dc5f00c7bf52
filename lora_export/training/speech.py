"""Sounds with transcripts: for models with a decoder (Whisper), and for those that score each frame (CTC)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.models.processors import features_of, read_sound, sound_header, tokenised
from lora_export.options.spelling import named
from lora_export.training.batches import Batch, CrossEntropy, Loss, LossOfTheModel
from lora_export.training.encoders import decoder_tensors, ended
from lora_export.training.records.opening import IGNORED
from lora_export.training.records.rows import AUDIO, Records, Row, sound_in

Encoded = tuple[NDArray[np.float32], list[int]]  # samples, and the tokens of the transcript


@dataclass(frozen=True, eq=False)
class SoundReader:
    """The sounds of rows, as the model's own extractor takes them."""

    records: Records
    extractor: Any  # transformers' feature extractor

    def samples(self, row: Row) -> NDArray[np.float32]:
        """(samples,), at the extractor's rate. Raises InputRefused for a sound that is longer than the model hears."""
        found = sound_in(self.records, row[AUDIO])
        self._refuse_longer(sound_header(found).seconds)
        return read_sound(found, self.extractor.sampling_rate)

    def check(self, row: Row) -> int:
        """How many samples a sound has at the extractor's rate, from its header. Raises InputRefused as `samples`."""
        header = sound_header(sound_in(self.records, row[AUDIO]))
        self._refuse_longer(header.seconds)
        return header.samples_at(self.extractor.sampling_rate)

    def _refuse_longer(self, seconds: float) -> None:
        most = getattr(self.extractor, "n_samples", None)  # of Whisper, which cuts what is longer
        limit = most / self.extractor.sampling_rate if most else seconds
        if seconds > limit:
            raise InputRefused(f"the sound takes {seconds:.1f} s, and the model hears {limit:g} s; cut it into parts")

    def inputs(self, sounds: Sequence[NDArray[np.float32]]) -> dict[str, torch.Tensor]:
        """What the model reads of these sounds, one row each."""
        return {name: torch.from_numpy(values) for name, values in features_of(sounds, self.extractor).items()}


@dataclass(frozen=True, eq=False)
class SpeechEncoder:
    """`audio`, and the tokens of `text`."""

    sounds: SoundReader
    tokenizer: Any

    def check(self, row: Row) -> None:
        """Raise InputRefused for a row that cannot be trained on. Reads the header of its sound alone."""
        self.sounds.check(row)
        self.tokens(row)

    def encode(self, row: Row) -> Encoded:
        return self.sounds.samples(row), self.tokens(row)

    def tokens(self, row: Row) -> list[int]:
        """The tokens of the transcript. Raises InputRefused for one that cannot be trained on."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class TranscriptEncoder(SpeechEncoder):
    """`audio` for an encoder, and `text` for its decoder."""

    max_length: int  # tokens of a transcript
    start_token: int  # with which the decoder begins

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
        decoder, labels = decoder_tensors([ids for _, ids in encoded], self.start_token, self.tokenizer.pad_token_id)
        return Batch({**inputs, "decoder_input_ids": decoder}, labels)


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
        labels = torch.full((len(encoded), max(len(ids) for _, ids in encoded)), IGNORED)
        for row, (_, ids) in enumerate(encoded):
            labels[row, : len(ids)] = torch.tensor(ids)
        return Batch({**inputs, "labels": labels}, labels)
