"""What rows are for, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.training.records.opening import open_records
from lora_export.training.records.rows import Records
from lora_export.training.row_forms import FORMS, LabelKind, RowForm, Survey, form_of, label_value, survey
from support.sounds import write_sound


def jsonl(folder: Path, *rows: dict[str, Any]) -> Records:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_records(folder / "a.jsonl")


def surveyed(folder: Path, *rows: dict[str, Any]) -> Survey:
    records = jsonl(folder, *rows)
    return survey(records, form_of(records))


def labelled(folder: Path, *labels: Any) -> Survey:
    return surveyed(folder, *({"text": "a", "label": label} for label in labels))


def csv(folder: Path, *labels: str) -> Survey:
    (folder / "a.csv").write_text("text,label\n" + "".join(f"a,{label}\n" for label in labels))
    return survey(open_records(folder / "a.csv"), RowForm.LABELLED)


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
GOOD = {
    RowForm.CHAT: {"messages": [USER, ASSISTANT]},
    RowForm.COMPLETION: {"prompt": "a", "completion": "b"},
    RowForm.TAGS: {"tokens": ["a", "b"], "tags": ["x", "y"]},
    RowForm.SIMILARITY: {"sentence1": "a", "sentence2": "b", "score": -1},
    RowForm.IMAGE: {"image": "a.jsonl", "label": ["x", "y"]},
    RowForm.SPEECH: {"audio": "a.wav", "text": "a"},
    RowForm.LABELLED: {"text": "a", "label": 0.5, "other": 1},
    RowForm.TEXT: {"text": "a", "tags": []},
}


@pytest.mark.parametrize("form", list(RowForm))
def test_columns_decide_the_form(form: RowForm, tmp_path: Path) -> None:
    records = jsonl(tmp_path, GOOD[form])
    write_sound(tmp_path / "a.wav")
    assert form_of(records) is form
    assert survey(records, form).count == 1
    assert set(FORMS) == set(GOOD)


def test_a_wanted_form_comes_first_and_needs_its_columns(tmp_path: Path) -> None:
    assert form_of(jsonl(tmp_path, GOOD[RowForm.LABELLED]), RowForm.TEXT) is RowForm.TEXT
    with pytest.raises(
        InputRefused, match=r"line 1 has the columns label, other, text. Needed are:\n  tags: tokens, tags\n"
    ):
        form_of(jsonl(tmp_path, GOOD[RowForm.LABELLED]), RowForm.TAGS)
    with pytest.raises(InputRefused, match=r'has the columns body(.|\n)*columns=\{"text": "body"\}$') as refused:
        form_of(jsonl(tmp_path, {"body": "a"}))
    assert len(str(refused.value).splitlines()) == len(FORMS) + 2


def test_labels_of_one_class_each_are_sorted_and_numbered(tmp_path: Path) -> None:
    found = labelled(tmp_path, "pear", "apple", "pear")
    assert (found.kind, found.classes, found.groups.tolist()) == (LabelKind.CLASS, ("apple", "pear"), [1, 0, 1])
    assert found.groups.dtype == np.int64
    assert str(found) == "3 examples of 2 classes (classification)"
    numbers = labelled(tmp_path, 10, 9, -1, 10)
    assert (numbers.class_names, numbers.groups.tolist()) == (("-1", "9", "10"), [2, 1, 0, 2])


def test_lists_are_several_classes_and_floats_are_values(tmp_path: Path) -> None:
    several = labelled(tmp_path, ["b", "a"], [], ["c"])
    assert (several.kind, several.classes, several.groups.tolist()) == (LabelKind.CLASSES, ("a", "b", "c"), [0, 0, 0])
    values = labelled(tmp_path, 0.5, 2)
    assert (values.kind, values.classes) == (LabelKind.VALUE, ())
    tags = surveyed(tmp_path, GOOD[RowForm.TAGS], {"tokens": ["c"], "tags": ["w"]})
    assert (tags.kind, tags.classes) == (LabelKind.CLASS, ("w", "x", "y"))


def test_strings_of_a_csv_may_be_numbers(tmp_path: Path) -> None:
    integers = csv(tmp_path, "10", "9")
    assert (integers.classes, integers.groups.tolist()) == ((9, 10), [1, 0])
    assert label_value("10", integers.classes) == 10 and label_value("10", ("10",)) == "10"
    assert csv(tmp_path, "1", "01").classes == ("01", "1")  # a name
    assert csv(tmp_path, "1", "0.5").kind is csv(tmp_path, "-1e-05", "0.5").kind is LabelKind.VALUE
    assert str(csv(tmp_path, "1", "0.5")) == "2 examples (classification, a value each)"
    assert csv(tmp_path, "a", "0.5").classes == ("0.5", "a")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": 1}, {"text": "b"}], r"a\.jsonl:\n  line 2: no `label`"),
        ([{"text": "a", "label": 1}, {"label": 1}], "line 2: no `text`"),
        ([{"text": " ", "label": 1}], "line 1: `text` is ' '"),
        ([{"text": 3, "label": 1}], "line 1: `text` is 3; it must be a text that is not empty"),
        ([{"text": "\ud800", "label": 1}], "line 1: `text` contains half a surrogate pair"),
        ([{"text": "a", "text_pair": "", "label": 1}], "line 1: `text_pair` is ''"),
        ([{"text": "a", "label": True}], "line 1: `label` is True"),
        ([{"text": "a", "label": ""}], "line 1: `label` is ''"),
        ([{"text": "a", "label": [0.5]}], r"line 1: `label` is \[0\.5\]; a list of labels"),
        ([{"text": "a", "label": float("nan")}], "line 1: `label` is nan"),
        ([{"text": "a", "label": "1"}, {"text": "a", "label": 1}], r"some are numbers \(line 1 and line 2\)"),
        ([{"text": "a", "label": ["1"]}, {"text": "a", "label": "1"}], r"some are not \(line 1 and line 2\)"),
        ([{"text": "a", "label": []}], "no example has a label"),
        ([{"text": "a", "label": 1}] * 2, "all 2 examples have the same label"),
        ([{"text": "a", "label": 1}], "there is only one example"),
        ([{"text": "a", "label": 1}, *[{"text": "a"}] * 7], r"line 6: no `label`\n  and 2 more"),
        ([{"tokens": "ab", "tags": ["x"]}], "line 1: `tokens` is 'ab'; it must be a list of words"),
        ([{"tokens": ["a"], "tags": [None]}], r"line 1: `tags` is \[None\]"),
        ([{"tokens": ["a"], "tags": ["x", "y"]}], "line 1: 1 tokens and 2 tags"),
        ([{"sentence1": "a", "sentence2": "b", "score": 4.5}], "line 1: `score` is 4.5; a cosine is from -1 to 1"),
        ([{"sentence1": "a", "sentence2": "b", "score": "x"}], "line 1: `score` is 'x'"),
        ([{"sentence1": "a", "sentence2": "b", "score": 10**400}], "line 1: `score` is 1000"),
        ([{"text": "a", "label": 10**400}, {"text": "b", "label": 0.5}], "line 1: `label` is 1000"),
        ([{"text": "a", "label": {"a": ["b"]}}], r"line 1: `label` is \{'a': \['b'\]\}; it must be a string"),
        ([{"text": "a", "label": [["b"]]}], r"line 1: `label` is \[\['b'\]\]; a list of labels contains"),
        ([{"text": "a", "label": [1 << 63]}], r"line 1: `label` is \[9223372036854775808\]; a list of labels"),
        ([{"prompt": "a", "completion": ""}], "line 1: `completion` is ''"),
        ([{"messages": "hello"}], "line 1: `messages` is 'hello'"),
        ([{"messages": [{"role": "robot", "content": "a"}]}], "line 1: message 1 has no `role` of assistant, system"),
        ([{"messages": [{"role": ["user"], "content": "a"}]}], "line 1: message 1 has no `role` of assistant, system"),
        ([{"messages": [USER, {"role": "assistant", "content": None}]}], "message 2 has no text in `content`"),
        (
            [{"messages": [USER], "tools": '[{"name": "a"]'}],
            "line 1: `tools` is .*; it must be a list of descriptions",
        ),
        ([{"messages": [USER, {"role": "assistant", "content": "\ud800"}]}], "`content` contains half a surrogate"),
        ([{"tokens": ["\udfff"], "tags": ["x"]}], "`tokens` contains half a surrogate"),
        ([{"messages": [USER]}], "line 1: no message of the assistant"),
        ([{"image": "none.png", "label": "x"}], r"line 1: there is no file .*none\.png"),
        ([{"image": 3, "label": "x"}], "line 1: `image` is 3; it must be the path of an image"),
    ],
)
def test_bad_rows_are_refused_with_their_line(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=message):
        surveyed(tmp_path, *rows)


def test_a_line_that_is_no_json_is_one_of_the_bad_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{\n{"text": ""}\n')
    with pytest.raises(InputRefused, match=r"a\.jsonl:\n  line 2: not JSON .*\n  line 3: `text` is"):
        survey(open_records(tmp_path / "a.jsonl"), RowForm.TEXT)
