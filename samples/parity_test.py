"""A parity test for your own suite: the file that you ship computes what the model computes.

    pytest samples/parity_test.py

Here a small model gets an adapter and is exported in the test. In your suite you name your own: the file, the model
(a Hugging Face folder, `file.py:factory`, or a module with example inputs) and the folder of the adapter.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lora_export as le
from lora_export.testing import ParityFailed, assert_parity


def a_model() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)), torch.randn(2, 8)


def an_adapter(module: nn.Module) -> le.Adapter:
    """An adapter with a random B. A new adapter has B = 0: it changes nothing, and a check of it could not fail."""
    fresh = le.create_adapter(module, targets="all-linear", rank=2, alpha=4, seed=0)
    rng = np.random.default_rng(0)
    pairs = {
        name: le.LoraPair(a=pair.a, b=rng.standard_normal(pair.b.shape) / 4, scale=pair.scale)
        for name, pair in fresh.pairs.items()
    }
    return dataclasses.replace(fresh, pairs=pairs)


def merged(strength: float) -> nn.Module:
    module = copy.deepcopy(a_model()[0])
    le.fold_module(module, le.make_plan([an_adapter(module)], le.module_specs(module), strengths=[strength]))
    return module


def test_what_we_ship_is_the_model_with_its_adapter(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.jit.save(torch.jit.trace(merged(1.0), a_model()[1]), file)
    proof = assert_parity(file, a_model(), an_adapter(a_model()[0]))
    assert max(compared.figures.relative_to_effect for compared in proof.verdict.comparisons if compared.figures) < 1e-4


def test_this_test_can_fail() -> None:
    with pytest.raises(ParityFailed, match=r"every adapter scale × 1\.1"):
        assert_parity(merged(1.1), a_model(), an_adapter(a_model()[0]))
