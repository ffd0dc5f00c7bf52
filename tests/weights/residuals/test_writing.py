"""What a residual contains, and that its memory does not grow with the model."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from lora_export import plan
from lora_export.formats import load
from lora_export.lora import Adapter
from lora_export.storage.hashes import file_hash
from lora_export.weights.checkpoint import Checkpoint, open_checkpoint
from lora_export.weights.merge import merge_checkpoint
from lora_export.weights.residuals.archive import needs_adapters, open_residual, refuse_residual, write_residual
from support.handmade import base_file, peft_adapter

W = np.arange(6).reshape(2, 3)


@pytest.fixture
def parts(tmp_path: Path) -> tuple[plan.Plan, Checkpoint, Path]:
    """A plan, its base and the folder of its merge."""
    (tmp_path / "base").mkdir()
    base_file(tmp_path / "base/model.safetensors", {"fc.weight": W, "other.weight": W})
    (tmp_path / "base/config.json").write_text('{"model_type":   "llama"}')
    (tmp_path / "base/words.txt").write_text("a")
    base = open_checkpoint(tmp_path / "base")
    adapter = load(peft_adapter(tmp_path / "one", {"fc": ([[1, 2, 3]], [[1], [10]])}))
    steps = plan.make([adapter], base.specs)
    (tmp_path / "merged").mkdir()
    merge_checkpoint(steps, base, tmp_path / "merged")
    return steps, base, tmp_path / "merged"


def test_facts_name_every_file_with_its_hashes(tmp_path: Path, parts: tuple[plan.Plan, Checkpoint, Path]) -> None:
    steps, base, merged = parts
    done: list[int] = []
    write_residual(tmp_path / "r", steps, base, merged, settings={"x": 1}, progress=done.append)
    with open_residual(tmp_path / "r") as residual:
        facts = residual.facts
        assert (
            residual.header(0)
            == (base.path / "model.safetensors").read_bytes()[: base.shards["model.safetensors"].data_start]
        )
        assert residual.read("file/config.json") == b'{"model_type":   "llama"}'
    shard = facts["shards"]["model.safetensors"]
    assert shard["changed"] == {"fc.weight": 2} and sum(done) == W.size * 4
    assert shard["merged"]["hash"] == file_hash(merged / "model.safetensors", "xxh3_128")
    assert shard["base"]["hash"] == file_hash(base.path / "model.safetensors", "xxh3_128")
    assert {name: own["stored"] for name, own in facts["files"].items()} == {"config.json": True, "words.txt": False}
    assert facts["settings"] == {"x": 1} and [adapter["name"] for adapter in facts["adapters"]] == ["one"]


def test_a_right_prediction_is_not_stored(tmp_path: Path, parts: tuple[plan.Plan, Checkpoint, Path]) -> None:
    write_residual(tmp_path / "r", *parts)
    with zipfile.ZipFile(tmp_path / "r") as archive:
        assert archive.read("data/0") == bytes([0, 1, 1, 0, 0, 0, 0, 0])  # sparse, no values: small integers are exact


def test_adapters_are_needed_for_what_is_subtracted(parts: tuple[plan.Plan, Checkpoint, Path]) -> None:
    steps, base, _ = parts
    assert needs_adapters(steps)
    whole = Adapter("x", "peft", {}, replaced={"fc.weight": W.astype(np.float32)})
    replaced = plan.make([whole], base.specs)
    assert not needs_adapters(replaced)
    refuse_residual(replaced, base)
