"""JSON files are read within bounds, and written with the same bytes on every system."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lora_export.errors import InputRefused
from lora_export.storage import json_files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "X is not JSON"),
        (b'{"a": 1,}', "X is not JSON"),
        (b"\xff", "X is not JSON"),
        (b'{"a":' * 100_000, "X is not JSON"),
        (b"3", "X is not a JSON object"),
        (b'{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}', "X names c more than once"),
    ],
)
def test_text_that_is_not_a_json_object_is_refused(text, message):
    with pytest.raises(InputRefused, match=message):
        json_files.parse_json(text, "X")


@pytest.mark.parametrize("value", ["é", "\ud800"])
def test_a_text_from_another_json_is_read_as_its_bytes_are(value):
    """It may have half a pair of surrogates, which JSON can spell and UTF-8 cannot."""
    assert json_files.parse_json(f'{{"a": "{value}"}}', "X") == {"a": value}


@pytest.mark.fault(41)
def test_json_is_read_from_regular_files_only(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"a": [1]}))
    assert json_files.read_json(tmp_path / "a.json") == {"a": [1]}
    os.mkfifo(tmp_path / "fifo")
    refusals: dict[Path, str] = {
        tmp_path / "fifo": "fifo is not a regular file",
        tmp_path: "is not a regular file",
        tmp_path / "none": "none: No such file or directory",
    }
    for path, message in refusals.items():
        with pytest.raises(InputRefused, match=message):
            json_files.read_json(path)


def test_deep_nesting_is_refused():
    def nested(depth: int) -> bytes:
        return b'{"a":' * (depth - 1) + b"{}" + b"}" * (depth - 1)

    assert json_files.parse_json(nested(json_files.MAX_DEPTH), "X")
    with pytest.raises(InputRefused, match="X nests objects and lists more than 100 deep"):
        json_files.parse_json(nested(json_files.MAX_DEPTH + 1), "X")


def test_too_many_objects_are_refused():
    text = b'{"a": [{}, {}]}'
    assert json_files.parse_json(text, "X", most=3)
    with pytest.raises(InputRefused, match="X contains more than 2 objects, which no such file needs"):
        json_files.parse_json(text, "X", most=2)


def test_a_huge_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "MAX_JSON", 8)
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert json_files.read_json(path) == {"a": 1}
    path.write_text('{"a": 12}')
    with pytest.raises(InputRefused, match=r"a\.json has more than 8 bytes, which no such file needs"):
        json_files.read_json(path)


def test_a_models_config_is_checked_where_it_is_used(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"architectures": ["Bert"], "id2label": {"0": "good"}, "anything": [[1]]}')
    assert json_files.read_model_config(path)["architectures"] == ["Bert"]
    path.write_text('{"id2label": {"0": ["good"]}}')
    with pytest.raises(InputRefused, match=r"config\.json: id2label is .*; it must be a table of names"):
        json_files.read_model_config(path)
    path.write_text('{"num_labels": "two"}')
    with pytest.raises(InputRefused, match=r"config\.json: num_labels is 'two'; it must be a number"):
        json_files.read_model_config(path)


def test_what_is_written_has_the_same_bytes_on_every_system(tmp_path):
    json_files.write_json(tmp_path / "a.json", {"b": ["ü"], "a": 1})
    assert (tmp_path / "a.json").read_bytes() == b'{\n  "b": [\n    "\\u00fc"\n  ],\n  "a": 1\n}\n'
    assert json_files.read_json(tmp_path / "a.json") == {"a": 1, "b": ["ü"]}
    json_files.write_json(tmp_path / "a.json", {"b": 2, "a": 1}, sort_keys=True)
    assert list(json_files.read_json(tmp_path / "a.json")) == ["a", "b"]
