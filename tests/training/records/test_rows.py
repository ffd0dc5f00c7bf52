"""Columns under other names, and sounds that rows name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_export.errors import InputRefused
from lora_export.training.records.opening import DescribedSounds
from lora_export.training.records.rows import JsonLines, file_in, file_problem, sha256_with_files, with_columns
from lora_export.training.row_forms import RowForm, form_of, survey
from support.sounds import write_sound


@pytest.fixture
def rows(tmp_path: Path) -> JsonLines:
    (tmp_path / "a.jsonl").write_text('{"body": "a", "text": "b", "n": 1}\n{"n": 2}\n')
    return JsonLines(tmp_path / "a.jsonl")


def test_a_renamed_column_hides_another_of_its_name(rows: JsonLines) -> None:
    renamed = with_columns(rows, {"text": "body", "label": "n"})
    assert dict(renamed[0]) == {"text": "a", "label": 1}
    assert dict(renamed[1]) == {"label": 2}
    assert (len(renamed), renamed.where(1), renamed.path, renamed.sha256) == (2, "line 2", rows.path, rows.sha256)
    assert with_columns(rows, {}) is rows


def test_an_unknown_column_is_refused_with_the_known_ones(rows: JsonLines) -> None:
    with pytest.raises(InputRefused, match=r"a\.jsonl has no column bodi; it has body, text, n"):
        with_columns(rows, {"text": "bodi"})


def lines(folder: Path, *rows: dict[str, object]) -> JsonLines:
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JsonLines(folder / "data.jsonl")


def test_paths_are_relative_to_the_data(tmp_path: Path) -> None:
    records = lines(tmp_path, {"audio": "a.wav", "text": "one"})
    assert file_in(records, "sub/a.wav") == tmp_path / "sub/a.wav"
    assert file_in(records, {"path": "a.wav", "bytes": None}) == tmp_path / "a.wav"
    assert file_in(records, {"path": "a.wav", "bytes": b"RIFF"}) == b"RIFF"
    assert file_in(records, str(tmp_path / "b.wav")) == tmp_path / "b.wav"
    (tmp_path / "metadata.csv").write_text("file_name,text\nb.wav,two\n")
    assert file_in(DescribedSounds(tmp_path), "b.wav") == tmp_path / "b.wav"
    for wrong in (None, 3, "", {"path": None}):
        with pytest.raises(InputRefused, match=r"`audio` is .*; it must be the path of a"):
            file_in(records, wrong)


def test_every_row_is_checked_with_its_line(tmp_path: Path) -> None:
    write_sound(tmp_path / "a.wav")
    write_sound(tmp_path / "short.wav", seconds=0)
    (tmp_path / "b.mp3").write_bytes(b"ID3")
    good = {"audio": "a.wav", "text": "one"}
    records = lines(tmp_path, good, {**good, "audio": "none.wav"}, {**good, "audio": "b.mp3"}, {**good, "text": " "},
                    {**good, "audio": 7}, {"text": "x"}, {**good, "audio": "short.wav"})  # fmt: skip
    assert form_of(records) is RowForm.SPEECH and file_problem(records, "a.wav") == ""
    with pytest.raises(InputRefused) as caught:
        survey(records, RowForm.SPEECH)
    assert str(caught.value).splitlines()[1:] == [
        f"  line 2: there is no file {tmp_path / 'none.wav'}",
        f"  line 3: {tmp_path / 'b.mp3'} is damaged, or no sound that libsndfile reads. "
        f"ffmpeg -i {tmp_path / 'b.mp3'} sound.flac makes one",
        "  line 4: `text` is ' '; it must be a text that is not empty",
        "  line 5: `audio` is 7; it must be the path of a sound",
        "  line 6: no `audio`",
        "  and 1 more",
    ]
    assert file_problem(records, "short.wav") == "the sound has no samples"
    assert str(survey(lines(tmp_path, good), RowForm.SPEECH)) == "1 example (automatic-speech-recognition)"


def test_the_hash_is_that_of_the_sounds_too(tmp_path: Path) -> None:
    records = lines(tmp_path, {"audio": "a.wav", "text": "one"})
    write_sound(tmp_path / "a.wav")
    before = sha256_with_files(records)
    write_sound(tmp_path / "a.wav", seed=1)
    assert before != sha256_with_files(records) and before != records.sha256
