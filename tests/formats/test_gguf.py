"""Adapters for llama.cpp, read back by the gguf package and by this one: names, factors and alpha, bit for bit."""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_export
from lora_export import load_adapter
from lora_export.errors import EnvironmentLacking, InputRefused
from lora_export.lora import Adapter, LoraPair
from lora_export.options.reading import ReadOptions
from lora_export.storage.hashes import file_sha256
from support import gguf_files
from support.handmade import add_tensors
from support.peft_models import trained
from support.tiny_models import tiny_llama
from support.written import DTYPES, adapter_of, assert_same_pairs, low_rank

CONFIG = {"model_type": "qwen2", "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
UP = "model.layers.1.mlp.up_proj"


def written(adapter: Adapter, folder: Path, **config: Any) -> gguf.GGUFReader:
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    reading = ReadOptions(base_config=folder)
    result = lora_export.convert(adapter, folder / "out", to="gguf", reading=reading, overwrite=True)
    assert result.output == folder / "out.gguf"
    return gguf.GGUFReader(result.output)


def tensors_of(reader: gguf.GGUFReader) -> dict[str, np.ndarray[Any, Any]]:
    found = {}
    for tensor in reader.tensors:
        data = tensor.data
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            data = data.view(ml_dtypes.bfloat16)
        found[tensor.name] = np.asarray(data, np.float32).reshape(tuple(int(size) for size in tensor.shape[::-1]))
    return found


def by_gguf(path: Path, reader: gguf.GGUFReader, alpha: float) -> bytes:
    """The same adapter, written by the package gguf."""
    writer = gguf.GGUFWriter(str(path), "qwen2")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(reader.fields["general.name"].contents())
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    return gguf_files.written(writer, path).read_bytes()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.sampled_from(sorted(DTYPES)), st.integers(1, 64))
def test_factors_and_alpha_come_back(rank: int, dtype: str, alpha: int) -> None:
    pair = low_rank(6, 4, rank, dtype=DTYPES[dtype], scale=alpha / rank)
    with tempfile.TemporaryDirectory() as folder:
        reader = written(adapter_of({UP: pair}), Path(folder))
        tensors = tensors_of(reader)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        ours, theirs = Path(folder, "out.gguf").read_bytes(), by_gguf(Path(folder, "theirs.gguf"), reader, alpha)
    assert np.array_equal(tensors["blk.1.ffn_up.weight.lora_a"], pair.a) and ours == theirs
    assert np.array_equal(tensors["blk.1.ffn_up.weight.lora_b"], pair.b)
    assert len(tensors) == 2
    assert fields["adapter.lora.alpha"] == alpha
    names = ("general.type", "adapter.type", "general.architecture")
    assert [fields[name] for name in names] == ["adapter", "lora", "qwen2"]


def test_embeddings_have_a_transposed(tmp_path: Path) -> None:
    pair = low_rank(4, 7, 2, embedding=True)
    tensors = tensors_of(written(adapter_of({"model.embed_tokens": pair}), tmp_path))
    assert np.array_equal(tensors["token_embd.weight.lora_a"], pair.a.T)
    assert np.array_equal(tensors["token_embd.weight.lora_b"], pair.b)


def test_the_base_may_be_a_gguf_file(tmp_path: Path) -> None:
    model = gguf_files.llama()
    model.save_pretrained(tmp_path / "base")
    gguf_files.write_llama(tmp_path / "base.gguf")
    modules = ["q_proj", "down_proj", "lm_head"]
    trained(copy.deepcopy(model), r=2, target_modules=modules).save_pretrained(tmp_path / "a")
    made = [
        lora_export.convert(tmp_path / "a", tmp_path / f"{base}.out", to="gguf", base=tmp_path / base).output
        for base in ("base", "base.gguf")
    ]
    assert made[0].read_bytes() == made[1].read_bytes()


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_tables_that_peft_repeats_beside_their_pairs_are_left_out(tmp_path: Path, saved: torch.dtype) -> None:
    base = tiny_llama(vocab_size=12)
    base.save_pretrained(tmp_path / "base")
    model = trained(base.to(saved), r=2, target_modules=["embed_tokens", "lm_head"])
    model.save_pretrained(tmp_path / "adapter")
    assert len(load_adapter(tmp_path / "adapter").replaced) == 2
    arguments: Any = {"to": "gguf", "base": tmp_path / "base", "overwrite": True}
    result = lora_export.convert(tmp_path / "adapter", tmp_path / "out", **arguments)
    tensors, modules = tensors_of(gguf.GGUFReader(result.output)), model.base_model.model
    expected = {
        "token_embd.weight.lora_a": modules.model.embed_tokens.lora_embedding_A["default"].T,
        "token_embd.weight.lora_b": modules.model.embed_tokens.lora_embedding_B["default"],
        "output.weight.lora_a": modules.lm_head.lora_A["default"].weight,
        "output.weight.lora_b": modules.lm_head.lora_B["default"].weight,
    }
    assert {name: tensors[name].tolist() for name in tensors} == {
        name: value.float().tolist() for name, value in expected.items()
    }
    assert "lm_head.weight is saved whole, and is the base's own: it is left out" in result.notes
    changed = {"base_model.model.lm_head.base_layer.weight": np.ones((12, 8), np.float32)}
    with pytest.raises(InputRefused, match=r"lm_head\.weight: a whole tensor"):
        lora_export.convert(add_tensors(tmp_path / "adapter", changed), tmp_path / "out", **arguments)


@pytest.mark.parametrize(("name", "heads"), [("q_proj", 2), ("k_proj", 1)])
def test_rows_of_q_and_k_have_metas_order_in_llama(tmp_path: Path, name: str, heads: int) -> None:
    pair = low_rank(4 * heads, 8, 2)
    adapter = adapter_of({f"model.layers.0.self_attn.{name}": pair})
    tensors = tensors_of(written(adapter, tmp_path, model_type="llama"))
    # Row 2 k of a head is row k of its first half, row 2 k + 1 is row k of its second.
    expected = [pair.b[head * 4 + half * 2 + k] for head in range(heads) for k in range(2) for half in range(2)]
    assert np.array_equal(tensors[f"blk.0.attn_{name[0]}.weight.lora_b"], expected)


def test_experts_are_stacked(tmp_path: Path) -> None:
    pairs = {f"model.layers.0.mlp.experts.{n}.gate_proj": low_rank(4, 3, 2, seed=n) for n in range(3)}
    tensors = tensors_of(written(adapter_of(pairs), tmp_path, model_type="qwen3_moe"))
    assert np.array_equal(tensors["blk.0.ffn_gate_exps.weight.lora_a"], [pair.a for pair in pairs.values()])
    assert np.array_equal(tensors["blk.0.ffn_gate_exps.weight.lora_b"], [pair.b for pair in pairs.values()])


@pytest.mark.parametrize(
    ("kind", "pairs"),
    [
        ("llama", {f"model.layers.0.self_attn.{name}": low_rank(8, 8, 2) for name in ("q_proj", "k_proj", "v_proj")}),
        ("qwen2", {UP: low_rank(6, 4, 2, dtype=ml_dtypes.bfloat16), "lm_head": low_rank(7, 4, 2)}),
        ("qwen2", {"model.embed_tokens": low_rank(4, 7, 2, embedding=True)}),
        ("qwen3_moe", {f"model.layers.0.mlp.experts.{n}.gate_proj": low_rank(4, 3, 2, seed=n) for n in range(3)}),
    ],
)
def test_what_is_written_is_read_again(tmp_path: Path, kind: str, pairs: dict[str, LoraPair]) -> None:
    written(adapter_of(pairs), tmp_path, model_type=kind)
    with_images = {"model_type": "llava", "text_config": CONFIG | {"model_type": kind}}
    for config in (CONFIG | {"model_type": kind}, with_images):
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = load_adapter(tmp_path / "out.gguf", options=ReadOptions(base_config=tmp_path))
        assert_same_pairs(found, adapter_of(pairs))
    assert (found.format, found.name, found.sha256) == ("gguf", "out", file_sha256(tmp_path / "out.gguf"))


def test_blocks_are_read_and_no_alpha_is_a_scale_of_one(tmp_path: Path) -> None:
    a, b = (np.random.default_rng(0).standard_normal(shape).astype(np.float32) for shape in ((2, 32), (4, 32)))
    writer = an_adapter(tmp_path / "a.gguf", alpha=None)
    quantised = gguf.quants.quantize(a, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_up.weight.lora_a", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_up.weight.lora_b", np.ascontiguousarray(b[:, :2]))
    (pair,) = load_adapter(gguf_files.written(writer, tmp_path / "a.gguf")).pairs.values()
    assert np.array_equal(pair.a, gguf.quants.dequantize(quantised, gguf.GGMLQuantizationType.Q8_0))
    assert (pair.scale, np.array_equal(pair.b, b[:, :2])) == (1.0, True)


def an_adapter(path: Path, *, kind: str = "lora", alpha: float | None = 4.0, architecture: str = "llama") -> Any:
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, kind)
    if alpha is not None:
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    return writer


@pytest.mark.parametrize(
    ("fields", "tensors", "problem"),
    [
        ({"kind": "control_vector"}, {}, "is an adapter of the kind 'control_vector', no LoRA"),
        ({"alora": True}, {}, "is an adapter of the kind 'aLoRA', no LoRA"),
        ({"alpha": -1.0}, {}, "adapter.lora.alpha is -1.0; it must be a number"),
        ({"alpha": float("nan")}, {}, "adapter.lora.alpha is nan; it must be a number"),
        ({"architecture": "mamba"}, {}, "architecture 'mamba' are not supported"),
        ({}, {}, "contains no tensor"),
        ({}, {"blk.0.attn_q.weight": (2, 4)}, "how its rows are ordered depends on the base. State it"),
        ({}, {"blk.0.ssm_x.weight": (2, 4)}, "no tensor of this name is known in models of the type llama"),
        ({}, {"blk.0.ffn_up_exps.weight": (2, 4)}, "which are no stacks of experts"),
    ],
)
def test_other_adapters_of_llama_cpp_are_refused(
    tmp_path: Path, fields: dict[str, Any], tensors: dict[str, tuple[int, int]], problem: str
) -> None:
    has_tokens = fields.pop("alora", False)
    writer = an_adapter(tmp_path / "a.gguf", **fields)
    if has_tokens:
        writer.add_array(gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, [1])
    for name, (rank, inner) in tensors.items():
        writer.add_tensor(f"{name}.lora_a", np.ones((rank, inner), np.float32))
        writer.add_tensor(f"{name}.lora_b", np.ones((inner, rank), np.float32))
    with pytest.raises(InputRefused) as refused:
        load_adapter(gguf_files.written(writer, tmp_path / "a.gguf"))
    assert problem in str(refused.value)


@pytest.mark.parametrize(
    ("pairs", "config", "problem"),
    [
        ({UP: low_rank(2, 2, 1)}, {"model_type": "falcon"}, "for models of the type 'falcon' is not supported"),
        ({UP: low_rank(2, 2, 1)}, {"num_hidden_layers": None}, "has no usable num_hidden_layers"),
        ({UP: low_rank(2, 2, 1), "model.layers.0.mlp.up_proj": low_rank(2, 2, 2)}, {}, "several alphas"),
        ({UP: low_rank(2, 2, 1, magnitude=np.ones(2))}, {}, f"{UP}: DoRA's magnitude"),
        ({}, {}, "it has no low-rank pair"),
        ({"elsewhere": low_rank(2, 2, 1)}, {}, "elsewhere: llama.cpp has no tensor for it in the architecture qwen2"),
        (
            {"model.layers.0.self_attn.q_proj": low_rank(3, 2, 1)},
            {"model_type": "llama"},
            "q_proj: its 3 rows are not those of the base's 2 heads",
        ),
    ],
)
def test_what_gguf_cannot_express_is_refused_by_name(
    tmp_path: Path, pairs: dict[str, LoraPair], config: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InputRefused) as refused:
        written(adapter_of(pairs), tmp_path, **config)
    assert problem in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_the_base_and_the_package_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_of({UP: low_rank(2, 2, 1)})
    with pytest.raises(InputRefused, match='State it: base="CHECKPOINT"'):
        lora_export.convert(adapter, tmp_path / "out", to="gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(EnvironmentLacking, match=r"to=.gguf. needs gguf .*pip install 'gguf>="):
        lora_export.convert(adapter, tmp_path / "out", to="gguf")
    assert list(tmp_path.iterdir()) == []
