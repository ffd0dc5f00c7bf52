"""Data of language models: tokens in a file, cut into pieces of one length at most, and packed where that is wanted."""

from __future__ import annotations

import bisect
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.options.spelling import named
from lora_export.training.batches import Batch, CrossEntropy, module_outputs, scores_of
from lora_export.training.encoders import Tokenise, padded_rows
from lora_export.training.order import RowNumbers
from lora_export.training.records.opening import IGNORED
from lora_export.training.records.rows import Records

MASKED_PART = 0.15  # of the tokens that a masked language model predicts (Devlin et al. 2019)
REPLACED_BY_MASK, REPLACED_BY_ANY = 0.8, 0.1  # of these; the others stay as they are
# Of the largest score: differences that no rounding in fp32 makes, in rows of another width and of the same one.
MIXING, READING_AHEAD = 1e-3, 1e-5
LEAST_READ = 8  # tokens that show whether a model reads ahead


class TextPiece(NamedTuple):
    """Tokens of one text, by their places in the file."""

    start: int
    stop: int
    end_of_text: int


class TokenFile:
    """All tokens of some rows, in a temporary file that is mapped: 4 bytes for each. A row takes 8 bytes of memory.

    A token that is not predicted is stored as -1 - id.
    """

    def __init__(self, records: Records, rows: RowNumbers, tokenise: Tokenise):
        """Tokenise the rows. Raises InputRefused, with the place, where that fails."""
        self._folder = tempfile.TemporaryDirectory(prefix="lora-export-")  # removed with this object
        path = Path(self._folder.name, "tokens")
        self.ends = array("q", [0])
        with path.open("wb") as file:
            for row in rows:
                number = int(row)
                with records.naming(number):
                    ids, trained = tokenise(records[number])
                tokens = np.asarray(ids, np.int32)
                file.write(np.where(np.asarray(trained, bool), tokens, -1 - tokens).tobytes())
                self.ends.append(self.ends[-1] + len(ids))
        has_any = self.ends[-1] > 0
        self.tokens: NDArray[np.int32] = np.memmap(path, np.int32, "r") if has_any else np.zeros(0, np.int32)

    def pieces(self, max_length: int, *, cut: bool) -> list[TextPiece]:
        """The texts in pieces of at most `max_length` tokens; or, where they are not cut, their beginnings.

        Pieces in which nothing is predicted are left out. Raises InputRefused where none is left.
        """
        found = []
        for begin, end in zip(self.ends[:-1], self.ends[1:], strict=True):
            for start in range(begin, end, max_length) if cut else [begin]:
                stop = min(start + max_length, end)
                # The last token of a piece predicts the first one of the next.
                if (self.tokens[start + 1 : stop + (stop < end and cut)] >= 0).any():
                    found.append(TextPiece(start, stop, end if cut else stop))
        if not found:
            raise InputRefused(f"no token is left to predict within {max_length} tokens; raise {named('max_length')}")
        return found


class Segment(NamedTuple):
    """One piece: its tokens, and the token that each of them predicts, or IGNORED."""

    ids: NDArray[np.int64]
    following: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class CausalRows:
    """Rows of one or, packed, several pieces, in which each token predicts the next one of its text."""

    file: TokenFile
    bins: Sequence[Sequence[TextPiece]]
    pad_token: int
    is_packed: bool

    loss = CrossEntropy()

    def __len__(self) -> int:
        return len(self.bins)

    def batch(self, rows: Sequence[int], epoch: int = 0) -> Batch:  # noqa: ARG002 - nothing is random
        """The rows, padded at the end. Packed texts have positions that begin anew, by which a model separates them."""
        segments = [[self._segment(piece) for piece in self.bins[row]] for row in rows]
        lengths = [[len(segment.ids) for segment in row] for row in segments]
        ids = padded_rows((np.concatenate([segment.ids for segment in row]) for row in segments), self.pad_token)
        labels = padded_rows((np.concatenate([segment.following for segment in row]) for row in segments), IGNORED)
        if self.is_packed:  # the padding is one more text
            texts = ([*row, ids.shape[1] - sum(row)] for row in lengths)
            second = {"position_ids": padded_rows((np.concatenate([*map(np.arange, each)]) for each in texts), 0)}
        else:
            second = {"attention_mask": padded_rows((np.ones(sum(row), np.int64) for row in lengths), 0)}
        return Batch({"input_ids": ids} | second, labels)

    def _segment(self, piece: TextPiece) -> Segment:
        tokens = np.asarray(self.file.tokens[piece.start : min(piece.stop + 1, piece.end_of_text)], np.int64)
        length = piece.stop - piece.start
        following = np.full(length, IGNORED, np.int64)
        following[: len(tokens) - 1] = np.where(tokens[1:] >= 0, tokens[1:], IGNORED)
        return Segment(np.where(tokens >= 0, tokens, -1 - tokens)[:length], following)


@dataclass(frozen=True, eq=False)
class MaskedRows:
    """Rows of one piece each, in which masked tokens are predicted. Row, epoch and seed decide which."""

    file: TokenFile
    pieces: Sequence[TextPiece]
    pad_token: int
    mask_token: int
    vocabulary: int
    special: frozenset[int]  # never masked
    seed: int

    loss = CrossEntropy()

    def __len__(self) -> int:
        return len(self.pieces)

    def batch(self, rows: Sequence[int], epoch: int = 0) -> Batch:
        masked = [self._masked(self.pieces[row], np.random.default_rng((self.seed, epoch, row))) for row in rows]
        ids, labels = zip(*masked, strict=True)
        mask = padded_rows(map(np.ones_like, ids), 0)
        inputs = {"input_ids": padded_rows(ids, self.pad_token), "attention_mask": mask}
        return Batch(inputs, padded_rows(labels, IGNORED))

    def _masked(self, piece: TextPiece, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        tokens = np.asarray(self.file.tokens[piece.start : piece.stop], np.int64)
        allowed = np.flatnonzero(~np.isin(tokens, list(self.special)))
        chosen = rng.permutation(allowed)[: max(1, round(MASKED_PART * len(allowed)))]  # at least one predicts
        labels = np.full(len(tokens), IGNORED, np.int64)
        labels[chosen] = tokens[chosen]
        masked, draw = tokens.copy(), rng.random(len(chosen))
        masked[chosen[draw < REPLACED_BY_MASK]] = self.mask_token
        by_any = chosen[(draw >= REPLACED_BY_MASK) & (draw < REPLACED_BY_MASK + REPLACED_BY_ANY)]
        masked[by_any] = rng.integers(0, self.vocabulary, len(by_any))
        return masked, labels


def causal_rows(file: TokenFile, *, max_length: int, cut: bool, pack: bool, pad_token: int) -> CausalRows:
    """The data of a causal language model. With `cut`, texts longer than `max_length` tokens give several pieces."""
    pieces = file.pieces(max_length, cut=cut)
    lengths = [piece.stop - piece.start for piece in pieces]
    numbers = packed_rows(lengths, max_length) if pack else [[item] for item in range(len(pieces))]
    bins = [[pieces[item] for item in items] for items in numbers]
    return CausalRows(file, bins, pad_token, pack)


def refuse_reading_ahead(module: nn.Module, data: CausalRows) -> None:
    """Raise InputRefused where the model reads the token that it is to predict, as an encoder with such a head does.

    Runs the model on the beginning of one text, and again with another last token.
    """
    piece = next((piece for row in data.bins for piece in row if piece.stop - piece.start > 1), None)
    if piece is None:
        return
    short = piece._replace(stop=min(piece.stop, piece.start + LEAST_READ))
    inputs = replace(data, bins=[[short]], is_packed=False).batch([0]).inputs
    ids = inputs["input_ids"].clone()
    ids[0, -1] = 0 if ids[0, -1] else 1
    both = inputs, {**inputs, "input_ids": ids}
    try:
        with torch.no_grad():
            scores, others = (scores_of(module_outputs(module, given))[0, :-1] for given in both)
    except RuntimeRefused:  # the training itself then fails in words
        return
    widest = max(torch.finfo(each.dtype).eps for each in (scores, *module.parameters()) if each.is_floating_point())
    if (scores - others).abs().max() > max(READING_AHEAD, 4 * widest) * scores.abs().max():
        raise InputRefused(
            f"{type(module).__name__} reads the tokens behind the one that it predicts from, so that it would learn to "
            "copy the next token. Texts train a model that reads in one direction, or one whose class ends with "
            "ForMaskedLM"
        )


def refuse_mixed_texts(module: nn.Module, data: CausalRows) -> None:
    """Raise InputRefused where the model lets packed texts read each other, and so computes others than for each alone.

    Runs the model on the first row of several texts.
    """
    row = next((row for row in data.bins if len(row) > 1), None)
    if row is None:
        return
    together = replace(data, bins=[row]).batch([0])
    with torch.no_grad():
        joint = scores_of(module_outputs(module, together.inputs))[0]
        place = 0
        for piece in row:
            alone = replace(data, bins=[[piece]], is_packed=False).batch([0])
            scores = scores_of(module_outputs(module, alone.inputs))[0]
            part = joint[place : place + len(scores)]
            place += len(scores)
            if (part - scores).abs().max() > MIXING * scores.abs().max():
                raise InputRefused(
                    f"{type(module).__name__} lets packed texts read each other, so that packing would train it on "
                    f"other texts than yours. Leave out {named('packing', True)}"
                )


def packed_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of item numbers, each with at most `capacity` in all: the longest first, each where it fits best.

    Items of more than the capacity must not be there. An item's bin depends on the lengths alone. The bins are in the
    order of their first items, and so are the items in a bin.
    """
    bins: list[list[int]] = []
    free_in: dict[int, list[int]] = {}  # free -> the bins that have so much
    sizes: list[int] = []  # the keys of free_in, sorted
    for item in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        place = bisect.bisect_left(sizes, lengths[item])
        if place == len(sizes):
            bins.append([])
            number, free = len(bins) - 1, capacity
        else:
            free = sizes[place]
            number = free_in[free].pop()
            if not free_in[free]:
                del free_in[free], sizes[place]
        bins[number].append(item)
        left = free - lengths[item]
        if left not in free_in:
            free_in[left] = []
            bisect.insort(sizes, left)
        free_in[left].append(number)
    return sorted(sorted(items) for items in bins)
