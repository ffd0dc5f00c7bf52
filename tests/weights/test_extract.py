"""The adapter of a difference: PEFT loads it into the base, and computes what the tuned model computes."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

import lora_export as le
from lora_export.adapters.singular_values import Truncation
from lora_export.errors import InputRefused
from lora_export.weights import extract
from lora_export.weights.checkpoint import open_checkpoint
from lora_export.weights.extract import extract_adapter
from lora_export.weights.tied_tensors import word_tables
from support.fine_tuned import MODELS, RANK, base_and_tuned, inputs_of
from support.handmade import base_file
from support.tied import tied_model

CHANGED = {
    "llama": ("",),
    "bert norms": ("LayerNorm",),
    "tied": ("",),
    "bert": ("encoder", "LayerNorm", "predictions.transform"),
    "gpt2": ("",),
    "tied gpt2": ("",),
    "tied bert": ("encoder", "word_embeddings"),
    "vit": ("encoder", "layers", "layernorm", "classifier", "patch_embeddings"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_peft_computes_what_the_tuned_model_computes_and_a_merge_is_it(tmp_path: Path, name: str) -> None:
    tuned = base_and_tuned(name, tmp_path, parts=CHANGED[name])
    result = le.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=RANK)
    assert result.share > 0.999999 and all(layer.rank == RANK for layer in result.layers)
    base = MODELS[name][0].from_pretrained(tmp_path / "base")
    plain = base.eval()(**inputs_of(name)).logits.detach()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys.*")  # keys that PEFT has no place for, or lacks
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    found, expected = (model(**inputs_of(name)).logits.detach() for model in (loaded, tuned))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    assert (expected - plain).abs().max() > 0.05
    le.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    wanted, merged = (load_file(tmp_path / folder / "model.safetensors") for folder in ("tuned", "merged"))
    assert wanted.keys() == merged.keys()
    for tensor, value in wanted.items():
        np.testing.assert_allclose(merged[tensor], value, atol=2e-6, err_msg=tensor)


def test_the_tables_of_words_are_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each matrix, among all tensors, the time grew with their square."""
    looked = []
    monkeypatch.setattr(extract, "word_tables", lambda *given: looked.append(given) or word_tables(*given))
    base_and_tuned("tied", tmp_path)
    result = le.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=RANK)
    assert len(result.layers) > 10 and len(looked) == 1


def test_a_head_that_the_base_lacks_is_saved_whole(tmp_path: Path) -> None:
    base_and_tuned("bert-classifier", tmp_path, parts=("encoder", "LayerNorm"))
    stored = load_file(tmp_path / "base/model.safetensors")
    backbone = {name.removeprefix("bert."): value for name, value in stored.items() if name.startswith("bert.")}
    save_file(backbone, tmp_path / "base/model.safetensors")
    result = le.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=RANK)
    assert all(layer.module.startswith("bert.encoder") for layer in result.layers)
    assert {name for name in result.whole if "LayerNorm" not in name and "encoder" not in name} == {
        *("classifier.weight", "classifier.bias")
    }
    le.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    tuned, merged = (load_file(tmp_path / folder / "model.safetensors") for folder in ("tuned", "merged"))
    assert tuned.keys() == merged.keys()
    assert all(np.allclose(merged[name], value, atol=2e-6) for name, value in tuned.items())


def two(tmp_path: Path, old: dict[str, np.ndarray], new: dict[str, np.ndarray], **config: object) -> tuple[Path, Path]:
    for name, tensors in (("base", old), ("tuned", new)):
        (tmp_path / name).mkdir()
        save_file(
            {key: np.ascontiguousarray(value) for key, value in tensors.items()}, tmp_path / name / "model.safetensors"
        )
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return tmp_path / "base", tmp_path / "tuned"


def extracted(tmp_path: Path, old: dict[str, np.ndarray], new: dict[str, np.ndarray], **options: object) -> object:
    one, other = two(tmp_path, old, new, **options.pop("config", {}))  # type: ignore[call-overload]
    truncation = Truncation(rank=2)
    return extract_adapter(open_checkpoint(one), open_checkpoint(other), truncation, name="x", **options)  # type: ignore[arg-type]


EYE, UP = np.eye(4, dtype=np.float32), np.ones((4, 4), np.float32)
OLD = {"a.fc.weight": EYE, "a.norm.weight": EYE[0], "a.scale": EYE[0], "lm_head.weight": EYE, "b.experts.w": EYE[None]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a.fc.weight": np.ones((5, 4), np.float32)}, r"a.fc.weight: BASE has \(4, 4\), TUNED \(5, 4\)"),
        ({"a.scale": EYE[1]}, "a.scale: a parameter of a, which has other modules"),
        ({"new": EYE}, r"new: no module that PEFT could save has it \(it is a parameter of the model itself\)"),
        ({"lm_head.weight": None}, r"lm_head.weight \(4, 4\): only BASE has it"),
        ({"b.experts.w": 2 * EYE[None]}, "b.experts.w: a parameter of b.experts, such as experts"),
        ({"a.fc.weight": np.full((4, 4), np.nan, np.float32)}, "a.fc.weight: TUNED holds values that are not finite"),
    ],
)
def test_what_no_adapter_holds_is_refused_by_name(tmp_path: Path, changes: dict[str, np.ndarray], message: str) -> None:
    new = {name: value for name, value in {**OLD, "a.fc.weight": EYE + UP, **changes}.items() if value is not None}
    with pytest.raises(InputRefused, match=message):
        extracted(tmp_path, OLD, new)


def test_an_excluded_difference_is_left_out_and_listed(tmp_path: Path) -> None:
    new = {**OLD, "a.fc.weight": EYE + UP, "a.scale": EYE[1], "lm_head.weight": 2 * EYE, "new.weight": EYE}
    found = extracted(tmp_path, OLD, new, exclude=["a.sc*", "lm_head", "new.weight", "a.norm"])
    assert list(found.adapter.pairs) == ["a.fc"] and found.whole == ()
    assert sorted(found.excluded) == ["a.scale", "lm_head.weight", "new.weight"]


def test_an_excluded_module_is_left_out_with_its_bias(tmp_path: Path) -> None:
    old = {**OLD, "a.up.weight": EYE, "a.up.bias": EYE[0]}
    new = {**old, "a.fc.weight": EYE + UP, "a.up.weight": EYE + UP, "a.up.bias": EYE[1]}
    found = extracted(tmp_path, old, new, exclude=["a.up"])
    assert (list(found.adapter.pairs), found.whole, sorted(found.excluded)) == (
        *(["a.fc"], (), ["a.up.bias", "a.up.weight"]),
    )


def test_an_exclusion_that_no_tensor_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r'exclude="a\.cf": no tensor has this name'):
        extracted(tmp_path, OLD, {**OLD, "a.fc.weight": EYE + UP}, exclude=["a.fc.*", "a.cf"])


def test_a_base_without_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="base contains no tensor"):
        extracted(tmp_path, {}, OLD)


def test_no_difference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"nothing to extract from .*: it has the weights of"):
        extracted(tmp_path, OLD, OLD)


def test_only_an_excluded_difference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"all that differs from .* is excluded \(exclude=\)"):
        extracted(tmp_path, OLD, {**OLD, "a.fc.weight": EYE + UP}, exclude=["*"])


def test_the_whole_module_of_a_changed_vector_is_saved(tmp_path: Path) -> None:
    old = {"fc.weight": EYE, "fc.bias": EYE[0], "norm.weight": EYE[0], "norm.bias": EYE[0], "norm.count": np.array(3)}
    new = {**old, "fc.weight": EYE + UP, "fc.bias": EYE[1], "norm.bias": EYE[2]}
    found = extracted(tmp_path, old, new)
    assert sorted(found.whole) == ["fc.bias", "norm.bias", "norm.count", "norm.weight"]
    np.testing.assert_array_equal(found.adapter.replaced["norm.bias"], EYE[2])


def test_tied_embeddings_of_an_unknown_head_are_refused(tmp_path: Path) -> None:
    table = np.ones((7, 4), np.float32)
    old, config = {"model.embed_tokens.weight": table, "fc.weight": EYE}, {"vocab_size": 7}
    config |= {"architectures": ["MyForCausalLM"]}
    with pytest.raises(
        InputRefused, match=r"model.embed_tokens.weight: the input embeddings are the output embeddings"
    ):
        extracted(tmp_path, old, {**old, "model.embed_tokens.weight": 2 * table}, config=config)


@pytest.mark.parametrize("stored", [(), ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")])
def test_a_table_under_several_names_is_refused(tmp_path: Path, stored: tuple[str, ...]) -> None:
    """Of T5, whose head would stay the base's in PEFT."""
    tied_model(tmp_path / "base", "T5ForConditionalGeneration")
    shutil.copytree(tmp_path / "base", tmp_path / "tuned")
    weights = load_file(tmp_path / "base/model.safetensors")
    for folder in ("base", "tuned"):
        weights["shared.weight"] += 0 if folder == "base" else np.eye(*weights["shared.weight"].shape, dtype=np.float32)
        tables = dict.fromkeys(stored, weights["shared.weight"])
        save_file(weights | tables, tmp_path / folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputRefused, match=r"shared.weight: it is (.*, )?lm_head.weight too, which BASE does not"):
        le.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=2)


def test_a_depthwise_convolution_is_saved_whole(tmp_path: Path) -> None:
    old = {"fc.weight": EYE, "conv.weight": np.ones((4, 1, 3), np.float32)}
    found = extracted(tmp_path, old, {"fc.weight": EYE + UP, "conv.weight": 2 * old["conv.weight"]})
    assert list(found.adapter.pairs) == ["fc"] and found.whole == ("conv.weight",)


def test_an_unknown_layout_has_to_be_stated(tmp_path: Path) -> None:
    wide = np.arange(12, dtype=np.float32).reshape(3, 4)
    for name, value in (("base", 0 * wide), ("tuned", wide)):
        base_file(tmp_path / f"{name}.safetensors", {"fc.weight": value})
    one, other = (open_checkpoint(tmp_path / f"{name}.safetensors") for name in ("base", "tuned"))
    with pytest.raises(InputRefused, match=r"fc.weight: how it is stored is unknown. State it by layout={\"fc.wei"):
        extract_adapter(one, other, Truncation(rank=2), name="x")
    for layout, expected in (("out_in", wide), ("in_out", wide.T)):
        found = extract_adapter(one, other, Truncation(rank=2), name="x", layout={"*": layout})
        np.testing.assert_allclose(found.adapter.pairs["fc"].delta(), expected, atol=1e-5)
        assert dict(found.adapter.layouts) == {"fc": layout}


@pytest.mark.parametrize(("size", "layout"), [(3, "out_in"), (4, "in_out")])
def test_a_bias_shows_the_layout_of_matrices_of_its_name(tmp_path: Path, size: int, layout: str) -> None:
    rest = {"a.fc.bias": np.ones(size), "b.fc.weight": np.ones((2, 2))}
    for name, value in (("base", np.zeros((3, 4))), ("tuned", np.arange(12.0).reshape(3, 4))):
        base_file(
            tmp_path / f"{name}.safetensors", {"a.fc.weight": value, **rest, "b.fc.weight": np.eye(2) + value[0, 1]}
        )
    one, other = (open_checkpoint(tmp_path / f"{name}.safetensors") for name in ("base", "tuned"))
    found = extract_adapter(one, other, Truncation(rank=2), name="x")
    assert dict(found.adapter.layouts) == {"a.fc": layout, "b.fc": layout}
