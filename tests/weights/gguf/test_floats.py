"""The weights of GGUF files as transformers has them. Its own reader defines them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from lora_export.models.gguf_files import save_config
from lora_export.weights.gguf.base import open_base
from lora_export.weights.gguf.floats import write_as_floats
from support.gguf_files import Kind, llama, runnable, write_llama, written


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q4_0, Kind.Q4_K], ids=str)
def test_a_folder_computes_what_transformers_makes_of_the_file(tmp_path: Path, kind: Kind) -> None:
    file, folder = write_llama(tmp_path / "base.gguf", kind, fields=runnable), tmp_path / "folder"
    folder.mkdir()
    save_config(open_base(file), folder, with_tokenizer=False)
    write_as_floats(open_base(file), folder)
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        own = transformers.AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)(ids).logits
        assert torch.equal(own, theirs)
        assert kind is not Kind.F32 or torch.allclose(own, llama()(ids).logits, atol=1e-5)


def test_experts_and_norms_are_those_of_transformers(tmp_path: Path) -> None:
    experts = np.random.default_rng(0).standard_normal((3, 8, 4)).astype(np.float32)
    for architecture, name, values in (
        ("qwen3moe", "blk.0.ffn_up_exps.weight", experts),
        ("gemma2", "blk.0.attn_norm.weight", np.full(8, 1.5, np.float32)),
    ):
        writer = gguf.GGUFWriter(str(tmp_path / f"{architecture}.gguf"), architecture)
        writer.add_tensor(name, values)
        writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32))
        folder = tmp_path / architecture
        folder.mkdir()
        write_as_floats(open_base(written(writer, tmp_path / f"{architecture}.gguf")), folder)
    found = {}
    for architecture in ("qwen3moe", "gemma2"):
        for path in (tmp_path / architecture).glob("*.safetensors"):
            found |= load_file(path)
    own = "model.layers.0.mlp.experts.{}.up_proj.weight"
    norm = found.pop("model.layers.0.input_layernorm.weight")
    assert sorted(found) == [own.format(number) for number in range(3)] and (norm == 0.5).all()
    assert all(np.array_equal(found[own.format(number)], experts[number]) for number in range(3))
