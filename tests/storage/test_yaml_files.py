"""YAML of trainers: plain tables are read, and nothing else is made of a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_export.errors import InputRefused
from lora_export.storage.yaml_files import MAX_YAML, read_yaml


def test_a_table_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("lora_r: 8\nlora_query: true\ndata:\n  class_path: x\n")
    assert read_yaml(tmp_path / "a.yaml") == {"lora_r": 8, "lora_query": True, "data": {"class_path": "x"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("- a", "is not a table of settings"),
        ("1: a", "is not a table of settings"),
        ("a: " + "[" * 100_000, "is not YAML"),
        ("a: 2001-99-99", "is not YAML"),
        ("a: !!python/object/apply:os.system ['touch ran']", "is not YAML"),
        ("a" * (MAX_YAML + 1), "has more than 1,000,000 bytes"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputRefused, match=message):
        read_yaml(tmp_path / "a.yaml")
    assert not (tmp_path / "ran").exists()


def test_parts_that_are_shared_take_no_memory(tmp_path: Path) -> None:
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    (tmp_path / "a.yaml").write_text("a0: &a0 [x]\n" + "\n".join(levels))
    assert len(read_yaml(tmp_path / "a.yaml")) == 30
