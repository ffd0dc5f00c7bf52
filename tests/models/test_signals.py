"""Sounds and series in the layouts that models of transformers take. Each layout is run by a model of its family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

from lora_export.models.generated_inputs import generated_inputs
from support.more_models import MORE_MODELS

FOLDER = Path("no-such-folder")


def of(name: str) -> hf.PreTrainedModel:
    architecture, config = MORE_MODELS[name]
    torch.manual_seed(0)
    return getattr(hf, architecture)(config()).eval()


def encodec() -> hf.PreTrainedModel:
    config = hf.EncodecConfig(num_filters=4, hidden_size=16, codebook_size=16, upsampling_ratios=[4, 2])
    return hf.EncodecModel(config).eval()


@pytest.mark.parametrize(
    ("model", "axes"),
    [
        (lambda: of("parakeet"), {"input_features": {0: "batch", 1: "frames"}}),
        (encodec, {"input_values": {0: "batch", 2: "samples"}}),
        (lambda: of("patchtst"), {"past_values": {0: "batch"}}),
        (lambda: of("patchtsmixer"), {"past_values": {0: "batch"}}),
        (
            lambda: of("moonshine"),
            {"input_values": {0: "batch", 1: "samples"}, "decoder_input_ids": {0: "batch", 1: "target"}},
        ),
    ],
)
def test_a_model_takes_the_signal_of_its_layout(model, axes) -> None:
    module = model()
    inputs = generated_inputs(module, FOLDER)
    assert inputs.axes == axes
    sizes = (
        inputs.sizes | {"batch": 3} | {symbol: inputs.sizes[symbol] + 2 * step for symbol, step in inputs.steps.items()}
    )
    with torch.no_grad():
        first, second = (
            module(**inputs.make(wanted, torch.Generator().manual_seed(0))) for wanted in (inputs.sizes, sizes)
        )
    varying = next((name for name in ("frames", "samples") if name in inputs.sizes), None)
    one, other = (next(iter(outputs.values())).shape for outputs in (first, second))
    assert other[0] == 3 * one[0] // 2
    if varying and "decoder_input_ids" not in axes:
        assert one[1:] != other[1:]  # the step changes the number of frames that the model makes of it
