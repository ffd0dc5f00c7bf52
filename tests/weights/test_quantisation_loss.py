"""What quantisation changed, against the float checkpoint: by hand, and for a model that bitsandbytes quantised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import lora_export
from lora_export.errors import InputRefused, WrongUsage
from lora_export.weights.quantised.stored_parts import QuantisedTensor
from support.cli import answer, call
from support.handmade import peft_adapter

# 8-bit floats of 4 x 8 times 0.5, and the weights that they were made from: 3 less in one entry of the first layer
NUMBERS = torch.arange(32.0).reshape(4, 8) % 7 - 3
WEIGHT = NUMBERS / 2


def written(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"dtype": "float32", **config}))
    return folder


def quantised(folder: Path, **more: torch.Tensor) -> Path:
    """Two layers in fp8: `a`, which an adapter changes, and `b`."""
    stored = {
        f"{layer}.{name}": value
        for layer in ("a", "b")
        for name, value in {
            "weight": NUMBERS.to(torch.float8_e4m3fn),
            "weight_scale_inv": torch.full((1, 1), 0.5),
        }.items()
    }
    return written(folder, stored | more, quantization_config={"quant_method": "fp8", "weight_block_size": [4, 8]})


def floats(folder: Path, dtype: torch.dtype = torch.float32, **more: torch.Tensor) -> Path:
    a = WEIGHT.clone()
    a[1, 2] += 3
    return written(folder, {"a.weight": a.to(dtype), "b.weight": WEIGHT.to(dtype)} | more)


def adapter(folder: Path) -> Path:
    """ΔW of `a`: 2 in every entry, so that ‖ΔW‖ is 2 * sqrt(32)."""
    return peft_adapter(folder, {"a": (np.ones((1, 8)), np.full((4, 1), 2.0))})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_and_change_of_each_weight_by_hand(dtype: torch.dtype, tmp_path: Path) -> None:
    base, original = quantised(tmp_path / "base"), floats(tmp_path / "float", dtype)
    result = lora_export.merge(
        base, [adapter(tmp_path / "adapter")], tmp_path / "m", dequantize=True, float_base=original
    )
    assert result.report is not None
    one, other = result.report.quantisation
    norm = float(np.linalg.norm(WEIGHT.numpy() + 3 * (np.arange(32).reshape(4, 8) == 10)))
    assert (one.weight, one.scheme, one.error, one.norm) == ("a.weight", "fp8", 3, pytest.approx(norm))
    assert (one.relative_error, one.change) == (pytest.approx(3 / norm), pytest.approx(2 * 32**0.5))
    assert (other.weight, other.error, other.relative_error, other.change) == ("b.weight", 0, 0, None)
    assert not any("differ" in note for note in result.notes)


@pytest.mark.parametrize("quantised_names", ["original", "loaded"])
def test_a_float_base_may_have_the_other_generation_of_names(quantised_names: str, tmp_path: Path) -> None:
    names = {"original": "vit.encoder.layer.0.attention.attention.query", "loaded": "vit.layers.0.attention.q_proj"}
    (other,) = names.keys() - {quantised_names}
    config = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
    layer = names[quantised_names]
    stored = {f"{layer}.weight": NUMBERS.to(torch.float8_e4m3fn), f"{layer}.weight_scale_inv": torch.full((1, 1), 0.5)}
    fp8 = {"quant_method": "fp8", "weight_block_size": [4, 8]}
    base = written(tmp_path / "base", stored, quantization_config=fp8, **config)
    original = written(tmp_path / "float", {f"{names[other]}.weight": WEIGHT + 1}, **config)
    change = peft_adapter(tmp_path / "adapter", {layer: (np.ones((1, 8)), np.full((4, 1), 2.0))})
    result = lora_export.merge(base, [change], tmp_path / "m", dequantize=True, float_base=original)
    assert result.report is not None
    (loss,) = result.report.quantisation
    assert (loss.weight, loss.error) == (f"{layer}.weight", pytest.approx(32**0.5))


def test_change_with_dora_is_what_was_measured(tmp_path: Path) -> None:
    base, original = quantised(tmp_path / "base"), floats(tmp_path / "float")
    magnitude = {"a.lora_magnitude_vector": np.full(4, 9, np.float32)}
    dora = peft_adapter(
        tmp_path / "dora",
        {"a": (np.ones((1, 8)), np.full((4, 1), 2.0))},
        magnitude,
        use_dora=True,
        modules_to_save=None,
    )
    result = lora_export.merge(base, [dora], tmp_path / "m", dequantize=True, float_base=original)
    assert result.report is not None
    total = WEIGHT.numpy() + 2
    expected = np.linalg.norm(total / np.linalg.norm(total, axis=1, keepdims=True) * 9 - WEIGHT.numpy())
    assert result.report.quantisation[0].change == pytest.approx(float(expected), rel=1e-5)


def test_large_weight_is_measured_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_export.storage import block_copy

    base, original = quantised(tmp_path / "base"), floats(tmp_path / "float")
    monkeypatch.setattr(block_copy, "BLOCK", 32)
    pieces: list[int] = []
    read = QuantisedTensor.read

    def counted(self: QuantisedTensor, *where: Any) -> Any:
        pieces.append(where[-1].stop - where[-1].start)
        return read(self, *where)

    monkeypatch.setattr(QuantisedTensor, "read", counted)
    result = lora_export.merge(
        base, [adapter(tmp_path / "adapter")], tmp_path / "m", dequantize=True, float_base=original
    )
    assert result.report is not None and result.report.quantisation[0].error == 3
    assert pieces == [1] * 8


def test_report_has_the_figures_as_text_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, original, own = quantised(tmp_path / "base"), floats(tmp_path / "float"), adapter(tmp_path / "adapter")
    line = ("merge", base, own, "--dequantize", "--float-base", original)
    code, document = answer(capsys, *line, "-o", tmp_path / "m")
    assert code == 0
    assert [(one["weight"], one["error"]) for one in document["quantisation"]] == [("a.weight", 3), ("b.weight", 0)]
    assert document["quantisation"][1]["change"] is None and document["quantisation"][0]["relative_error"] > 0.4
    assert call(*line, "-o", tmp_path / "n") == 0
    short = capsys.readouterr().out
    assert "quantisation error ‖Q-W‖/‖W‖ of 2 dequantised weights: 0 to 0.4" in short
    assert ", ‖Q-W‖/‖ΔW‖ of 1 of them: 0.265 to 0.265" in short
    assert call(*line, "-o", tmp_path / "o", "-v") == 0
    full = [text.split() for text in capsys.readouterr().out.splitlines()]
    assert ["b.weight", "fp8", "0", "0", "-"] in full
    assert ["3", "11.3"] in [words[-2:] for words in full if words and words[0] == "a.weight"]


def test_without_the_float_base_nothing_is_measured(tmp_path: Path) -> None:
    result = lora_export.merge(
        quantised(tmp_path / "base"), [adapter(tmp_path / "adapter")], tmp_path / "m", dequantize=True
    )
    assert result.report is not None and result.report.quantisation == ()


def test_other_checkpoint_is_refused_by_its_headers(tmp_path: Path) -> None:
    base, own = quantised(tmp_path / "base"), [adapter(tmp_path / "adapter")]
    other = written(tmp_path / "other", {"a.weight": torch.zeros(8, 4), "c.weight": torch.zeros(4, 8)})
    with pytest.raises(InputRefused) as refused:
        lora_export.merge(base, own, tmp_path / "m", dequantize=True, float_base=other)
    assert "other is not the float checkpoint of" in str(refused.value)
    assert "a.weight: is [8, 4] float32, and the base's is [4, 8]" in str(refused.value)
    assert "b.weight: no such weight" in str(refused.value)
    with pytest.raises(InputRefused, match=r"base is quantised \(fp8\)"):
        lora_export.merge(base, own, tmp_path / "m", dequantize=True, float_base=base)
    with pytest.raises(WrongUsage, match="float_base= needs dequantize=True"):
        lora_export.merge(base, own, tmp_path / "m", float_base=other)
    assert not (tmp_path / "m").exists()


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    base, own = quantised(tmp_path / "base"), [adapter(tmp_path / "adapter")]
    original = written(tmp_path / "float", {"a.weight": torch.full((4, 8), torch.nan), "b.weight": WEIGHT})
    with pytest.raises(InputRefused, match=r"a\.weight: .* has values that are not finite"):
        lora_export.merge(base, own, tmp_path / "m", dequantize=True, float_base=original)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "float"]


def test_figures_that_are_doubtful_are_explained(tmp_path: Path) -> None:
    base = quantised(tmp_path / "base", norm=torch.ones(4), same=torch.ones(4))
    original = written(
        tmp_path / "float",
        {"a.weight": -WEIGHT, "b.weight": WEIGHT, "norm": torch.full((4,), 2.0), "same": torch.ones(4)},
    )
    result = lora_export.merge(
        base, [adapter(tmp_path / "adapter")], tmp_path / "m", dequantize=True, float_base=original
    )
    notes = "\n".join(result.notes)
    assert "1 of 2 quantised weights differ from those of" in notes and "(a.weight: 200%)" in notes
    assert "norms or biases, which are not quantised, differ too: norm. AWQ and SmoothQuant scale layers so" in notes
