"""Heads that adapters bring: under the base's names, with their own number of labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lora_export import plan
from lora_export.errors import InputRefused, MatchError
from lora_export.lora import LoraPair, ModuleEndings
from lora_export.plan import Layout, TensorSpec
from lora_export.plan.own_heads import head_names, own_heads, with_labels_of, without_own_head
from support.graphs import an_adapter

SPECS = [
    TensorSpec("model.fc.weight", (2, 3), "float32", Layout.OUT_IN),
    TensorSpec("score.weight", (2, 3), "float32", Layout.OUT_IN),
    TensorSpec("score.bias", (2,), "float32"),
]
PAIR = LoraPair(a=[[1, 2, 3]], b=[[1], [2]], scale=1.0)
WEIGHT, BIAS = np.arange(12, dtype=np.float32).reshape(4, 3), np.float32([1, 2, 3, 4])


def test_a_head_of_more_labels_has_the_base_s_names() -> None:
    adapter = an_adapter({"model.fc": PAIR}, replaced={"score.weight": WEIGHT, "score.bias": BIAS})
    (head,) = own_heads([adapter], SPECS)
    assert head.keys() == {"score.weight", "score.bias"} and np.array_equal(head["score.weight"], WEIGHT)
    assert [spec.shape for spec in with_labels_of(adapter, SPECS)] == [(2, 3), (4, 3), (4,)]
    assert own_heads([an_adapter({"model.fc": PAIR})], SPECS) == [{}]


def test_a_table_beside_its_pair_is_no_head() -> None:
    adapter = an_adapter({"score": PAIR}, replaced={"score.weight": WEIGHT[:2], "score.bias": BIAS[:2]})
    assert head_names(adapter) == ["score.bias"]
    assert list(without_own_head(adapter).replaced) == ["score.weight"]


def test_a_head_that_was_taken_is_not_one_that_the_file_lacks() -> None:
    adapter = an_adapter({"model.fc": PAIR}, replaced={"score.weight": WEIGHT, "score.bias": BIAS})
    saved = replace(adapter, saved_whole=ModuleEndings(["classifier", "score", "norm"]))
    norm = TensorSpec("norm.weight", (3,), "float32")
    (note,) = plan.make([without_own_head(saved)], [*SPECS, norm]).notes
    assert note.endswith(" names norm, and its file has nothing of that: the base's own stay.")


def test_a_layer_that_the_base_lacks_is_refused_with_the_way_out() -> None:
    adapter = an_adapter({"model.fc": PAIR}, replaced={"classifier.weight": WEIGHT}, name="fr")
    with pytest.raises(InputRefused, match=r"fr, classifier.weight\n.*only_head=True"):
        own_heads([adapter], SPECS)


def test_another_size_of_the_input_is_a_misfit() -> None:
    adapter = an_adapter({"model.fc": PAIR}, replaced={"score.weight": np.ones((4, 5), np.float32)})
    with pytest.raises(MatchError, match=r"score.weight"):
        own_heads([adapter], SPECS)
