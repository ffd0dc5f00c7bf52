"""Tokens of language models: pieces, labels, packing and masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_export.errors import InputRefused
from lora_export.training.batches import module_outputs
from lora_export.training.encoders import Tokens
from lora_export.training.records.rows import JsonLines, Row
from lora_export.training.token_rows import (
    CausalRows,
    MaskedRows,
    TokenFile,
    causal_rows,
    packed_rows,
    refuse_mixed_texts,
    refuse_reading_ahead,
)
from support.tiny_models import tiny_llama


def given_tokens(row: Row) -> Tokens:
    ids = row["ids"]
    return Tokens(ids, row.get("trained", [True] * len(ids)))


def token_file(folder: Path, *rows: dict[str, Any]) -> TokenFile:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TokenFile(JsonLines(folder / "a.jsonl"), np.arange(len(rows)), given_tokens)


def causal(folder: Path, *rows: dict[str, Any], length: int = 4, cut: bool = True, pack: bool = False) -> CausalRows:
    return causal_rows(token_file(folder, *rows), max_length=length, cut=cut, pack=pack, pad_token=0)


def test_each_token_predicts_the_next_also_across_pieces(tmp_path: Path) -> None:
    data = causal(tmp_path, {"ids": [5, 6, 7]}, {"ids": [1, 2, 3, 4, 8, 9]})
    inputs, labels = data.batch([0, 1, 2])
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 0], [1, 2, 3, 4], [8, 9, 0, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert labels.tolist() == [[6, 7, -100, -100], [2, 3, 4, 8], [9, -100, -100, -100]]


def test_a_piece_stays_for_the_first_token_of_the_next(tmp_path: Path) -> None:
    data = causal(tmp_path, {"ids": [1, 2, 3, 4, 5], "trained": [False] * 4 + [True]})
    assert len(data) == 1
    inputs, labels = data.batch([0])
    assert inputs["input_ids"].tolist() == [[1, 2, 3, 4]]
    assert labels.tolist() == [[-100, -100, -100, 5]]


def test_only_chosen_tokens_are_predicted_and_long_texts_are_cut(tmp_path: Path) -> None:
    rows = [
        {"ids": [1, 2, 3, 4, 5], "trained": [False, False, True, True, True]},
        {"ids": [1, 2, 3, 4, 5], "trained": [False] * 4 + [True]},  # beyond the length
    ]
    data = causal(tmp_path, *rows, cut=False)
    assert len(data) == 1
    inputs, labels = data.batch([0])
    assert inputs["input_ids"].tolist() == [[1, 2, 3, 4]]
    assert labels.tolist() == [[-100, 3, 4, -100]]
    with pytest.raises(InputRefused, match="no token is left to predict within 4 tokens"):
        causal(tmp_path, rows[1], cut=False)


def test_packed_texts_share_rows_with_positions_of_their_own(tmp_path: Path) -> None:
    data = causal(tmp_path, {"ids": [5, 6]}, {"ids": [1, 2, 3]}, {"ids": [7, 8]}, length=5, pack=True)
    assert len(data) == 2
    inputs, labels = data.batch([0, 1])
    assert set(inputs) == {"input_ids", "position_ids"}
    rows = {tuple(row) for row in inputs["input_ids"].tolist()}
    assert rows == {(5, 6, 1, 2, 3), (7, 8, 0, 0, 0)} or rows == {(1, 2, 3, 7, 8), (5, 6, 0, 0, 0)}
    assert [0, 1, 0, 1, 2] in inputs["position_ids"].tolist() or [0, 1, 2, 0, 1] in inputs["position_ids"].tolist()
    assert (labels != -100).sum() == 4  # no text predicts the first token of another


def test_a_packed_row_gives_the_loss_of_its_texts_alone(tmp_path: Path) -> None:
    rows = [{"ids": [5, 6, 9]}, {"ids": [1, 2, 3, 4]}, {"ids": [7, 8]}]
    module = tiny_llama(use_cache=False)  # with a cache, transformers looks for no packed texts
    alone, together = causal(tmp_path, *rows, length=9), causal(tmp_path, *rows, length=9, pack=True)
    refuse_mixed_texts(module, together)
    losses = []
    for data in (alone, together):
        batch = data.batch(range(len(data)))
        losses.append(data.loss.total(module_outputs(module, batch.inputs), batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_model_that_mixes_packed_texts_is_refused(tmp_path: Path) -> None:
    class Mixing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(20, 20)

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor | None = None,
            position_ids: torch.Tensor | None = None,
        ) -> torch.Tensor:
            scores: torch.Tensor = self.table(input_ids).cumsum(1)
            return scores

    data = causal(tmp_path, {"ids": [5, 6]}, {"ids": [1, 2, 3]}, length=5, pack=True)
    refuse_reading_ahead(Mixing(), data)
    with pytest.raises(InputRefused, match="Mixing lets packed texts read each other"):
        refuse_mixed_texts(Mixing(), data)


def masked(folder: Path, seed: int = 0) -> MaskedRows:
    file = token_file(folder, {"ids": [1, *range(5, 45), 2]}, {"ids": [1, 5, 2]})
    return MaskedRows(file, file.pieces(64, cut=True), 0, 4, 50, frozenset({0, 1, 2, 4}), seed)


def test_masked_tokens_are_the_labels_and_depend_on_row_epoch_and_seed(tmp_path: Path) -> None:
    data = masked(tmp_path)
    inputs, labels = data.batch([0, 1], epoch=1)
    ids, chosen = inputs["input_ids"], labels != -100
    assert chosen.sum(1).tolist() == [6, 1]  # 15 % of 40 tokens, and at least one
    original = torch.tensor([1, *range(5, 45), 2])
    assert torch.equal(labels[0][chosen[0]], original[chosen[0]])
    assert torch.equal(ids[0][~chosen[0]], original[~chosen[0]])
    assert (ids[0][chosen[0]] == 4).sum() >= 3
    assert not chosen[0, 0] and not chosen[0, 41]  # special tokens
    assert torch.equal(data.batch([1, 0], epoch=1).labels[1], labels[0])
    assert not torch.equal(data.batch([0, 1], epoch=2).labels, labels)
    assert not torch.equal(masked(tmp_path, seed=1).batch([0, 1], epoch=1).labels, labels)


def test_a_text_that_cannot_be_tokenised_is_named(tmp_path: Path) -> None:
    def refusing(row: Row) -> Tokens:
        raise InputRefused("no")

    (tmp_path / "a.jsonl").write_text("\n{}\n")
    with pytest.raises(InputRefused, match=r"a\.jsonl, line 2: no"):
        TokenFile(JsonLines(tmp_path / "a.jsonl"), np.arange(1), refusing)


def test_the_longest_are_placed_first_where_they_fit_best() -> None:
    # 7; 5; 3 beside 7; 3 beside 5; 2 in what is left beside 5 and 3
    assert packed_rows([5, 3, 2, 7, 3], 10) == [[0, 2, 4], [1, 3]]
    assert packed_rows([4, 4, 4], 4) == [[0], [1], [2]]
    assert packed_rows([], 4) == []


@given(st.lists(st.integers(1, 12), max_size=60))
def test_every_item_has_one_place_and_no_row_is_too_long(lengths: list[int]) -> None:
    bins = packed_rows(lengths, 12)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in items) <= 12 for items in bins)
    # No two rows would fit into one: at most one row is half empty.
    assert sum(2 * sum(lengths[item] for item in items) <= 12 for items in bins) <= 1
