"""Arguments that several functions share: adapters and models, as a path, a name or an object in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import lora_export as le
from lora_export.api import load
from lora_export.errors import InputRefused, WrongUsage
from support import FACTORIES
from support.api import MODEL, an_adapter
from support.small_layers import a_model
from support.small_models import small_model

if TYPE_CHECKING:
    from support.stores import Stored


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


def test_a_model_is_resolved_from_a_factory_a_module_or_itself() -> None:
    from_factory = load.resolve_model(MODEL)
    assert from_factory.source == MODEL and load.resolve_model(from_factory) is from_factory
    module = a_model()
    of_module = load.resolve_model((module, torch.ones(2, 3)))
    assert type(of_module.module) is type(module) and torch.equal(of_module.module[0].weight, module[0].weight)
    half = load.resolve_model(MODEL, dtype="float16")
    assert {parameter.dtype for parameter in half.module.parameters()} == {torch.float16}
    with pytest.raises(InputRefused, match="a model in memory is used in its own precision, not in float16"):
        load.resolve_model((module, torch.ones(2, 3)), dtype="float16")


def test_the_paths_of_a_model_are_those_that_exist(tmp_path: Path) -> None:
    assert load.model_paths(MODEL) == [FACTORIES]
    assert load.model_paths(tmp_path) == [tmp_path]
    assert load.model_paths("package.module:factory") == load.model_paths((a_model(), torch.ones(2, 3))) == []


@pytest.mark.parametrize("model", ["m.pt2", Path("m.pt2")])
def test_a_program_is_no_model_to_export(model: str | Path) -> None:
    with pytest.raises(InputRefused, match=r"m\.pt2 is an exported program already"):
        load.refuse_pt2(model)
    load.refuse_pt2("base")


def test_inputs_of_a_model_may_be_in_a_store(tmp_path: Path, stored: Stored) -> None:
    np.savez(tmp_path / "x.npz", input_ids=np.full((2, 5), 3))
    stored.put("x.npz", (tmp_path / "x.npz").read_bytes())
    folder = small_model("bert", tmp_path / "base")
    on_disk, in_store = (
        load.resolve_model(folder, inputs=inputs, export=True) for inputs in (tmp_path / "x.npz", str(stored / "x.npz"))
    )
    assert in_store.input_names == on_disk.input_names
