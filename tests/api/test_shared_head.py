"""A head that adapters save whole: left out where it is the model's own, refused where it is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lora_export as le
from lora_export import formats
from lora_export.api.shared_head import without_shared_head
from lora_export.errors import InputRefused, WrongUsage
from lora_export.models.load import load_model
from lora_export.weights.checkpoint import open_checkpoint
from support import FACTORIES, experts
from support.folder_contents import folder_contents
from support.handmade import base_file, peft_adapter
from support.slow import slow

SPOTTER = f"{FACTORIES}:spotter"
LAYER = "encoder.layers.0.linear1"  # 32 x 16


def an_adapter(folder: Path, seed: int, head: dict[str, np.ndarray]) -> Path:
    rng = np.random.default_rng(seed)
    pair = 0.2 * rng.standard_normal((2, 16)), 0.2 * rng.standard_normal((32, 2))
    return peft_adapter(folder, {LAYER: pair}, head)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters that saved the head of the model, and one with a head of its own."""
    folder = tmp_path_factory.mktemp("heads")
    tensors = load_model(SPOTTER).module.state_dict()
    head = {name: tensors[name].numpy() for name in ("head.weight", "head.bias")}
    for number, name in enumerate(("fr", "de")):
        an_adapter(folder / name, number, head)
    an_adapter(folder / "own", 2, {**head, "head.bias": head["head.bias"] + 1})
    return folder


@pytest.mark.parametrize("mode", ["inputs", slow("rows")])
def test_shared_head_is_left_out_and_proven(place: Path, tmp_path: Path, mode: str) -> None:
    adapters = [place / "fr", place / "de"]
    with pytest.raises(InputRefused, match=r"fr, head.bias: a whole tensor(?s:.)*only_head=(?s:.)*ignore_head="):
        le.export_onnx(SPOTTER, tmp_path / "m.onnx", adapters=adapters, lora="inputs")
    exported = le.export_onnx(SPOTTER, tmp_path / "m.onnx", adapters=adapters, lora=mode, ignore_head=True)
    assert exported.proof is not None and exported.proof.verdict.same
    extra = {} if mode == "rows" else {"onnx_adapter": tmp_path / "fr.onnx_adapter"}
    given = adapters if mode == "rows" else adapters[:1]
    assert le.verify(tmp_path / "m.onnx", SPOTTER, adapters=given, **extra)  # attaches the head that each saved


def test_head_of_its_own_is_refused_and_nothing_left(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"not the model's own \(ignore_head=\):\n  own, head.bias\nMerge the head"):
        le.export_onnx(
            SPOTTER, tmp_path / "m.onnx", adapters=[place / "fr", place / "own"], lora="rows", ignore_head=True
        )
    assert folder_contents(tmp_path) == {}


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_a_head_that_a_merge_rounded_is_the_models(tmp_path: Path, half: str) -> None:
    head = np.random.default_rng(3).standard_normal((2, 16)).astype(np.float32)
    base_file(tmp_path / "base.safetensors", {f"{LAYER}.weight": np.zeros((32, 16)), "head.weight": head}, half)
    for name, tensor in (("fr", head), ("other", head + head.std() / 50)):
        an_adapter(tmp_path / name, 0, {"head.weight": tensor})
    base = open_checkpoint(tmp_path / "base.safetensors")

    def stored(name: str) -> np.ndarray:  # as a model in float32 has it
        return base.shards["base.safetensors"].read(name).astype(np.float32)

    (found,) = without_shared_head([formats.load(tmp_path / "fr")], base.specs, stored)
    assert not found.replaced
    assert found.notes == (f"the head of fr is the model's, which has it rounded to {half}",)
    with pytest.raises(InputRefused, match=r"other, head\.weight"):
        without_shared_head([formats.load(tmp_path / "other")], base.specs, stored)


@pytest.mark.slow
def test_existing_graph_and_convert_take_the_shared_head(place: Path, tmp_path: Path) -> None:
    le.export_onnx(SPOTTER, tmp_path / "base.onnx", verify=False)
    options = {"lora": "inputs", "verify": False, "ignore_head": True}
    le.export_onnx(tmp_path / "base.onnx", tmp_path / "m.onnx", adapters=place / "fr", **options)
    graph = tmp_path / "m.onnx"
    result = le.convert(place / "de", tmp_path / "de.onnx_adapter", graph=graph, ignore_head=True)
    assert (result.weights, result.of) == (1, 1)
    for refused, ignore_head in ((place / "own", True), (place / "de", False)):
        with pytest.raises(InputRefused, match=r"head\.bias"):
            le.convert(refused, tmp_path / "x.onnx_adapter", graph=graph, ignore_head=ignore_head)
    with pytest.raises(InputRefused, match=r"own, head\.bias"):
        le.export_onnx(tmp_path / "base.onnx", tmp_path / "n.onnx", adapters=place / "own", **options)


def test_only_the_head_is_merged(tmp_path: Path) -> None:
    base = {"fc.weight": np.ones((2, 3), np.float32), "head.weight": np.zeros((1, 2), np.float32)}
    base_file(tmp_path / "base.safetensors", base)
    head = {"head.weight": np.float32([[4, 5]])}
    peft_adapter(tmp_path / "fr", {"fc": ([[1, 2, 3]], [[1], [2]])}, head)
    result = le.merge(tmp_path / "base.safetensors", tmp_path / "fr", tmp_path / "m.safetensors", only_head=True)
    assert result.report is not None and result.report.replaced_weights == ("head.weight",)
    merged = le.inspect(tmp_path / "m.safetensors").checkpoint
    assert merged is not None
    file = merged.shards["m.safetensors"]
    assert np.array_equal(file.read("fc.weight"), base["fc.weight"])
    assert np.array_equal(file.read("head.weight"), head["head.weight"])
    # The adapter itself is not in it: it can be merged later.
    assert le.merge(tmp_path / "m.safetensors", tmp_path / "fr", tmp_path / "all.safetensors").report is not None


def test_only_the_head_is_merged_of_an_adapter_of_experts(tmp_path: Path) -> None:
    saved = experts.save(tmp_path, "mixtral", modules_to_save=["lm_head"])
    head = np.full_like(experts.weights(saved["new"])["lm_head.weight"], 0.5)
    name = "base_model.model.lm_head.weight"
    changed = experts.rewritten(saved["adapter"], tmp_path / "changed", lambda tensors: tensors | {name: head})
    le.merge(saved["new"], changed, tmp_path / "with-head", only_head=True)
    merged, expected = experts.weights(tmp_path / "with-head"), experts.weights(saved["new"]) | {"lm_head.weight": head}
    assert [tensor for tensor in expected if not np.array_equal(merged[tensor], expected[tensor])] == []


def test_what_has_no_head_or_no_swap_is_refused(place: Path, tmp_path: Path) -> None:
    base_file(tmp_path / "base.safetensors", {"fc.weight": np.ones((2, 3))})
    peft_adapter(tmp_path / "fr", {"fc": ([[1, 2, 3]], [[1], [2]])})
    with pytest.raises(InputRefused, match="fr saves no tensor whole"):
        le.merge(tmp_path / "base.safetensors", tmp_path / "fr", tmp_path / "m.safetensors", only_head=True)
    with pytest.raises(WrongUsage, match='ignore_head= is for lora="inputs", rows and slots'):
        le.export_onnx(SPOTTER, tmp_path / "m.onnx", adapters=place / "fr", ignore_head=True)
