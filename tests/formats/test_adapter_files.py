"""The files of an adapter, its keys by module, and pairs with everything that is wrong with them at once."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from lora_export import formats
from lora_export.errors import InputRefused
from lora_export.formats.adapter_files import (
    Tensors,
    TensorSource,
    hash_of_tensors,
    hash_of_unchanged,
    names_in,
    open_tensors,
    read_pairs,
)
from lora_export.lora import LoraPair
from lora_export.options.reading import DEFAULTS, ReadOptions
from lora_export.storage import input_files
from lora_export.storage.hashes import file_hash
from support.handmade import peft_adapter


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """The same tensor in both kinds of files."""
    save_file({"fc.lora_a": np.arange(3, dtype=np.float32)}, tmp_path / "one.safetensors")
    torch.save({"fc.lora_a": torch.arange(3.0)}, tmp_path / "one.pt")
    return tmp_path / "one.safetensors", tmp_path / "one.pt"


def test_a_pickle_is_read_where_it_is_allowed(files: tuple[Path, Path]) -> None:
    stored, pickled = files
    assert open_tensors(stored, DEFAULTS).read("fc.lora_a").tolist() == [0, 1, 2]
    assert open_tensors(pickled, ReadOptions(allow_pickle=True)).read("fc.lora_a").tolist() == [0, 1, 2]
    with pytest.raises(InputRefused, match=r"one\.pt is a pickle, which can run code .* allow_pickle=True reads it"):
        open_tensors(pickled, DEFAULTS)


def test_names_of_both_kinds_are_found(files: tuple[Path, Path]) -> None:
    stored, pickled = files
    assert names_in(stored) == {"fc.lora_a"} <= names_in(pickled)
    stored.write_bytes(b"no tensors")
    assert names_in(stored) == names_in(stored.parent) == names_in(pickled.rename(pickled.with_suffix(".txt"))) == set()


def test_a_pickle_is_read_once_until_it_changes(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened, real = [], input_files.open_regular
    monkeypatch.setattr(input_files, "open_regular", lambda path: opened.append(path) or real(path))
    pickle = files[1]
    assert "fc.lora_a" in names_in(pickle) & names_in(pickle)
    assert opened == [pickle]
    torch.save({"other": torch.ones(1)}, pickle)
    assert "other" in names_in(pickle)


def test_the_hash_is_that_of_the_files_in_order(files: tuple[Path, Path], tmp_path: Path) -> None:
    stored, _ = files
    (tmp_path / "config").write_bytes(b"one")
    file = open_tensors(stored, DEFAULTS)
    own, config = (hashlib.sha256(content).hexdigest() for content in (stored.read_bytes(), b"one"))
    printed = f"{config}  config\n{own}  {stored.name}\n"  # by sha256sum
    assert hash_of_unchanged(file, tmp_path / "config") == hashlib.sha256(printed.encode()).hexdigest()
    assert hash_of_unchanged(file) == hash_of_tensors(file) == own
    stored.write_bytes(b"another file")
    with pytest.raises(InputRefused, match="changed while it was being read"):
        hash_of_unchanged(file)


KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[ABab])")


def source(path: Path, *names: str) -> TensorSource:
    save_file({name: np.ones((1, 1), np.float32) for name in names}, path)
    return open_tensors(path, DEFAULTS)


def one_pair(module: str, tensors: Tensors) -> dict[str, LoraPair]:
    if module == "bad":
        raise InputRefused("is bad")
    return {module.removesuffix("_again"): LoraPair(a=tensors["a"], b=tensors["b"], scale=1.0)}


def test_a_file_that_keeps_size_and_time_is_read_again(tmp_path: Path) -> None:
    folders = [peft_adapter(tmp_path / name, {name: ([[1]], [[1]])}) for name in "xy"]
    path, other = (folder / "adapter_model.safetensors" for folder in folders)
    os.utime(path, ns=(0, 0))
    first = hash_of_unchanged(open_tensors(path, DEFAULTS))
    path.write_bytes(other.read_bytes())
    os.utime(path, ns=(0, 0))
    assert list(formats.load(folders[0]).pairs) == ["y"]
    assert hash_of_unchanged(open_tensors(path, DEFAULTS)) == file_hash(other, "sha256") != first


def test_pairs_have_the_key_of_their_first_tensor(tmp_path: Path) -> None:
    file = source(tmp_path / "f.safetensors", "x.lora_A", "x.lora_b", "x.bias")
    pairs, spelling = read_pairs(file, one_pair, KEY, others=re.compile(r".+\.bias"))
    assert (list(pairs), spelling) == (["x"], {"x": "x.lora_A"})


def test_a_side_under_two_names_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"contains one tensor under two names: x\.lora_. and x\.lora_."):
        read_pairs(source(tmp_path / "f.safetensors", "x.lora_A", "x.lora_a"), one_pair, KEY)
    with pytest.raises(InputRefused, match="contains no tensor"):
        read_pairs(source(tmp_path / "f.safetensors"), one_pair, KEY)


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    names = [f"{module}.lora_{side}" for module in ("bad", "x", "x_again") for side in "AB"]
    file = source(tmp_path / "f.safetensors", *names, "alone.lora_B", "bias")
    with pytest.raises(InputRefused) as refused:
        read_pairs(file, one_pair, KEY)
    assert str(refused.value).splitlines()[1:] == [
        "  alone: A is missing",
        "  bad: is bad",
        "  bias: unknown kind of tensor",
        "  x_again: x.lora_A has the name x too",
    ]


PAIR = ("base_model.model.fc.lora_A.weight", "base_model.model.fc.lora_B.weight")


@pytest.mark.parametrize(
    ("names", "config"),
    [
        (PAIR, {}),
        (
            tuple(f"base_model.model.fc.hada_{factor}_{side}" for factor in ("w1", "w2") for side in "ab"),
            {"peft_type": "LOHA", "r": 1, "alpha": 1},
        ),
        ((*PAIR, "base_model.model.fc.lora_magnitude_vector"), {"use_dora": True}),
        ((*PAIR, "base_model.model.fc.lora_B.bias"), {"lora_bias": True}),
        (("lora_unet_fc.lora_down.weight", "lora_unet_fc.lora_up.weight"), None),
        (("fc.lora_A", "fc.lora_B"), None),
    ],
    ids=["peft", "loha", "dora", "bias", "kohya", "loralib"],
)
def test_integers_are_no_pair(tmp_path: Path, names: tuple[str, ...], config: dict[str, Any] | None) -> None:
    """Of what is quantised, such as uint8 of bitsandbytes, they are the codes."""
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: np.ones((1, 1), np.uint8 if name == names[-1] else np.float32) for name in names}, path)
    if config is not None:
        lora = {} if "peft_type" in config else {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
        (tmp_path / "adapter_config.json").write_text(json.dumps({**lora, **config}))
    stated = {"lora_rank": 1, "lora_alpha": 1.0} if names[0] == "fc.lora_A" else {}
    with pytest.raises(InputRefused, match=rf"{names[-1]} holds integers \(uint8\)\. If it is quantised, save"):
        formats.load(path, options=ReadOptions(**stated))


# --- Modules that PyTorch wraps around others ---

WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize(
    ("format", "key", "module"),
    [
        ("peft", "{w}.base_model.model.layers.0.{w}.fc.lora_{AB}.weight", "layers.0.fc"),
        ("peft", "base_model.model.layers.0.{w}.{w}.fc.lora_{AB}.weight", "layers.0.fc"),
        ("peft", "module.{w}.base_model.model.layers.0.fc.lora_{AB}.weight", "layers.0.fc"),
        ("comfyui", "{w}.diffusion_model.blocks.0.{w}.fc.lora_{AB}.weight", "denoiser/blocks.0.fc"),
        ("diffusers", "unet.blocks.0.{w}.fc.lora_{AB}.weight", "denoiser/blocks.0.fc"),
        ("loralib", "layers.0.{w}.fc.lora_{AB}", "layers.0.fc"),
    ],
)
def test_wrappers_are_no_part_of_a_name(tmp_path: Path, format: str, key: str, module: str, wrapper: str) -> None:
    folder = peft_adapter(tmp_path / "adapter", {"x": ([[1]], [[1]])})
    path = folder / "adapter_model.safetensors"
    names = [key.replace("{w}", wrapper).replace("{AB}", side) for side in "AB"]
    save_file(dict(zip(names, (np.ones((1, 2), np.float32), np.ones((3, 1), np.float32)), strict=True)), path)
    if format != "peft":
        (folder / "adapter_config.json").unlink()
    stated = {"lora_rank": 1, "lora_alpha": 1.0} if format == "loralib" else {}
    adapter = formats.load(path, options=ReadOptions(**stated))
    assert (adapter.format, list(adapter.pairs), adapter.spelled(module)) == (format, [module], names[0])
    plain = {name.replace(f"{wrapper}.", ""): np.ones((1, 1), np.float32) for name in names}
    save_file({**load_file(path), **plain}, path)
    with pytest.raises(InputRefused, match="contains one tensor under two names"):
        formats.load(path, options=ReadOptions(**stated))


def test_a_config_with_wrappers_targets_the_same_modules(tmp_path: Path) -> None:
    def folder(name: str, **config: Any) -> Path:
        return peft_adapter(tmp_path / name, {"m.fc": ([[1, 2]], [[1], [2]])}, **config)

    assert formats.load(folder("a", target_modules=["_orig_mod.m.fc"])).targets == ("m.fc",)
    with pytest.raises(InputRefused, match=r"alpha_pattern\['_orig_mod.fc'\] names _orig_mod, which no module"):
        formats.load(folder("b", alpha_pattern={"_orig_mod.fc": 2}))
