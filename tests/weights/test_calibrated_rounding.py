"""Rounding with feedback through the inputs of a layer: every grid, and what an audit says of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_export import plan
from lora_export.api.load import load_adapters
from lora_export.errors import InputRefused
from lora_export.plan import Plan
from lora_export.verification.against_checkpoint import Audit, CalibratedLayer, audit
from lora_export.weights.calibrated_rounding import LayerInputs, StoredInputs
from lora_export.weights.checkpoint import Checkpoint, open_checkpoint
from lora_export.weights.merge import merge_checkpoint
from lora_export.weights.merge_report import OutputResult, StepResult, refuse_below_rounding
from lora_export.weights.quantised_layers import keep_quantised, why_promoted
from support.handmade import peft_adapter
from support.quantised_weights import WEIGHTS, quantised, weights_in

WEIGHT = "a.fc.weight"
FLOATS = ["bfloat16", "float16"]
KINDS = [kind for kind in WEIGHTS if kind != "mxfp4"]  # that one has experts, which no linear layer has


def base_of(folder: Path, kind: str) -> Path:
    """A base of one linear layer, quantised or of 16 bits."""
    folder.mkdir()
    stored, config = quantised(kind, "a.fc") if kind in WEIGHTS else ({}, {})
    if kind in FLOATS:
        torch.manual_seed(0)
        stored = {WEIGHT: (torch.randn(24, 96) / 10).to(getattr(torch, kind))}
    save_file(stored | {"norm.weight": torch.ones(4)}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"dtype": "float32", "quantization_config": config}))
    if kind in FLOATS:
        (folder / "config.json").write_text("{}")
    return folder


def inputs_of(columns: int) -> LayerInputs:
    """Inputs that are correlated, as those of trained models are."""
    rng = np.random.default_rng(3)
    directions = rng.normal(size=(columns, columns)) * np.arange(1, columns + 1)[:, None] ** -1.5
    found = []
    for count in (600, 200):
        rows = StoredInputs(columns, count + 10)
        rows.add((rng.normal(size=(count, columns)) @ directions).astype(np.float32))
        found.append(rows)
    return LayerInputs(*found)


def adapter_of(folder: Path, weight: np.ndarray, inputs: LayerInputs, size: float) -> Path:
    """An adapter whose A is in the span of the inputs, as that of a trained one is. `size` is relative to W."""
    rng = np.random.default_rng(1)
    a = inputs.fitted.read()[:2]
    b = rng.normal(size=(len(weight), 2)).astype(np.float32)
    b[0] = 0  # an output without a change
    b *= size * np.linalg.norm(weight.astype(np.float64)) / np.linalg.norm(b @ a)
    return peft_adapter(folder, {"a.fc": (a, b)})


class Merged:
    """A merge of one layer with calibration, and its audit."""

    def __init__(self, folder: Path, kind: str, size: float, *, is_fed_back: bool = True):
        self.is_quantised = kind in WEIGHTS
        self.base_path, self.out = base_of(folder / "base", kind), folder / "out"
        self.before = self._weight(self.base_path)
        rows = inputs_of(self.before.shape[1])
        self.inputs = LayerInputs(rows.fitted, rows.held_out, is_fed_back)
        self.adapter = adapter_of(folder / "adapter", self.before, self.inputs, size)
        base = self.opened(self.base_path)
        self.plan: Plan = plan.make(load_adapters([self.adapter]), base.specs, may_add=True)
        self.out.mkdir()
        layers = {WEIGHT: self.inputs}
        if self.is_quantised:
            base, (self.layer,) = keep_quantised(self.plan, base, 0.0, calibration=layers)
            assert self.layer.is_kept, self.layer.why
        (self.result,) = merge_checkpoint(
            self.plan, base, self.out, min_retention=0.0, calibration=layers, more_settings={"calibration": "7"}
        ).results
        self.after = self._weight(self.out)

    def opened(self, folder: Path) -> Checkpoint:
        return open_checkpoint(folder, dequantise=self.is_quantised)

    def _weight(self, folder: Path) -> np.ndarray:
        if self.is_quantised:
            return weights_in(folder)[WEIGHT].astype(np.float64)
        found: np.ndarray = load_file(folder / "model.safetensors")[WEIGHT].double().numpy()
        return found

    def judged(self, *, calibrated: bool = True, inputs: bool = True) -> Audit:
        layer = CalibratedLayer(self.inputs if inputs else None)
        layers = {WEIGHT: layer} if calibrated else {}
        return audit(self.plan, self.opened(self.base_path), self.opened(self.out), calibrated=layers)

    def errors(self, weight: np.ndarray) -> float:
        """Of outputs on the held-out inputs, relative to the effect, in fp64."""
        a, b = (self.plan.steps[0].terms[0].pair.a, self.plan.steps[0].terms[0].pair.b)
        change = self.plan.steps[0].terms[0].scale * b.astype(np.float64) @ a.astype(np.float64)
        rows = self.inputs.held_out.read().astype(np.float64)
        moved = weight.astype(np.float64) - self.before - change
        return float(np.linalg.norm(rows @ moved.T) / np.linalg.norm(rows @ change.T))


@pytest.mark.parametrize("kind", [*KINDS, *FLOATS])
def test_outputs_get_nearer_on_every_grid(kind: str, tmp_path: Path) -> None:
    merged = Merged(tmp_path, kind, 1e-3 if kind in FLOATS else 0.1)
    outputs = merged.result.outputs
    assert outputs is not None and outputs.is_calibrated
    assert outputs.error < 0.9 * outputs.nearest_error and abs(outputs.retention - 1) < 0.25
    assert outputs.error == pytest.approx(merged.errors(merged.after), rel=0.05, abs=0.01)
    if merged.is_quantised:
        assert merged.layer.outputs == outputs
    record = json.loads((merged.out / "lora_export.json").read_text())
    assert WEIGHT in json.dumps(record) and '"calibrated"' in json.dumps(record)
    assert str(merged.judged()).startswith("same")
    assert not str(merged.judged(calibrated=False)).startswith("same")


@pytest.mark.parametrize("kind", ["compressed int8", "bfloat16"])
@pytest.mark.parametrize("has_inputs", [True, False])
def test_defects_of_calibrated_layers_are_detected(kind: str, has_inputs: bool, tmp_path: Path) -> None:
    merged = Merged(tmp_path, kind, 1e-3)
    right = load_file(merged.out / "model.safetensors")[WEIGHT]
    old = load_file(merged.base_path / "model.safetensors")[WEIGHT]

    def judged_with(weight: torch.Tensor) -> str:
        path = merged.out / "model.safetensors"
        save_file(load_file(path) | {WEIGHT: weight}, path, {"format": "pt"})
        return str(merged.judged(inputs=has_inputs))

    for row, steps in ((3, 2), (0, 1)):  # beyond the values around the sum; and where nothing changes
        damaged = right.clone()
        bits = damaged.view(torch.int16 if kind == "bfloat16" else torch.int8)
        bits[row, 5] += steps if bits[row, 5] < 100 else -steps
        assert judged_with(damaged).startswith("different")
    assert judged_with(old).startswith("different" if has_inputs or kind == "bfloat16" else "undecided")
    assert judged_with(right).startswith("same" if has_inputs or kind == "bfloat16" else "undecided")
    if has_inputs:  # each number is one of the two around the sum, and the choice was not made by the inputs
        is_even = torch.arange(right.shape[1]) % 2 == 0
        assert judged_with(torch.where(is_even, right, old)).startswith("different")


def test_nearest_is_only_measured(tmp_path: Path) -> None:
    merged = Merged(tmp_path, "compressed int4", 0.1, is_fed_back=False)
    outputs = merged.result.outputs
    assert outputs is not None and not outputs.is_calibrated
    assert (outputs.error, outputs.retention) == (outputs.nearest_error, outputs.nearest_retention)
    assert outputs.error == pytest.approx(merged.errors(merged.after), rel=1e-2)
    assert str(merged.judged(calibrated=False)).startswith("same")
    assert "the record names it calibrated, and its numbers are rounded to nearest" in str(merged.judged())


def test_layer_that_gets_no_better_keeps_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lora_export.weights.calibrated_rounding._fed_back",
        lambda _, total, nearest, other: np.random.default_rng(0).random(total.shape) < 0.5,
    )
    merged = Merged(tmp_path, "bfloat16", 1e-3)
    assert merged.result.outputs is not None and not merged.result.outputs.is_calibrated
    assert str(merged.judged(calibrated=False)).startswith("same")


def test_numbers_without_a_change_stay(tmp_path: Path) -> None:
    merged = Merged(tmp_path, "compressed int4", 0.1)
    step = merged.plan.steps[0]
    assert np.array_equal(merged.after[0], merged.before[0])
    moved = merged.after != merged.before
    change = step.terms[0].scale * step.terms[0].pair.b @ step.terms[0].pair.a
    assert moved.any() and (np.sign((merged.after - merged.before)[moved]) == np.sign(change[moved])).all()


def test_gates_judge_outputs() -> None:
    result = StepResult("w", 0.01, retention=0.1, noise=3.0, changed=1, elements=2)
    outputs = OutputResult(0.9, 0.2, 0.4, 0.8, is_calibrated=True)
    assert why_promoted(result, 0.5) == "10.0% of its change would be left"
    assert not why_promoted(replace(result, outputs=outputs), 0.5)
    assert why_promoted(replace(result, outputs=replace(outputs, error=1.5)), 0.5).startswith("the noise")
    refuse_below_rounding([replace(result, outputs=outputs)], 0.5)
    with pytest.raises(InputRefused, match=r"w: 10.0% of the change kept(.|\n)*rounds it to its type with feedback"):
        refuse_below_rounding([result], 0.5)
    with pytest.raises(InputRefused, match=r"w: 90.0% of the change kept(.|\n)*No rounding to its type keeps it"):
        refuse_below_rounding([replace(result, outputs=outputs)], 0.95)
