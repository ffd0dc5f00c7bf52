"""The three graphs of a model with images: positions, proofs that find planted faults, texts of transformers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import lora_export as le
from lora_export.artifacts.files import IMAGE_TEXT_FILES
from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.graph.cache_names import ImageTokens
from lora_export.models.load import load_model
from lora_export.runtime import three_graphs
from lora_export.runtime.three_graphs import ImageTextRunner, grid_positions
from lora_export.verification.parity import Outcome
from support.image_text import MARKERS, generated_by_transformers, image_files, image_text_adapter, image_text_model
from support.slow import slow_but
from support.small_models import small_model

PLAIN = "llava llava_next pixtral mistral3 paligemma internvl idefics3 smolvlm"
IMAGE_OF = dict.fromkeys(PLAIN.split(), "<image>") | MARKERS
IMAGE_OF |= dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "<vision_start> <image> <vision_end>")
FAMILIES = slow_but(["gemma3"], IMAGE_OF)  # whose tokens of an image attend to each other


@pytest.fixture(scope="module")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `base` of a family, an `adapter`, and the graphs `served` with it, which are not proven."""
    folder = tmp_path_factory.mktemp(request.param)
    base = image_text_model(request.param, folder / "base")
    adapter = image_text_adapter(request.param, base, folder / "adapter")
    le.export_onnx(base, folder / "served", adapters=[adapter], with_cache=True, verify=False)
    (folder / "name").write_text(request.param)
    return folder


def test_positions_are_those_of_qwen2_vl(tmp_path: Path) -> None:
    module: Any = load_model(str(small_model("qwen2_vl", tmp_path))).module
    ids = np.array([[9, 5, 5, 5, 5, 9, 9, 5, 5, 9], [0, 0, 9, 9, 5, 5, 5, 5, 5, 5], [9, 9, 9, 9, 0, 0, 0, 0, 0, 0]])
    mask, grids = (ids > 0).astype(np.int64), np.array([[1, 4, 4], [1, 2, 4], [1, 4, 6]])
    expected, deltas = module.base_model.get_rope_index(
        torch.from_numpy(ids), torch.from_numpy(ids == 5).long(), torch.from_numpy(grids), None, torch.from_numpy(mask)
    )
    found, following = grid_positions(ids, mask, grids, ImageTokens(5, 2))
    np.testing.assert_array_equal(found, expected.numpy())
    np.testing.assert_array_equal(following, deltas[:, 0].numpy() + mask.sum(1))
    with pytest.raises(RuntimeRefused, match="places for more images than there are"):
        grid_positions(ids, mask, grids[:2], ImageTokens(5, 2))


@pytest.mark.parametrize("made", FAMILIES, indirect=True)
def test_texts_are_those_of_transformers(made: Path, tmp_path: Path) -> None:
    """Two images of different size in one prompt, one in another, in one batch."""
    name = (made / "name").read_text()
    paths = image_files(tmp_path, (40, 24), (23, 61), (32, 32))
    image = IMAGE_OF[name]
    texts = [f"what is on {image} and that {image} ?", f"compare {image} with one"]
    arguments = (texts, [paths[:2], paths[2:]], 10)
    expected = generated_by_transformers(name, made / "base", made / "adapter", *arguments)
    assert expected != generated_by_transformers(name, made / "base", None, *arguments)
    found = le.generate(made / "served", texts, images=paths, max_new_tokens=10)
    assert [list(each.tokens) for each in found] == expected
    exchanged = le.generate(made / "served", texts, images=[*paths[1::-1], paths[2]], max_new_tokens=10)
    assert exchanged[0].tokens != found[0].tokens and exchanged[1].tokens == found[1].tokens
    (chat,) = le.generate(made / "served", [texts[0]], images=paths[:2], chat=True, max_new_tokens=2)
    assert len(chat.tokens) == 2
    with pytest.raises(InputRefused, match=f"1 images: the texts need {MARKERS.get(name, '<image>')} as often"):
        le.generate(made / "served", texts[:1], images=paths[:1])


def _exchanged(self: ImageTextRunner, inputs: Any, run: Any = ImageTextRunner.features) -> Any:
    """The first tokens of images in place of the last ones."""
    return np.roll(run(self, inputs), 4, axis=0)


def _ignored(self: ImageTextRunner, inputs: Any, run: Any = ImageTextRunner.features) -> Any:
    features = run(self, inputs)
    features[-4:] = 0
    return features


def _counted(ids: Any, mask: Any, grids: Any, tokens: Any, run: Any = grid_positions) -> Any:
    """Positions of a text without images."""
    return run(np.where(ids == tokens.token, 0, ids), mask, grids, tokens)


def _one_way(self: ImageTextRunner, inputs: Any, run: Any = ImageTextRunner.run) -> Any:
    """No token attends to one after it."""
    return run(self, {**inputs, "token_type_ids": np.full_like(inputs["input_ids"], 1 - (self.tokens.two_way or 0))})


@pytest.mark.parametrize("made", FAMILIES, indirect=True)
def test_the_proof_finds_planted_faults(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"model": made / "base", "adapters": [made / "adapter"]}
    assert le.verify(made / "served", **given).verdict.outcome is Outcome.SAME
    for fault in (_exchanged, _ignored):
        with monkeypatch.context() as patch:
            patch.setattr(ImageTextRunner, "features", fault)
            wrong = le.verify(made / "served", **given)
        assert wrong.verdict.outcome is Outcome.DIFFERENT
        assert "The first graph whose outputs differ: vision_encoder.onnx" in str(wrong)
    if (name := (made / "name").read_text()) in ("gemma3", "paligemma"):
        monkeypatch.setattr(ImageTextRunner, "run", _one_way)
        assert le.verify(made / "served", **given).verdict.outcome is Outcome.DIFFERENT
    if "qwen" in name:
        monkeypatch.setattr(three_graphs, "grid_positions", _counted)
        assert le.verify(made / "served", **given).verdict.outcome is Outcome.DIFFERENT


@pytest.mark.slow
@pytest.mark.parametrize("made", ["llava"], indirect=True)
@pytest.mark.parametrize("inside", ["vision_tower", "multi_modal_projector", "language_model"])
def test_an_adapter_that_one_part_lacks_is_found(made: Path, inside: str, tmp_path: Path) -> None:
    base = made / "base"
    adapter = image_text_adapter("llava", base, tmp_path / "adapter", inside=f"{inside}.*")
    without = "(?:vision_tower|multi_modal_projector|language_model)".replace(inside, "nothing")
    others = image_text_adapter("llava", base, tmp_path / "others", inside=f"{without}.*")
    le.export_onnx(base, tmp_path / "served", adapters=[adapter], with_cache=True)
    assert le.verify(tmp_path / "served", model=base, adapters=[adapter]).verdict.outcome is Outcome.SAME
    le.export_onnx(base, tmp_path / "less", adapters=[others], with_cache=True, verify=False)
    found = le.verify(tmp_path / "less", model=base, adapters=[made / "adapter"])
    assert found.verdict.outcome is Outcome.DIFFERENT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "lora"),
    [
        *[("llava", "inputs"), ("gemma3", "inputs"), ("gemma3", "nodes")],
        *[("qwen3_vl", "inputs"), ("llava_next", "nodes"), ("pixtral", "inputs"), ("mistral3", "inputs")],
    ],
    indirect=["made"],
)
def test_adapters_beside_the_weights_give_these_texts(made: Path, lora: str, tmp_path: Path) -> None:
    name, base, adapter = (made / "name").read_text(), made / "base", made / "adapter"
    le.export_onnx(base, tmp_path / "served", adapters=[adapter], lora=lora, with_cache=True)
    paths = image_files(tmp_path / "images", (40, 24))
    prompt = [f"what is on {IMAGE_OF[name]} ?"]
    expected, of_base = (generated_by_transformers(name, base, each, prompt, [paths], 8) for each in (adapter, None))
    served: dict[str, Any] = {"source": tmp_path / "served", "prompts": prompt, "images": paths, "max_new_tokens": 8}
    chosen: dict[str, Any] = {"adapters": "adapter"} if lora == "inputs" else {}
    assert [list(each.tokens) for each in le.generate(**served, **chosen)] == expected != of_base
    if chosen:
        assert [list(each.tokens) for each in le.generate(**served)] == of_base


@pytest.mark.slow
@pytest.mark.parametrize("made", ["llava"], indirect=True)
@pytest.mark.parametrize("lora", ["merged", "nodes"])
def test_linear_layers_are_quantised_and_the_table_is_not(made: Path, lora: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"adapters": [made / "adapter"], "lora": lora, "with_cache": True, "quantize": "int8"}
    assert le.export_onnx(made / "base", tmp_path / "served", **given).proof
    kinds = [{node.op_type for node in onnx.load(tmp_path / "served" / name).graph.node} for name in IMAGE_TEXT_FILES]
    assert ["MatMulNBits" in each for each in kinds] == [True, False, True]


@pytest.mark.parametrize("made", ["gemma3"], indirect=True)
def test_graphs_that_do_not_fit_are_refused(made: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(made / "served", tmp_path / "copy")
    shutil.copy(copy / IMAGE_TEXT_FILES[1], copy / IMAGE_TEXT_FILES[0])
    with pytest.raises(InputRefused, match=r"vision_encoder\.onnx has no output image_features"):
        ImageTextRunner.open(copy)
    runner = ImageTextRunner.open(made / "served")
    images = np.zeros((2, 3, 16, 16), np.float32)
    with pytest.raises(RuntimeRefused, match="the images have 8 features, and the texts 3 places for them"):
        runner.run({"input_ids": np.array([[9, 5, 5, 5]]), "pixel_values": images})
    with pytest.raises(RuntimeRefused, match="the graphs take pixel_values; the model takes input_ids"):
        runner.run({"input_ids": np.array([[9, 5, 5, 5]])})
