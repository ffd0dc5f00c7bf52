"""The record of a graph's adapters by row, and the labels that heads do not have."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.formats.contract import (
    ABSENT_LABEL,
    ROW_ADAPTERS_KEY,
    RowAdapters,
    read_row_adapters,
    row_inputs,
    without_absent,
)

LOGITS = np.float32([[1, 2, ABSENT_LABEL], [3, 4, ABSENT_LABEL]])


def test_what_is_written_is_read() -> None:
    record = RowAdapters(["fr", "de"], {"logits": [2, 3, 5]})
    assert read_row_adapters({ROW_ADAPTERS_KEY: str(record)}, "g") == record
    assert json.loads(str(record))["absent_label"] == ABSENT_LABEL
    assert json.loads(str(RowAdapters(["fr"]))) == {"adapters": ["fr"]}
    assert read_row_adapters({}, "g") is None


@pytest.mark.parametrize("text", ['{"adapters": [1]}', '{"adapters": "fr"}'])
def test_another_record_is_none(text: str) -> None:
    assert read_row_adapters({ROW_ADAPTERS_KEY: text}, "g") is None


@pytest.mark.parametrize("text", ["[1, 2]", '"fr"', "{"])
def test_what_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(InputRefused, match="g is not"):
        read_row_adapters({ROW_ADAPTERS_KEY: text}, "g")


@pytest.mark.parametrize("labels", ['{"y": [1]}', '{"y": 3}', '{"y": [1, "2"]}', "[1]", '{"y": [true, 2]}'])
def test_damaged_labels_are_left_out(labels: str) -> None:
    record = read_row_adapters({ROW_ADAPTERS_KEY: f'{{"adapters": ["fr"], "labels": {labels}}}'}, "g")
    assert record == RowAdapters(["fr"])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_absent_labels_are_left_out_in_every_type(dtype: type) -> None:
    assert without_absent(LOGITS.astype(dtype), 2).tolist() == [[1, 2], [3, 4]]


def test_labels_stay_where_one_of_them_is_not_absent() -> None:
    logits = LOGITS.copy()
    logits[1, 2] = -9999
    assert without_absent(logits, 2) is logits and without_absent(LOGITS, None) is LOGITS
    assert without_absent(LOGITS, 3) is LOGITS


def test_each_id_has_its_own_labels() -> None:
    record = RowAdapters(["fr"], {"logits": [3, 2]})
    outputs = {"logits": LOGITS, "hidden": LOGITS}
    assert [record.own_labels(outputs, number)["logits"].shape for number in (0, 1)] == [(2, 3), (2, 2)]
    assert record.own_labels(outputs, 1)["hidden"] is LOGITS


def test_single_ids_fill_the_rows_of_a_graph_that_takes_several() -> None:
    ids = np.array([2, 0], np.int64)
    assert row_inputs(ids, None, 1) == {"adapter_ids": ids}
    given = row_inputs(ids, None, 3)
    assert given["adapter_ids"].tolist() == [[2, 0, 0], [0, 0, 0]] and given["adapter_scales"].tolist() == [[1] * 3] * 2
    both = row_inputs(np.array([[1, 2]]), np.float32([[0.5, 2]]), 2)
    assert both["adapter_ids"].tolist() == [[1, 2]] and both["adapter_scales"].tolist() == [[0.5, 2]]
    record = RowAdapters(["fr"], per_row=3)
    assert read_row_adapters({ROW_ADAPTERS_KEY: str(record)}, "g") == record
    assert read_row_adapters({ROW_ADAPTERS_KEY: '{"adapters": ["fr"], "per_row": "3"}'}, "g") == RowAdapters(["fr"])
