"""Read labelled examples, and hold some of them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.training.data import Examples, read_examples, split


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_jsonl_labels_may_be_strings(tmp_path: Path) -> None:
    lines = [{"text": "b", "label": "pear", "more": 1}, {"text": "a", "label": "apple"}, {"text": "c", "label": "pear"}]
    content = "\ufeff" + "\n\n".join(json.dumps(line) for line in lines) + "\n"
    examples = read_examples(written(tmp_path / "examples.jsonl", content))
    assert examples.texts == ("b", "a", "c")
    assert examples.classes == ("apple", "pear")
    assert (examples.labels.tolist(), examples.labels.dtype) == ([1, 0, 1], np.int64)
    assert str(examples) == "3 examples of 2 classes"


def test_integer_labels_are_sorted_as_numbers(tmp_path: Path) -> None:
    content = "\n".join(json.dumps({"text": "a", "label": label}) for label in (10, 9, -1, 10))
    examples = read_examples(written(tmp_path / "examples.jsonl", content))
    assert (examples.classes, examples.labels.tolist()) == (("-1", "9", "10"), [2, 1, 0, 2])


def test_csv_may_have_quotes_line_breaks_and_other_columns(tmp_path: Path) -> None:
    content = 'id,label,text\r\n1,10,"one, and\ntwo"\r\n\r\n2,9,three\r\n'
    examples = read_examples(written(tmp_path / "examples.CSV", content))
    assert examples.texts == ("one, and\ntwo", "three")
    assert (examples.classes, examples.labels.tolist()) == (("9", "10"), [1, 0])


def test_csv_labels_with_leading_zeros_are_strings(tmp_path: Path) -> None:
    examples = read_examples(written(tmp_path / "examples.csv", "text,label\na,1\nb,01\n"))
    assert examples.classes == ("01", "1")


def test_npz_labels_are_classes_or_values(tmp_path: Path) -> None:
    classes = read_examples(saved(tmp_path / "a.npz", x=np.ones((2, 3)), labels=np.array([2, 0], np.int32)))
    assert (classes.classes, classes.labels.tolist(), classes.labels.dtype) == (("0", "1", "2"), [2, 0], np.int64)
    assert classes.inputs["x"].dtype == np.float32
    values = read_examples(saved(tmp_path / "b.npz", x=np.ones((2, 3), np.int64), labels=np.array([0.5, 2])))
    assert (values.classes, values.labels.tolist(), values.labels.dtype) == ((), [0.5, 2.0], np.float32)
    assert values.inputs["x"].dtype == np.int64


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", r"a\.txt: examples are read from \.jsonl and \.csv"),
        ("a.jsonl", "", "contains no examples"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}', "line 2: no `label`"),
        ("a.jsonl", "\n{}", "line 2: no `text`, no `label`"),
        ("a.jsonl", "{", r"line 1: not JSON \(Expecting"),
        ("a.jsonl", b'{"text": "\xff", "label": 1}', r"line 1: not JSON \('utf-8' codec can't decode"),
        ("a.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", "[1]", "line 1: not an object"),
        ("a.jsonl", '{"text": " ", "label": 1}', "line 1: `text` is ' '"),
        ("a.jsonl", '{"text": 3, "label": 1}', "line 1: `text` is 3"),
        ("a.jsonl", r'{"text": "\ud800", "label": 1}', "line 1: `text` contains half a surrogate pair"),
        ("a.jsonl", '{"text": "a", "label": 0.5}', r"line 1: `label` is 0\.5; it must be a string or an integer"),
        ("a.jsonl", '{"text": "a", "label": true}', "line 1: `label` is True"),
        ("a.jsonl", '{"text": "a", "label": ""}', "line 1: `label` is ''"),
        ("a.jsonl", '{"text": "a", "label": "1"}\n{"text": "a", "label": 1}', "some labels are strings and some"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 1}', "all 2 examples have the same label"),
        ("a.jsonl", "{}\n" * 7, r"line 5: .*\n  and 2 more"),
        ("a.csv", "", "the first line must name `text` and `label` once each"),
        ("a.csv", "text,label,text\n", "once each, not text, label, text"),
        ("a.csv", "text,label\na,x\nb\n", "line 3: 1 fields, the header has 2"),
        ("a.csv", "text,label\na,x\nb,\n", "line 3: `label` is ''"),
        ("a.csv", 'text,label\na,x\n"b"c,y\n', r"line 3: ',' expected after"),
        ("a.csv", b"text,label\na,\xff\n", r"is not UTF-8: byte 13"),
        ("a.npz", "text", "is not an .npz file of plain arrays"),
    ],
)
def test_bad_examples_are_refused_with_their_line(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(InputRefused, match=message):
        read_examples(written(tmp_path / name, content))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.ones(2)}, "has no `labels` beside x"),
        ({"labels": np.arange(2)}, "contains labels alone"),
        ({"x": np.ones(3), "labels": np.arange(2)}, r"`x` has the shape \(3,\), and there are 2 labels"),
        ({"x": np.ones(0), "labels": np.arange(0)}, "contains no examples"),
        ({"x": np.ones(2), "labels": np.array(1)}, r"`labels` has the shape \(\), and there are 0 labels"),
        (
            {"x": np.array([0, np.inf]), "labels": np.arange(2)},
            "`x` contains 1 values that are not finite, .* in row 1",
        ),
        ({"x": np.ones(2), "labels": np.array([np.nan, 1])}, "`labels` contains 1 values that are not finite"),
        ({"x": np.ones(2), "labels": np.array(["a", "b"])}, "`labels` contains <U1, not numbers"),
        ({"x": np.ones(3), "labels": np.array([-100, -3, 1])}, "`labels` contain -3; classes are counted from 0"),
        (
            {"x": np.ones(2), "labels": np.array([{}, {}])},
            "Object arrays cannot be loaded|no .npz file of plain arrays",
        ),
    ],
)
def test_bad_arrays_are_refused_by_name(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        read_examples(saved(tmp_path / "a.npz", **arrays))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv", "a.npz"):
        with pytest.raises(InputRefused, match=rf"{name}.*: No such file"):
            read_examples(tmp_path / name)


# --- Splitting ---


def some_examples(counts: dict[int, int]) -> Examples:
    labels = np.concatenate([np.full(count, label, np.int64) for label, count in counts.items()])
    texts = tuple(f"text {number}" for number in range(len(labels)))
    return Examples(labels, classes=("a", "b", "c"), texts=texts)


def test_a_split_holds_out_the_same_part_of_each_class() -> None:
    examples = some_examples({0: 10, 1: 20, 2: 1})
    for seed in range(5):
        trained_on, held_out = split(examples, 0.2, seed=seed)
        assert np.bincount(held_out.labels, minlength=3).tolist() == [2, 4, 0]
        assert np.bincount(trained_on.labels, minlength=3).tolist() == [8, 16, 1]
    assert sorted(trained_on.texts + held_out.texts) == sorted(examples.texts)
    label_of = dict(zip(examples.texts, examples.labels, strict=True))
    assert [label_of[text] for text in held_out.texts] == held_out.labels.tolist()
    assert held_out.classes == ("a", "b", "c")


def test_a_split_leaves_an_example_of_every_class_to_train_on() -> None:
    trained_on, held_out = split(some_examples({0: 10, 1: 2, 2: 1}), 0.9, seed=0)
    assert np.bincount(trained_on.labels).tolist() == [1, 1, 1]
    assert np.bincount(held_out.labels, minlength=3).tolist() == [9, 1, 0]


def test_a_split_repeats_by_seed() -> None:
    examples = some_examples({0: 30, 1: 30})
    assert split(examples, 0.2, seed=1)[1].texts == split(examples, 0.2, seed=1)[1].texts
    assert split(examples, 0.2, seed=1)[1].texts != split(examples, 0.2, seed=2)[1].texts


def test_values_to_predict_are_split_too() -> None:
    examples = Examples(np.arange(10, dtype=np.float32), inputs={"x": np.arange(10)})
    trained_on, held_out = split(examples, 0.3, seed=0)
    assert (len(trained_on), len(held_out)) == (7, 3)
    assert held_out.inputs["x"].tolist() == held_out.labels.tolist()


@pytest.mark.parametrize(
    ("holdout", "message"), [(0.0, "between 0 and 1"), (1.0, "between 0 and 1"), (0.01, "too few")]
)
def test_a_holdout_that_leaves_nothing_is_refused(holdout: float, message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        split(some_examples({0: 5, 1: 5}), holdout, seed=0)
