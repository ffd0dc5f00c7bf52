"""Adapters in checkpoints of torch.distributed.checkpoint, which torch itself saved."""

from __future__ import annotations

import pathlib
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

import lora_export as le
from lora_export import formats
from lora_export.errors import InputRefused
from lora_export.options.reading import ReadOptions
from support.distributed import config, lora_state, read_metadata, save_in_shards, save_whole
from support.handmade import Payload

ALLOWED = ReadOptions(allow_pickle=True)
OUTER = ("", "model.", "app.model.")
A, B = "base_model.model.fc.lora_A.default.weight", "base_model.model.fc.lora_B.default.weight"


def save_by_python_3_13(folder: Path, state: dict[str, Any]) -> Path:
    """There, the class of paths has the name of a module that no other version has."""
    name = "pathlib._local"
    with mock.patch.dict(sys.modules, {name: pathlib}), mock.patch.object(pathlib.PosixPath, "__module__", name):
        save_whole(folder, state)
    assert name.encode() in (folder / ".metadata").read_bytes()
    return folder


@pytest.mark.parametrize("save", [save_whole, save_in_shards, save_by_python_3_13])
@pytest.mark.parametrize("outer", OUTER)
def test_the_shards_are_one_adapter(tmp_path: Path, save: Callable[..., Path], outer: str):
    state = lora_state(outer)
    adapter = formats.load(save(config(tmp_path / "shards"), state), options=ALLOWED)
    a, b = state[f"{outer}{A}"].numpy(), state[f"{outer}{B}"].numpy()
    assert list(adapter.pairs) == ["fc"] and not adapter.replaced and adapter.format == "dcp"
    np.testing.assert_array_equal(adapter.pairs["fc"].delta(), 3 * b @ a)


def test_peft_loads_what_is_converted(tmp_path: Path):
    state = lora_state("model.")
    save_in_shards(config(tmp_path / "run") / "pytorch_model_fsdp_0", state)  # the config is in the folder around it
    result = le.convert(tmp_path / "run/pytorch_model_fsdp_0", tmp_path / "out", to="peft", reading=ALLOWED)
    base = nn.ModuleDict({"fc": nn.Linear(6, 4, bias=False)})
    before = base["fc"].weight.detach().clone()
    theirs = peft.PeftModel.from_pretrained(base, result.output).merge_and_unload()["fc"].weight
    change = 3 * state[f"model.{B}"] @ state[f"model.{A}"]
    torch.testing.assert_close(theirs, before + change)
    assert load_file(tmp_path / "out/adapter_model.safetensors").keys() == {
        key.replace(".default", "") for key in (A, B)
    }


def test_nested_states_and_heads_are_read_and_the_rank_may_be_stated(tmp_path: Path):
    inner = {name.removeprefix("model."): value for name, value in lora_state("model.").items() if "optim" not in name}
    head = {"base_model.model.head.modules_to_save.default.weight": torch.ones(2, 4)}
    head["base_model.model.head.original_module.weight"] = torch.zeros(2, 4)
    path = save_whole(tmp_path / "one", {"model": {**inner, **head}, "optim": {"steps": [1, 2]}, "epoch": 3})
    with pytest.raises(InputRefused, match="State both as in training: lora_rank="):
        formats.load(path, options=ALLOWED)
    config(path, modules_to_save=["head"])
    adapter = formats.load(path, options=ALLOWED)
    assert adapter.replaced["head.weight"].tolist() == [[1] * 4] * 2


def test_bfloat16_and_many_layers_are_read(tmp_path: Path):
    state = {
        f"base_model.model.layers.{layer}.fc.lora_{side}.default.weight": torch.full(shape, layer + 1.0).bfloat16()
        for layer in range(40)
        for side, shape in (("A", (2, 6)), ("B", (4, 2)))
    }
    adapter = formats.load(save_in_shards(config(tmp_path / "shards"), state), options=ALLOWED)
    assert len(adapter.pairs) == 40 and adapter.pairs["layers.3.fc"].delta()[0, 0] == 3 * 2 * 16


def test_pickles_are_read_where_the_user_allows_it(tmp_path: Path):
    path = save_whole(config(tmp_path / "one"), lora_state())
    with pytest.raises(InputRefused, match=r"has pickles, which can run code when they are opened\. allow_pickle=True"):
        formats.load(path)


# --- Damage and attacks ---


def replaced_metadata(folder: Path, change: Callable[[Any], Any]) -> None:
    found = read_metadata(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(change(found) or found))


def outside(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = f"../{info.relative_path}"


def larger(metadata: Any) -> None:
    for one in metadata.state_dict_metadata.values():
        one.size = torch.Size([1 << 20, 1 << 20])
        one.chunks[0].sizes = one.size


def hole(metadata: Any) -> None:
    for one in metadata.state_dict_metadata.values():
        one.chunks.clear()


def same_place(metadata: Any) -> None:
    """Two chunks in one half of each tensor, as many elements as it has."""
    for name, one in metadata.state_dict_metadata.items():
        half = torch.Size([one.size[0] // 2, one.size[1]])
        for columns in (0, 1):
            index = MetadataIndex(name, torch.Size([0, columns]))
            metadata.storage_data[index] = metadata.storage_data[MetadataIndex(name, torch.Size([0, 0]))]
        one.chunks = [ChunkStorageMetadata(torch.Size([0, columns]), half) for columns in (0, 1)]


def packed(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.transform_descriptors = ["stream.zstd"]


def beyond(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.length = 1 << 30


def nested(_: Any) -> Any:
    one: Any = ()
    for _ in range(60):
        one = (one, one)
    return one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: {"a": 1}, r"\.metadata is no metadata of a checkpoint"),
        (lambda metadata: setattr(metadata, "storage_data", {1: 2}), "is no metadata of a checkpoint"),
        (lambda metadata: setattr(metadata, "state_dict_metadata", 3), "is no metadata of a checkpoint"),
        (nested, "uses tuples again and again"),
        (outside, r"there is no file \.\./__0_0\.distcp in the folder"),
        (larger, "its tensors have 8,796,093,022,208 bytes, and their shards"),
        (hole, "its shards do not have each of its elements once"),
        (same_place, "its shards do not have each of its elements once"),
        (packed, r"it is packed \(stream\.zstd\)"),
        (beyond, r"__0_0\.distcp ends before it"),
        (lambda metadata: metadata.state_dict_metadata.clear(), "has no tensor of an adapter of PEFT"),
    ],
)
def test_metadata_that_are_wrong_are_refused(tmp_path: Path, change: Callable[[Any], Any], message: str):
    path = save_whole(config(tmp_path / "one"), lora_state())
    (tmp_path / "__0_0.distcp").write_bytes((path / "__0_0.distcp").read_bytes())
    replaced_metadata(path, change)
    with pytest.raises(InputRefused, match=message):
        formats.load(path, options=ALLOWED)


@pytest.mark.parametrize("place", [".metadata", "__0_0.distcp"])
def test_no_code_of_a_checkpoint_runs(tmp_path: Path, place: str):
    path, proof = save_whole(config(tmp_path / "one"), lora_state()), tmp_path / "proof"
    if place == ".metadata":
        replaced_metadata(path, lambda _: Payload(proof))
        message = "it names .*open, which no checkpoint needs"
    else:
        torch.save(Payload(proof), tmp_path / "evil")
        content = (tmp_path / "evil").read_bytes()
        (path / place).write_bytes(content + b" " * 4000)

        def redirected(metadata: Any) -> None:
            for info in metadata.storage_data.values():
                info.offset, info.length = 0, len(content)

        replaced_metadata(path, redirected)
        message = "it names .*open"
    with pytest.raises(InputRefused, match=message):
        formats.load(path, options=ALLOWED)
    assert not proof.exists()


def test_a_damaged_shard_is_refused(tmp_path: Path):
    path = save_whole(config(tmp_path / "one"), lora_state())
    content = bytearray((path / "__0_0.distcp").read_bytes())
    content[100:2000] = bytes(1900)
    (path / "__0_0.distcp").write_bytes(content)
    with pytest.raises(InputRefused, match=r"one is (refused|damaged)"):
        formats.load(path, options=ALLOWED)


@pytest.mark.parametrize("inner", ["", "global_step10"])
def test_shards_of_deepspeed_are_refused_with_the_command_that_gathers_them(tmp_path: Path, inner: str):
    folder = tmp_path / "checkpoint-10/global_step10"
    folder.mkdir(parents=True)
    for name in ("zero_pp_rank_0_mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (folder / name).write_bytes(b"pickle")
    with pytest.raises(InputRefused) as refused:
        formats.load(folder.parent / inner)
    gathered = f"python {folder.parent / 'zero_to_fp32.py'} {folder.parent} OUT"
    assert "shards of DeepSpeed's ZeRO" in str(refused.value) and gathered in str(refused.value)
