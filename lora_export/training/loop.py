"""The training loop, for whatever parameters of a module require gradients.

It knows nothing of LoRA: the caller attaches an adapter with trainable branches, and reads it back afterwards. Frozen
parameters do not change, to the last bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lora_export.errors import EnvironmentLacking, InputRefused
from lora_export.training.batches import Data, batches, refuse_unknown_inputs
from lora_export.training.losses import Loss, loss_for, module_scores

MAX_GRADIENT_NORM = 1.0  # gradients are clipped to it

OnStep = Callable[[int, int, float], None]  # (steps done, steps in all, loss)


@dataclass(frozen=True)
class TrainingHistory:
    """Loss and duration of every step."""

    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    peak_bytes: int  # on CUDA of all tensors; on the CPU of the process, measured between forward and backward
    device: str

    def __str__(self) -> str:
        return (
            f"{len(self.losses):,} steps on {self.device} in {sum(self.seconds):.1f} s, "
            f"loss {self.losses[0]:.4g} -> {self.losses[-1]:.4g}, peak memory {self.peak_bytes / 2**20:,.0f} MiB"
        )


def fit(
    module: nn.Module,
    data: Data,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    loss: Loss | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    precision: Literal["no", "fp16", "bf16"] = "no",
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    on_step: OnStep | None = None,
) -> TrainingHistory:
    """Train, in place, the parameters of `module` that require gradients: AdamW, warm-up and linear decay.

    `loss` is chosen by the labels' type unless it is passed; `warmup` is the part of all steps, from 0 to 1;
    `precision` is that of autocast. On the CPU the same seed gives the same bits. The module is left in eval mode, on
    the device. Frozen batch norms stay in eval mode throughout: their statistics belong to the base.
    Raises InputRefused for a loss that is not finite, and where there is nothing to train; and
    EnvironmentLacking without accelerate or the device.
    """
    _refuse_settings(epochs, batch_size, learning_rate, warmup)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise InputRefused("there is nothing to train: no parameter of the model requires a gradient")
    refuse_unknown_inputs(module, data)
    accelerator = _accelerator(device, precision)
    with torch.random.fork_rng(devices=[accelerator.device] if device == "cuda" else []):
        torch.manual_seed(seed)
        model, optimizer, loader = accelerator.prepare(
            _Scores(module),
            torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay),
            batches(data, batch_size, torch.Generator().manual_seed(seed)),
        )
        _to_train_mode(module)
        try:
            run = _Run(accelerator, model, optimizer, loader, parameters)
            return _run_steps(run, epochs=epochs, warmup=warmup, loss=loss, on_step=on_step)
        finally:
            module.eval()
            accelerator.free_memory()


def _refuse_settings(epochs: int, batch_size: int, learning_rate: float, warmup: float) -> None:
    if epochs < 1 or batch_size < 1 or not 0 < learning_rate < math.inf or not 0 <= warmup < 1:
        raise InputRefused(
            f"epochs {epochs}, batch size {batch_size}, learning rate {learning_rate} and warm-up {warmup}: the first "
            "three must be positive, and the last from 0 to below 1"
        )


class _Run(NamedTuple):
    """What accelerate prepared, and the parameters to train."""

    accelerator: Any
    model: Any
    optimizer: Any
    loader: Any
    parameters: Sequence[nn.Parameter]


def _run_steps(run: _Run, *, epochs: int, warmup: float, loss: Loss | None, on_step: OnStep | None) -> TrainingHistory:
    accelerator, model, optimizer, loader, parameters = run
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, _warm_up_and_decay(steps, warmup))
    losses: list[float] = []
    seconds: list[float] = []
    memory = _PeakMemory(accelerator.device)
    started = time.perf_counter()
    for inputs, labels in (batch for _ in range(epochs) for batch in loader):
        with accelerator.autocast():
            scores = model(**inputs)
        value = (loss or loss_for(labels))(scores, labels)
        losses.append(_finite(value.item(), step=len(losses) + 1, steps=steps))
        memory.measure()
        accelerator.backward(value)
        accelerator.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        now = time.perf_counter()
        seconds.append(now - started)
        started = now
        if on_step is not None:
            on_step(len(losses), steps, losses[-1])
    return TrainingHistory(tuple(losses), tuple(seconds), memory.peak, str(accelerator.device))


class _Scores(nn.Module):
    """The module as accelerate wraps it: accelerate's patches and attributes stay on this wrapper."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, **inputs: Tensor) -> Tensor:
        return module_scores(self.module, inputs)


def _accelerator(device: Literal["cpu", "cuda"], precision: Literal["no", "fp16", "bf16"]) -> Any:
    if device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentLacking("PyTorch finds no CUDA device; train with --device cpu, or see `lora-export doctor`")
    try:
        import accelerate
    except ImportError as error:
        raise EnvironmentLacking("training needs accelerate: pip install 'lora-export[train]'") from error
    try:
        return accelerate.Accelerator(cpu=device == "cpu", mixed_precision=precision)
    except ValueError as error:  # its state is one per process
        raise EnvironmentLacking(f"accelerate cannot train on {device} in precision {precision}: {error}") from error


def _warm_up_and_decay(steps: int, warmup: float) -> Callable[[int], float]:
    """The factor of the learning rate by step: linear up to 1 over the warm-up, then linear down to 0 after the end."""
    warm = min(round(steps * warmup), steps - 1)

    def factor(step: int) -> float:
        return (step + 1) / (warm + 1) if step < warm else (steps - step) / (steps - warm)

    return factor


def _to_train_mode(module: nn.Module) -> None:
    module.train()
    for part in module.modules():
        if isinstance(part, _NormBase) and not any(parameter.requires_grad for parameter in part.parameters()):
            part.eval()


def _finite(loss: float, *, step: int, steps: int) -> float:
    if not math.isfinite(loss):
        raise InputRefused(
            f"the loss is {loss} at step {step} of {steps}: training has diverged. Try a lower learning rate. "
            "Nothing was written."
        )
    return loss


class _PeakMemory:
    """The largest memory measured since it was created, in bytes."""

    def __init__(self, device: torch.device):
        self.device = device
        self.peak = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def measure(self) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            import psutil  # comes with accelerate

            self.peak = max(self.peak, psutil.Process().memory_info().rss)
