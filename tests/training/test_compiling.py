"""Compiled steps, autocast, and the memory of a training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

import lora_export as le
from lora_export import layers, plan
from lora_export.errors import EnvironmentLacking
from lora_export.options.train import TrainingSettings
from lora_export.training.batches import ArrayData
from lora_export.training.compiling import (
    PeakMemory,
    SavedActivations,
    autocast,
    compiled,
    memory_use,
    refuse_without_compiler,
)
from lora_export.training.loop import fit
from support.api import MODEL
from support.tiny_models import tiny_llama


@pytest.fixture
def no_compiler() -> Iterator[None]:
    from torch._inductor import config

    torch.compiler.reset()
    with config.patch({"cpp.cxx": ("/no/such/compiler",), "force_disable_caches": True}):
        yield
    torch.compiler.reset()


@pytest.mark.slow
def test_compiled_steps_have_the_losses_of_the_others() -> None:
    base = tiny_llama(vocab_size=60, hidden_size=16, num_hidden_layers=2, intermediate_size=32)
    new = layers.create_adapter(base, targets="all-linear", rank=2, alpha=4, seed=0)
    ids = (torch.arange(9) + torch.arange(24)[:, None]) % 60  # each token follows from the one before it
    histories, modules = [], []
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for compile in (False, True):
        module = copy.deepcopy(base)
        layers.attach(module, plan.make([new], layers.specs(module), identity_ok=True), trainable=True)
        settings = TrainingSettings(epochs=3, learning_rate=0.05, batch_size=8, seed=0, compile=compile)
        data = ArrayData({"input_ids": ids[:, :-1]}, ids[:, 1:].contiguous())
        histories.append(fit(module, data, settings))
        modules.append(module)
    plain, fast = histories
    assert fast.losses == pytest.approx(plain.losses, abs=1e-5)
    assert fast.losses[-1] < fast.losses[0] - 0.1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]  # one graph: nothing of an adapter breaks it
    for name, value in modules[0].state_dict().items():
        torch.testing.assert_close(modules[1].state_dict()[name], value, rtol=1e-3, atol=1e-5)


def test_a_machine_without_a_compiler_is_refused_before_the_data_are_read(tmp_path: Path, no_compiler: None) -> None:
    with pytest.raises(EnvironmentLacking, match=r"cannot compile any function here: .*\. Train without compile=True$"):
        le.train(MODEL, tmp_path / "none.npz", tmp_path / "ad", compile=True)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_compiled_is_named(no_compiler: None) -> None:
    with pytest.raises(EnvironmentLacking, match="cannot compile Linear here: "):
        compiled(torch.nn.Linear(2, 2))(input=torch.ones(1, 2))


@pytest.mark.slow
def test_a_machine_with_a_compiler_is_not() -> None:
    torch.compiler.reset()
    refuse_without_compiler("cpu")


@pytest.mark.parametrize(
    ("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_products_are_in_the_dtype_of_the_precision(precision: str, dtype: torch.dtype) -> None:
    one = torch.ones(2, 2)
    with autocast("cpu", precision):  # type: ignore[arg-type]
        assert (one @ one).dtype is dtype
    assert (one @ one).dtype is torch.float32


def test_weights_gradients_optimiser_and_activations_are_counted_by_hand() -> None:
    module = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    module[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([module[2].weight])
    saved = SavedActivations(module)
    with saved.counted():
        out = module(torch.ones(10, 8))
    out.sum().backward()
    optimizer.step()
    use = memory_use(module, optimizer, saved.bytes)
    assert use.weights == 4 * (8 * 16 + 16 * 4)
    assert use.gradients == 4 * 16 * 4
    assert use.optimizer == 2 * 4 * 16 * 4 + 4  # two moments and the count of steps
    assert use.activations == 4 * 10 * 16  # the input of the trained layer


def test_weights_that_autograd_keeps_are_no_activations() -> None:
    module = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    saved = SavedActivations(module)
    with saved.counted():
        module(torch.ones(10, 8))  # the gradient of the first layer needs the second one's weight
    assert saved.bytes == 4 * (10 * 8 + 10 * 16)


def test_shared_weights_count_once() -> None:
    module = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)])
    module[1].weight = module[0].weight
    assert memory_use(module, torch.optim.AdamW(module.parameters()), 0).weights == 4 * 64


def test_a_weight_in_4_bits_counts_with_its_scales() -> None:
    layer = bnb.nn.Linear4bit(256, 512, bias=False, quant_type="nf4").to("cpu")
    use = memory_use(layer, torch.optim.AdamW([nn.Parameter(torch.ones(1))]), 0)
    blocks = 256 * 512 // 64
    tables = 4 * 16 + 4 * 256  # of the values, and of the scales
    assert use.weights == 256 * 512 // 2 + blocks + 4 * blocks // 256 + 4 + tables


def test_the_peak_is_the_largest_measured() -> None:
    peak = PeakMemory(torch.device("cpu"))
    peak.measure()
    assert peak.peak > 2**20
