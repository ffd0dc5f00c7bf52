"""Adapters as arguments: a path, a name or an object in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lora_export as le
from lora_export.api import load
from lora_export.errors import InputRefused, WrongUsage
from lora_export.options.reading import ReadOptions
from support.api import MODEL, an_adapter


@pytest.mark.parametrize(
    ("argument", "name", "path"),
    [
        ("fr=./adapters/fr", "fr", "adapters/fr"),
        ("adapters/fr", None, "adapters/fr"),
        ("./a=b/fr", None, "a=b/fr"),
        ("fr=a=b", "fr", "a=b"),
    ],
)
def test_a_name_is_split_from_a_path(argument: str, name: str | None, path: str) -> None:
    assert load.split_name(argument) == (name, Path(path))


def test_an_argument_that_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fr=old").mkdir()
    assert load.split_name("fr=old") == (None, Path("fr=old"))
    assert load.split_name("fr=new") == ("fr", Path("new"))


def test_adapters_are_loaded_in_order_by_path_name_or_value(tmp_path: Path) -> None:
    path = an_adapter(tmp_path / "en")
    ready = le.load_adapter(path, name="ready")
    loaded = load.load_adapters([f"fr={path}", ready, path])
    assert [adapter.name for adapter in loaded] == ["fr", "ready", "en"] and loaded[1] is ready
    assert [adapter.name for adapter in load.load_adapters(ready)] == ["ready"]
    assert load.adapter_paths([f"fr={path}", ready, path]) == [path, path]
    with pytest.raises(InputRefused, match="none"):
        load.load_adapters(tmp_path / "none")


def test_weights_need_adapters(tmp_path: Path) -> None:
    load.refuse_weights_alone((), ())
    load.refuse_weights_alone("fr", (2.0,))
    out = tmp_path / "out"
    functions: list[Any] = [
        lambda: le.export_onnx(MODEL, out.with_suffix(".onnx"), weights=[2.0]),
        lambda: le.export_onnx(MODEL, out.with_suffix(".onnx"), weights=[2.0], lora="inputs", target="dense"),
        lambda: le.export_torchscript(MODEL, out.with_suffix(".pt"), weights=[2.0]),
        lambda: le.verify(out, MODEL, weights=[2.0]),
    ]
    for function in functions:
        with pytest.raises(
            WrongUsage, match=r"weights= is a factor on an adapter, and there is no adapter \(adapters="
        ):
            function()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("reading", "why"),
    [
        ({"moe_b_layout": "rank_major"}, "moe_b_layout= is for experts in one parameter, and no adapter here has them"),
        ({"enable_lora": {"fc": (True, False)}}, "enable_lora= is for adapters of loralib, and none here is one"),
    ],
)
def test_statements_about_other_kinds_of_adapters_are_notes(tmp_path: Path, reading: dict[str, Any], why: str) -> None:
    """They may be defaults of all commands."""
    path, stated = an_adapter(tmp_path / "adapter"), ReadOptions(**reading)
    notes = le.load_adapter(path).notes
    first, second = load.load_adapters([path, path], reading=stated)
    assert (first.notes, second.notes) == ((*notes, why), notes)
    inspected = le.inspect(path, reading=stated).adapter
    assert inspected is not None and inspected.notes == first.notes
    assert load.load_adapters([], reading=stated) == []
