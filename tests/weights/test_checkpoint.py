"""Checkpoints on disk: what headers contain, and every reason for which a base is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.plan import Layout, TensorSpec
from lora_export.storage import safetensors_file
from lora_export.weights.checkpoint import custom_code, is_streamable, open_checkpoint
from support.handmade import base_file, raw_tensor_file

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
MAP = {"a.weight": FIRST, "b.weight": SECOND, "b.bias": SECOND}


# Two parts with modules of the same names: nn.Linear in one, Conv1D in the other


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder of two shards."""
    base_file(tmp_path / FIRST, {"a.weight": [[1, 2], [3, 4]]})
    base_file(tmp_path / SECOND, {"b.weight": [[5, 6, 7]], "b.bias": [8]}, ml_dtypes.bfloat16)
    write_json(tmp_path / INDEX, {"metadata": {"total_size": 24}, "weight_map": MAP})
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    return tmp_path


def single(folder: Path, config: Mapping[str, Any] | None = None, **tensors: Any) -> Path:
    base_file(folder / "model.safetensors", {name.replace("__", "."): value for name, value in tensors.items()})
    if config is not None:
        write_json(folder / "config.json", config)
    return folder


def refusal(path: Path) -> str:
    with pytest.raises(InputRefused) as refused:
        open_checkpoint(path)
    return str(refused.value).replace(str(path), "BASE")


# --- What is read ---


def test_shards_have_the_order_of_the_index(sharded):
    base = open_checkpoint(sharded)
    assert (base.is_folder, base.index, list(base.shards)) == (True, INDEX, [FIRST, SECOND])
    assert set(base.specs) == {
        TensorSpec("a.weight", (2, 2), "float32", Layout.MATRIX, FIRST, 16),
        TensorSpec("b.weight", (1, 3), "bfloat16", Layout.MATRIX, SECOND, 6),
        TensorSpec("b.bias", (1,), "bfloat16", Layout.OTHER, SECOND, 2),
    }
    assert base.nbytes == sum((sharded / name).stat().st_size for name in (FIRST, SECOND))


def test_a_folder_of_one_file_and_a_bare_file_are_bases(tmp_path):
    single(tmp_path, {"model_type": "bert"}, fc__weight=[[1]])
    folder, bare = open_checkpoint(tmp_path), open_checkpoint(tmp_path / "model.safetensors")
    assert (folder.index, folder.is_folder, folder.config) == ("", True, {"model_type": "bert"})
    assert (bare.is_folder, bare.config, list(bare.other_files()), bare.unmerged_weights()) == (False, {}, [], [])
    assert [spec.name for spec in folder.specs] == [spec.name for spec in bare.specs] == ["fc.weight"]


def test_a_cache_of_symbolic_links_is_a_base(sharded, tmp_path_factory):
    sharded = sharded.rename(sharded.with_name("blobs"))
    snapshot = tmp_path_factory.mktemp("snapshot")
    for path in sharded.iterdir():
        (snapshot / path.name).symlink_to(path)
    (snapshot / "tokenizer.json").symlink_to(sharded / "config.json")
    base = open_checkpoint(snapshot)
    assert base.specs == open_checkpoint(sharded).specs
    assert [path.as_posix() for path in base.other_files()] == ["config.json", "tokenizer.json"]


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        ({"model_type": "gpt2"}, Layout.IN_OUT),
        ({"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}, Layout.IN_OUT),
        ({"model_type": "gpt_bigcode"}, Layout.MATRIX),  # the same names, nn.Linear
        (None, Layout.UNKNOWN),
        ({}, Layout.UNKNOWN),
        ({"model_type": "jais"}, Layout.UNKNOWN),
        ({"model_type": "vision-encoder-decoder", "decoder": {"model_type": "jais"}}, Layout.UNKNOWN),
        ({"architectures": ["GPT2Model"], "decoder": {"model_type": "gpt2"}}, Layout.UNKNOWN),
        # Of two parts with these names, one is a Conv1D.
        (
            {"model_type": "encoder-decoder", "e": {"model_type": "gpt_neo"}, "d": {"model_type": "gpt2"}},
            Layout.UNKNOWN,
        ),
    ],
)
def test_the_layout_of_matrices_depends_on_the_model_type(tmp_path, config, layout):
    single(
        tmp_path,
        config,
        h__0__c_proj__weight=[[1, 2], [3, 4]],
        h__0__c_proj__bias=[1, 2],
        c_fc__weight=[[[1]]],
        wte__weight=[[1, 2]],
    )
    layouts = {spec.name: spec.layout for spec in open_checkpoint(tmp_path).specs}
    assert layouts == {
        "h.0.c_proj.weight": layout,
        "h.0.c_proj.bias": Layout.OTHER,
        "c_fc.weight": Layout.OUT_IN,  # a convolution of that name
        "wte.weight": Layout.UNKNOWN if _is_unknown(config) else Layout.MATRIX,
    }


def _is_unknown(config: Mapping[str, Any] | None) -> bool:
    """Whether the type of a model, or of one of its parts, is none of transformers'."""
    return "model_type" not in (config or {}) or "jais" in str(config)


def test_the_aliases_of_tied_tensors_are_read(tmp_path):
    metadata = {"head.weight": "emb.weight", "format": "pt", "note": "text", "x.weight": "y.weight", "b": "emb.weight"}
    base_file(tmp_path / "m.safetensors", {"emb.weight": [[1]], "b": [1]}, metadata=metadata)
    aliases = {spec.name: spec.aliases for spec in open_checkpoint(tmp_path / "m.safetensors").specs}
    assert aliases == {"emb.weight": ("head.weight",), "b": ()}


def test_other_files_exclude_weights_and_hidden_files(sharded):
    for name in ("tokenizer.json", "1_Pooling/config.json", "LICENSE", "lora_export.json", ".git/config", ".hidden"):
        (sharded / name).parent.mkdir(exist_ok=True)
        (sharded / name).write_text("{}")
    for name in ("pytorch_model.bin", "onnx/model.onnx", "onnx/model.onnx_data", "tf_model.h5", "sub/x.safetensors"):
        (sharded / name).parent.mkdir(exist_ok=True)
        (sharded / name).touch()
    (sharded / "dangling.json").symlink_to("nowhere")
    base = open_checkpoint(sharded)
    assert [path.as_posix() for path in base.other_files()] == [
        "1_Pooling/config.json",
        "LICENSE",
        "config.json",
        "tokenizer.json",
    ]
    assert sorted(base.unmerged_weights()) == [
        "onnx/model.onnx",
        "onnx/model.onnx_data",
        "pytorch_model.bin",
        "sub/x.safetensors",
        "tf_model.h5",
    ]


# --- The history of earlier merges ---


def test_the_history_is_read_from_the_manifest(sharded):
    write_json(sharded / "lora_export.json", {"adapters": [{"name": "a", "sha256": "12"}], "files": {}})
    assert open_checkpoint(sharded).history == ({"name": "a", "sha256": "12"},)


def test_the_history_is_read_from_a_header(tmp_path):
    header = {"__metadata__": {"lora_export": '{"adapters": [{"name": "a"}]}'}}
    raw_tensor_file(tmp_path / "model.safetensors", header)
    assert open_checkpoint(tmp_path / "model.safetensors").history == ({"name": "a"},)
    assert open_checkpoint(tmp_path).history == ({"name": "a"},)


def test_the_manifest_takes_precedence_over_a_header(tmp_path):
    header = {"__metadata__": {"lora_export": '{"adapters": [{"name": "old"}]}'}}
    raw_tensor_file(tmp_path / "model.safetensors", header)
    write_json(tmp_path / "lora_export.json", {"adapters": [{"name": "old"}, {"name": "new"}]})
    assert open_checkpoint(tmp_path).history == ({"name": "old"}, {"name": "new"})


@pytest.mark.parametrize("record", ["", "[]", '{"adapters": {}}', '{"adapters": ["a"]}', '{"a": 1, "a": 2}'])
def test_a_damaged_record_of_an_earlier_merge_is_refused(tmp_path, record):
    path = raw_tensor_file(tmp_path / "model.safetensors", {"__metadata__": {"lora_export": record}})
    assert "the record of an earlier merge" in refusal(path)


# --- What is refused ---


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.bin").touch()
    assert refusal(tmp_path / "model.bin") == (
        "BASE is no checkpoint: give a Hugging Face folder or a .safetensors file, or, where the command takes them, a "
        ".gguf or .onnx file"
    )
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert refusal(tmp_path / "model.gguf").startswith("BASE is a GGUF file, which is not taken here. Give the")


@pytest.mark.parametrize("content", [{}, {"weight_map": ["a"]}, {"weight_map": {}}, {"weight_map": None}])
def test_an_index_without_a_map_is_refused(sharded, content):
    write_json(sharded / INDEX, content)
    assert refusal(sharded) == f"BASE/{INDEX} has no weight_map"


@pytest.mark.fault(5)
def test_two_indices_are_refused(sharded):
    write_json(sharded / "model.fp16.safetensors.index.json", {"weight_map": MAP})
    names = f"model.fp16.safetensors.index.json, {INDEX}"
    assert refusal(sharded) == f"BASE has 2 index files: {names}. Keep only one of them"


@pytest.mark.fault(5)
def test_several_files_without_an_index_are_refused(sharded):
    (sharded / INDEX).unlink()
    assert refusal(sharded) == (
        f"BASE has 2 safetensors files and no index: {FIRST}, {SECOND}. Add the index, or name the file that you mean"
    )


def test_a_folder_without_weights_is_refused(tmp_path):
    assert refusal(tmp_path) == "BASE has no safetensors weights"


def test_method_alone_names_the_scheme(tmp_path):
    single(tmp_path, {"quantization_config": "mxfp4"}, fc__weight=[[1]])
    with pytest.raises(InputRefused, match="the config names mxfp4, and no weight is stored so"):
        open_checkpoint(tmp_path, dequantise=True)


def test_a_label_may_have_any_name(tmp_path):
    single(tmp_path, {"label2id": {"quantization_config": 1, "auto_map": 2}}, fc__weight=[[1]])
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.specs) == 1
    assert custom_code(checkpoint.config) == ""


@pytest.mark.parametrize(
    ("table", "what"), [({"id2label": {"0": {"a": 1}}}, "names"), ({"label2id": {"a": [0]}}, "numbers")]
)
def test_a_label_table_of_other_types_is_refused(tmp_path, table, what):
    single(tmp_path, table, fc__weight=[[1]])
    assert re.fullmatch(rf"BASE/config.json: \w+ is .*; it must be a table of {what}", refusal(tmp_path))


@pytest.mark.parametrize("architectures", ["BertModel", {"a": 1}, [5], 5])
def test_architectures_must_be_a_list_of_names(tmp_path, architectures):
    single(tmp_path, {"architectures": architectures}, fc__weight=[[1]])
    assert refusal(tmp_path) == f"BASE/config.json: architectures is {architectures!r}; it must be a list of names"


@pytest.mark.parametrize(
    ("model_type", "dtype", "expected"),
    [
        ("llama", np.float32, True),
        ("llama", np.float16, True),
        ("llama", ml_dtypes.bfloat16, True),
        ("llama", np.float64, False),
        ("llama", np.int64, False),
        ("mixtral", np.float32, False),  # transformers stacks its experts
    ],
)
def test_floats_that_are_loaded_as_they_are_stored(model_type: str, dtype: Any, expected: bool, tmp_path: Path) -> None:
    safetensors_file.write(tmp_path / "model.safetensors", {"w": np.ones(2, np.float32), "v": np.ones(2, dtype)})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert is_streamable(open_checkpoint(tmp_path)) is expected
    assert is_streamable(open_checkpoint(tmp_path / "model.safetensors")) is (expected or model_type == "mixtral")
