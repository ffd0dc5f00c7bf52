"""Adapter formats: what recognises an adapter, and what a new format needs."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_export
from lora_export import formats
from lora_export.errors import InputRefused
from lora_export.lora import Adapter, LoraPair
from lora_export.options.reading import ReadOptions
from support import ROOT
from support.diffusion import adapter_file, random_pairs
from support.peft_folders import refusal, simple


@pytest.fixture
def text_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second format: a folder with a file `adapter.txt`."""
    module = ModuleType("a_text_format")
    module.DESCRIPTION = "a folder with adapter.txt"
    module.recognises = lambda path: (path / "adapter.txt").exists()
    pair = LoraPair(a=np.ones((1, 2)), b=np.ones((3, 1)), scale=2)
    module.read = lambda path, name, _options: Adapter(name, "text", {"fc": pair})
    known = {**formats.known_formats(), "text": module}
    monkeypatch.setattr(formats, "known_formats", lambda: known)


def test_an_unknown_adapter_is_refused_with_the_known_formats(tmp_path):
    assert refusal(tmp_path / "none") == "there is no adapter at ADAPTER"
    first, *known = refusal(tmp_path).splitlines()
    assert first == "ADAPTER is not an adapter in a known format:"
    assert [line.strip().partition(":")[0] for line in known] == list(formats.known_formats())
    description = "a folder with adapter_config.json and adapter_model.safetensors"
    assert refusal(tmp_path, format="peft") == f"ADAPTER is not in the format peft: {description}"
    (tmp_path / "file").touch()
    assert not formats.recognised(tmp_path / "file")


def test_a_folder_of_pefts_files_is_in_one_format(tmp_path):
    for name in ("README.md", "tokenizer.json", "chat_template.jinja"):
        (simple(tmp_path) / name).touch()
    assert list(formats.possible_formats(tmp_path)) == ["peft"]
    assert [name for name, one in formats.known_formats().items() if one.recognises(tmp_path)] == ["peft"]


@pytest.mark.parametrize("beside", ["0.distcp", "other.safetensors", "adapters.npz", "lora.yaml"])
def test_all_formats_are_asked_where_other_files_are_beside_pefts(tmp_path, beside):
    (simple(tmp_path) / beside).touch()
    assert formats.possible_formats(tmp_path) == formats.known_formats()


@pytest.mark.usefixtures("text_format")
def test_an_adapter_is_read_in_the_format_that_recognises_it(tmp_path):
    assert not formats.recognised(tmp_path)
    assert refusal(tmp_path).endswith("\n  text: a folder with adapter.txt")
    (tmp_path / "adapter.txt").touch()
    assert formats.recognised(tmp_path)
    adapter = formats.load(tmp_path, name="mine")
    assert (adapter.format, adapter.name, adapter.pairs["fc"].scale) == ("text", "mine", 2)


@pytest.mark.usefixtures("text_format")
def test_an_adapter_in_several_formats_needs_a_choice(tmp_path):
    (simple(tmp_path) / "adapter.txt").touch()
    assert refusal(tmp_path) == 'ADAPTER may be in several formats: peft, text. Choose one: format="peft"'
    assert [formats.load(tmp_path, options=ReadOptions(format=name)).format for name in ("peft", "text")] == [
        "peft",
        "text",
    ]


def test_a_format_can_be_chosen(tmp_path):
    assert formats.load(simple(tmp_path), options=ReadOptions(format="peft")).format == "peft"
    assert (
        refusal(tmp_path, format="tarot")
        == f"unknown adapter format 'tarot'; known: {', '.join(formats.known_formats())}"
    )


def test_an_adapter_has_the_name_of_its_folder_by_default(tmp_path):
    simple(tmp_path / "mine")
    (tmp_path / "link").symlink_to("mine")
    one, two = formats.load(tmp_path / "link"), formats.load(tmp_path / "mine", name="other")
    assert (one.name, two.name) == ("mine", "other")
    assert formats.load(tmp_path / "mine" / "adapter_model.safetensors").name == "mine"


def test_an_adapter_in_a_folder_inside_is_read_and_named(tmp_path):
    """PEFT saves an adapter that has a name into a folder of this name."""
    inside = simple(tmp_path / "mine" / "first")
    (inside / "config.json").write_text('{"id2label": {"0": "no"}}')
    (tmp_path / "mine" / "logs").mkdir()
    adapter = formats.load(tmp_path / "mine")
    assert (adapter.name, adapter.sha256) == ("mine", formats.load(inside).sha256)
    assert adapter.notes == (f"{tmp_path / 'mine'}: the adapter is in its folder first.",)
    assert lora_export.inspect(tmp_path / "mine").path == inside
    lora_export.convert(tmp_path / "mine", tmp_path / "out", to="peft")
    assert (tmp_path / "out/config.json").read_bytes() == (inside / "config.json").read_bytes()
    simple(tmp_path / "mine" / "second")
    assert refusal(tmp_path / "mine") == (
        "ADAPTER is no adapter, and has 2 of them inside: first, second. Name one of these"
    )
    save_file({"fc.weight": np.ones((2, 2))}, tmp_path / "mine" / "model.safetensors")
    assert refusal(tmp_path / "mine").startswith("ADAPTER is not an adapter in a known format:")  # it is a model


@pytest.mark.parametrize("name", formats.known_formats())
def test_every_format_has_a_description_and_a_test_file(name):
    module = formats.known_formats()[name]
    assert module.DESCRIPTION.startswith("a ") and not module.recognises(Path("/nowhere"))
    assert (ROOT / f"tests/formats/test_{name}.py").exists()


def test_a_module_is_all_that_a_format_needs():
    """The modules of the folder are the table: there is no second place to add one to."""
    image_models, language_models = {"kohya", "comfyui", "diffusers"}, {"peft", "mlx", "loralib", "litgpt", "torchtune"}
    assert {*formats.known_formats()} >= image_models | language_models
    assert not {"lora_file", "onnx_adapter", "gguf_architecture", "writing"} & {*formats.known_formats()}


@pytest.mark.parametrize(
    ("prefix", "flattened", "format", "foreign"),
    [
        ("lora_unet_", True, "kohya", "lora_prior_a.alpha"),
        ("lora_unet_", True, "kohya", "unet.a.lora_A.weight"),
        ("diffusion_model.", False, "comfyui", "lora_unet_a.lora_down.weight"),
        ("unet.", False, "diffusers", "lora_unet_a.alpha"),
    ],
)
def test_a_key_of_another_format_is_named(prefix, flattened, format, foreign, tmp_path):
    path = adapter_file(tmp_path / "a.safetensors", random_pairs({"a.b": (4, 4)}), prefix=prefix, flattened=flattened)
    save_file({**load_file(path), foreign: np.ones((2, 4), np.float32)}, path)
    message = rf"is in the format {format}, but for 1 of its keys:\s+{re.escape(foreign)}"
    for options in (ReadOptions(), ReadOptions(format=format)):
        with pytest.raises(InputRefused, match=message):
            formats.load(path, options=options)


def test_a_file_of_no_format_has_no_foreign_keys(tmp_path):
    save_file({"lora_prior_a.lora_down.weight": np.ones((2, 4), np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(InputRefused, match="is not an adapter in a known format"):
        formats.load(tmp_path / "a.safetensors")
