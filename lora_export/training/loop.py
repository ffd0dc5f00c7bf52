"""The training loop, for whatever parameters of a module require gradients.

accelerate gives the device, the other processes, the scale of the loss in fp16 and the norm of the gradients. Its
`prepare` of a model would give every tensor another name, and all that is trained here fits into one sum a step. The
examples of a step depend on its number alone, so that a training continues to the same bits.

It knows nothing of LoRA: the caller attaches an adapter with trainable branches, and reads it back afterwards. Frozen
parameters do not change, to the last bit.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lora_export.errors import ALLOCATION_FAILED, EnvironmentLacking, InputRefused, listed
from lora_export.extras import optional_package
from lora_export.options.spelling import named
from lora_export.options.train import Precision, TrainingSettings, TrainOptions
from lora_export.storage.system_calls import deferred_signals
from lora_export.training.batches import Batch, Data, batch_on_device, module_outputs, refuse_unknown_inputs
from lora_export.training.checkpoint import (
    METRICS,
    Checkpoints,
    EvaluationRecord,
    EventLog,
    StepRecord,
    TrainingHistory,
    norms_with_statistics,
    trained_tensors,
)
from lora_export.training.compiling import (
    PeakMemory,
    SavedActivations,
    autocast,
    compiled,
    fastest_products,
    memory_use,
)
from lora_export.training.evaluation import HeadLoss, evaluate_as_trained, head_loss
from lora_export.training.order import ShuffledOrder, learning_rate_factor, parts_of
from lora_export.training.padding import TextParts
from lora_export.training.processes import (
    is_sharded,
    leave_at_exit,
    move,
    rank,
    refuse_sharding,
    sum_gradients,
    sum_over_processes,
    world_size,
)

Device = Literal["cpu", "cuda"]
OnStep = Callable[[StepRecord, int, int], None]  # (the step, steps in all, peak memory in bytes)


def fit(
    module: nn.Module,
    data: Data,
    settings: TrainingSettings,
    *,
    device: Device = TrainOptions.device,
    held_out: Data | None = None,
    checkpoints: Checkpoints | None = None,
    resume: bool = False,
    log: EventLog | None = None,
    on_step: OnStep | None = None,
) -> TrainingHistory:
    """Train, in place, the parameters of `module` that require gradients, by AdamW.

    On the CPU the same seed gives the same bits; so does a training that was killed and is continued (`resume`) from
    its checkpoint, if there is one. Several processes (`accelerate launch`, `torchrun`) share the examples of each
    step. The module is left in eval mode, on the device. Batch norms that are not trained as a whole stay in eval mode
    throughout: their statistics belong to the base.

    Raises InputRefused for a loss that is not finite, where there is nothing to train, and where a frozen parameter
    gets a gradient; EnvironmentLacking without accelerate or the device, and where memory is short; OutputFailed for a
    checkpoint that cannot be written.
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise InputRefused("there is nothing to train: no parameter of the model requires a gradient")
    if settings.evaluates and held_out is None:
        raise InputRefused("evaluation, early stopping and the best checkpoint need held-out examples")
    accelerator = accelerator_for(device, settings.precision)
    refuse_unknown_inputs(module, data)
    move(module, accelerator.device)
    adamw = torch.optim.AdamW(
        _groups(module, settings), weight_decay=settings.weight_decay, fused=True if device == "cpu" else None
    )
    optimizer = accelerator.prepare(adamw)
    history = TrainingHistory(str(accelerator.device))
    head = head_loss(module, data, accelerator.device, settings.precision)
    run = _Run(module, data, settings, accelerator, optimizer, held_out, checkpoints, history, head, log)
    devices = [accelerator.device] if device == "cuda" else []
    with _restored_random_numbers(devices), _train_mode(module, settings), _explained_memory(), fastest_products():
        try:
            run.begin(resume=resume)
            run.steps(on_step)
        except KeyboardInterrupt:
            run.save()
            raise
        finally:
            if checkpoints is not None and rank() == 0:
                checkpoints.remove_if_empty()
            if log is not None:
                log.close()
            if settings.compile:
                torch.compiler.reset()  # graphs of this module, and their count, which has a limit
            accelerator.free_memory()
    return history


@dataclass
class _Run:
    """One training under way."""

    module: nn.Module
    data: Data
    settings: TrainingSettings
    accelerator: Any
    optimizer: Any  # as accelerate prepared it
    held_out: Data | None
    checkpoints: Checkpoints | None
    history: TrainingHistory
    head: HeadLoss | None
    log: EventLog | None

    def begin(self, *, resume: bool) -> None:
        self.order = ShuffledOrder(len(self.data), self.settings.batch_size, self.settings.seed)
        self.total = self.settings.epochs * self.order.steps_per_epoch
        self.trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.peak, self.activations = PeakMemory(self.accelerator.device), SavedActivations(self.module)
        self.best: dict[str, Tensor] = {}
        self.is_sharded = is_sharded(self.module)
        has_statistics = any(norms_with_statistics(self.module).values())
        # A compiled forward would be compiled again for the width of each part.
        self.is_whole = self.is_sharded or has_statistics or self.settings.compile
        self.parts = TextParts(self.module, self.data.loss, self.accelerator.device)
        self.loss = self.head or self.data.loss
        self.forward = compiled(self.module) if self.settings.compile else self.module
        if self.checkpoints is None:
            return
        if resume and self.checkpoints.exists:
            state = self.module, self.optimizer.optimizer, self.accelerator.scaler, self.history
            self.best = self.checkpoints.load(*state)
            self._evaluate_after(len(self.history.steps))  # where the evaluation was interrupted
            if rank() == 0:  # a killed training may have recorded steps after its checkpoint
                self.history.write(self.checkpoints.folder / METRICS)
                if self.log is not None:
                    self.log.write(self.history.latest)
        elif rank() == 0:
            self.checkpoints.begin()

    def steps(self, on_step: OnStep | None) -> None:
        """All steps that are left, with evaluations and checkpoints between them."""
        for step in range(len(self.history.steps), self.total):
            if 0 < self.settings.patience <= self.history.without_improvement():
                break
            begun = time.perf_counter()
            loss, tokens, rate = self._gradients_of(step)
            with deferred_signals():  # a checkpoint must not see half a step
                self._update()
                seconds = time.perf_counter() - begun
                epoch = self.order.epoch_of(step) + 1
                self.history.steps.append(StepRecord(step + 1, epoch, loss, rate, tokens, seconds))
            if not self.history.memory.weights:
                self.history.memory = memory_use(self.module, self.optimizer.optimizer, self.activations.bytes)
            self.optimizer.zero_grad()
            self._evaluate_after(step + 1)
            if self.checkpoints is not None and rank() == 0:
                self.checkpoints.record(self.history)
            if self.log is not None and rank() == 0:
                self.log.write(self.history.latest)
            if (step + 1) % self.settings.save_every == 0 and step + 1 < self.total:
                self.save()
            if on_step is not None:
                on_step(self.history.steps[-1], self.total, self.peak.peak)
        self.history.memory = replace(self.history.memory, peak=self.peak.peak)
        if self._is_finite():
            self.save()  # the output may fail to be written
        if self.settings.keep_best or self.settings.patience:
            with torch.no_grad():
                for name, tensor in trained_tensors(self.module).items():
                    tensor.copy_(self.best[name])
        # No loss follows the last update, which a gradient that is not finite would have spoilt.
        if not self._is_finite():
            raise self._divergence("weights are not finite after", len(self.history.steps))

    def _is_finite(self) -> bool:
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.trained)

    def save(self) -> None:
        """Write a checkpoint of the last whole step, where there is one."""
        if self.checkpoints is not None and self.history.steps and rank() == 0:
            state = self.module, self.optimizer.optimizer, self.accelerator.scaler, self.history
            with deferred_signals():
                self.checkpoints.save(*state, self.best)

    def _gradients_of(self, step: int) -> tuple[float, int, float]:
        """Compute a step's gradients. Returns its loss, its tokens, and its learning rate."""
        settings, epoch = self.settings, self.order.epoch_of(step) + 1
        seed = settings.seed * 1_000_003 + step * 1009 + rank()
        rows = self.order.rows_of(step)
        parts = parts_of(rows, settings.accumulate, rank=rank(), processes=world_size())
        batches = [batch for part in parts for batch in self._batches(self.data.batch(part, epoch))]
        torch.manual_seed(seed % 2**63)  # of dropout
        np.random.seed(seed % 2**32)  # of the parts of a sound that speech models of transformers mask
        own_count = sum(self.data.loss.count(batch.labels) for batch in batches)
        (count,) = sum_over_processes([float(own_count)], self.accelerator.device)
        total = 0.0
        for number, batch in enumerate([*batches, *self._idle_batches(rows, len(parts), epoch)]):
            with self.activations.counted() if not self.activations.bytes else contextlib.nullcontext():
                as_states = self.head.hidden_states() if self.head else contextlib.nullcontext()
                with autocast(self.accelerator.device, settings.precision), as_states:
                    outputs = module_outputs(self.module, batch.inputs, self.forward)
                value = self.loss.total(outputs, batch) / max(count, 1)  # 0, not NaN, where every label is ignored
            value = value if number < len(batches) else 0 * value
            total += value.item()
            self.peak.measure()
            if math.isfinite(total) or self.is_sharded:  # the others are in their backward pass, too
                self.accelerator.backward(value)
            del outputs, value
        total, tokens = sum_over_processes([total, float(sum(map(_tokens_in, batches)))], self.accelerator.device)
        if not math.isfinite(total):
            raise self._divergence(f"the loss is {total} at", step + 1)
        if not self.history.memory.weights:  # the first step of this process: a forward does the same in each
            self._refuse_gradients_of_the_base()
        rate = settings.learning_rate * learning_rate_factor(settings.schedule, step, self.total, settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        return total, int(tokens), rate

    def _batches(self, batch: Batch) -> list[Batch]:
        """A batch on the device, in parts with less padding where they change nothing but the time."""
        return [batch_on_device(batch, self.accelerator.device)] if self.is_whole else self.parts.of(batch)

    def _idle_batches(self, rows: Sequence[int], parts: int, epoch: int) -> list[Batch]:
        """Batches that do not count, so that every process runs a base in shares equally often."""
        if not self.is_sharded:
            return []
        most = len(parts_of(rows, self.settings.accumulate, rank=0, processes=world_size()))  # no process has more
        batch = batch_on_device(self.data.batch(rows[:1], epoch), self.accelerator.device)
        return [batch] * (most - parts)

    def _update(self) -> None:
        sum_gradients(self.trained)
        self.accelerator.clip_grad_norm_(self.trained, self.settings.max_gradient_norm)
        self.optimizer.step()

    def _divergence(self, what: str, step: int) -> InputRefused:
        kept = ""
        if self.checkpoints is not None and self.checkpoints.exists:
            kept = f". The last checkpoint is in {self.checkpoints.folder}: {named('resume', True)} continues from it"
        return InputRefused(
            f"{what} step {step} of {self.total}: training has diverged. Try a lower learning rate{kept}"
        )

    def _refuse_gradients_of_the_base(self) -> None:
        trained = set(self.trained)
        named = self.module.named_parameters()
        if leaks := [name for name, parameter in named if parameter.grad is not None and parameter not in trained]:
            raise InputRefused("the base is frozen, but its forward gives gradients to:", listed(leaks))

    def _evaluate_after(self, step: int) -> None:
        every = self.settings.evaluate_every or self.order.steps_per_epoch
        is_due = step % every == 0 or step == self.total
        is_made = any(record.step == step for record in self.history.evaluations)
        if self.held_out is None or not self.settings.evaluates or not is_due or is_made:
            return
        score = evaluate_as_trained(self.module, self.held_out, self.settings, self.accelerator.device)
        if not math.isfinite(score.loss):
            raise self._divergence(f"the held-out loss is {score.loss} after", step)
        with deferred_signals():  # a checkpoint must not see the one without the other
            self.history.evaluations.append(EvaluationRecord(step, score.loss, score.accuracy))
            if self.history.best is self.history.evaluations[-1]:
                self.best = {name: tensor.detach().clone() for name, tensor in trained_tensors(self.module).items()}


def accelerator_for(device: Device, precision: Precision) -> Any:
    """accelerate's Accelerator on this device. Joins the other processes, where a launcher started several.

    Raises EnvironmentLacking without accelerate or the device, WrongUsage where it would distribute the base.
    """
    refuse_sharding()
    if device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentLacking(
            f"PyTorch finds no CUDA device; train with {named('device', 'cpu')}, or see `lora-export doctor`"
        )
    accelerate = optional_package("accelerate", "training needs", "train")
    try:
        # Its precision is one for the whole process. bf16 is autocast alone; fp16 has a scale of the loss.
        mixed = "fp16" if precision == "fp16" else "no"
        accelerator = accelerate.Accelerator(cpu=device == "cpu", mixed_precision=mixed)
    except ValueError as error:  # its state is one per process
        raise EnvironmentLacking(f"accelerate cannot train on {device} in precision {precision}: {error}") from error
    leave_at_exit()
    return accelerator


def _groups(module: nn.Module, settings: TrainingSettings) -> list[dict[str, Any]]:
    """The trained parameters: B apart, where its learning rate is another one."""
    groups: dict[float, list[nn.Parameter]] = {1.0: []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(settings.b_ratio if ".lora_B." in f".{name}." else 1.0, []).append(parameter)
    rate = settings.learning_rate
    return [{"params": params, "ratio": ratio, "lr": rate * ratio} for ratio, params in groups.items() if params]


@contextlib.contextmanager
def _restored_random_numbers(devices: Sequence[torch.device]) -> Iterator[None]:
    """Leave the random numbers of PyTorch and NumPy as they were."""
    state = np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        np.random.set_state(state)


@contextlib.contextmanager
def _train_mode(module: nn.Module, settings: TrainingSettings) -> Iterator[None]:
    module.train()
    for path, is_trained in norms_with_statistics(module).items():
        module.get_submodule(path).train(is_trained)
    if settings.gradient_checkpointing:
        if not hasattr(module, "activation_checkpointing_enable"):
            raise InputRefused("gradient checkpointing needs a model of transformers: only that knows its blocks")
        if not module.supports_gradient_checkpointing:
            raise InputRefused(f"{type(module).__name__} does not support gradient checkpointing")
        whole: Any = module
        whole.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        if settings.gradient_checkpointing:
            whole.activation_checkpointing_disable()
        module.eval()


@contextlib.contextmanager
def _explained_memory() -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_short = isinstance(error, MemoryError | torch.OutOfMemoryError) or ALLOCATION_FAILED in str(error)
        if not is_short:
            raise
        raise EnvironmentLacking(
            f"there is not enough memory to train. What helps: a smaller {named('batch_size')}, more parts "
            f"({named('accumulate')}), {named('max_length')}, {named('gradient_checkpointing', True)}, "
            f"{named('precision', 'bf16')}, {named('base_dtype', 'bfloat16')} or {named('quantize_base', 'nf4')}"
        ) from error


def _tokens_in(batch: Batch) -> int:
    """The tokens of a batch without padding; its examples, where they are no tokens."""
    if isinstance(mask := batch.inputs.get("attention_mask"), Tensor):
        return int(mask.sum())
    if isinstance(ids := batch.inputs.get("input_ids"), Tensor):
        return int(ids.numel())
    first = next(iter(batch.inputs.values()))
    return len(first) if isinstance(first, Tensor) and first.ndim else 1
