"""Make an adapter: train whatever in a module requires gradients.

Nothing here knows of LoRA: the caller attaches an adapter with trainable branches, and reads it
back afterwards. What is frozen is the same afterwards, to the last bit.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.data import DataLoader

from lora_export.errors import EnvironmentLacking, InputRefused
from lora_export.training.data import IGNORED, Examples

CLIP = 1.0  # the norm that gradients are clipped to

# --- Batches ---

Batch = tuple[dict[str, Tensor], Tensor]  # keyword arguments of forward, and labels


class Data(Protocol):
    """Examples as a module takes them."""

    @property
    def labels(self) -> Tensor: ...

    def batch(self, rows: Sequence[int]) -> Batch:
        """The examples in these rows."""
        ...


@dataclass(frozen=True, eq=False)
class ArrayData:
    """Examples that are arrays already."""

    inputs: Mapping[str, Tensor]
    labels: Tensor

    def batch(self, rows: Sequence[int]) -> Batch:
        return {name: values[rows] for name, values in self.inputs.items()}, self.labels[rows]


@dataclass(frozen=True, eq=False)
class TokenData:
    """Tokenised texts, padded to the longest of each batch."""

    tokens: Sequence[Mapping[str, Sequence[int]]]
    labels: Tensor
    tokenizer: Any  # transformers' PreTrainedTokenizerBase

    def batch(self, rows: Sequence[int]) -> Batch:
        padded = self.tokenizer.pad([self.tokens[row] for row in rows], return_tensors="pt")
        return dict(padded), self.labels[rows]


def arrays(examples: Examples) -> ArrayData:
    """Examples from an .npz, for any module."""
    if examples.texts:
        raise InputRefused("the examples are texts, and the model has no tokenizer: give it arrays (.npz)")
    inputs = {name: torch.from_numpy(values) for name, values in examples.inputs.items()}
    return ArrayData(inputs, torch.from_numpy(examples.labels))


def tokenised(examples: Examples, tokenizer: Any, *, max_length: int = 256) -> TokenData:
    """Texts through a Hugging Face tokenizer, cut at `max_length` tokens (or where the model ends, if earlier)."""
    if not examples.texts:
        raise InputRefused("the examples are arrays, not texts: there is nothing to tokenise")
    if tokenizer.pad_token is None:
        raise InputRefused("the tokenizer has no padding token, so that texts of different lengths make no batch")
    limit = min(max_length, tokenizer.model_max_length)
    encoded = tokenizer(list(examples.texts), truncation=True, max_length=limit)
    tokens = [{name: encoded[name][row] for name in encoded} for row in range(len(examples))]
    return TokenData(tokens, torch.from_numpy(examples.labels), tokenizer)


def _loader(data: Data, batch_size: int, shuffled_by: torch.Generator | None = None) -> DataLoader[Batch]:
    rows: Any = range(len(data.labels))  # a Dataset of row numbers; `batch` makes the rest of them
    return DataLoader(
        rows, batch_size=batch_size, shuffle=shuffled_by is not None, generator=shuffled_by, collate_fn=data.batch
    )


# --- Losses ---

Loss = Callable[[Tensor, Tensor], Tensor]  # (the module's scores, labels) -> a scalar


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """For int64 labels of shape (n, ...) and scores of shape (n, ..., classes)."""
    if scores.shape[:-1] != labels.shape:
        raise InputRefused(f"the model's scores are {tuple(scores.shape)}, the labels {tuple(labels.shape)}")
    if labels.max() >= scores.shape[-1]:
        raise InputRefused(f"there is a label {int(labels.max())}, but the model scores {scores.shape[-1]} classes")
    total = F.cross_entropy(scores.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)  # a batch with nothing to judge is 0, not NaN


def squared_error(scores: Tensor, labels: Tensor) -> Tensor:
    """For float labels; a trailing dimension of 1 in the scores is no other shape."""
    # Never broadcast: (n, 1) against (n,) would compare every example with every other.
    if scores.shape not in (labels.shape, (*labels.shape, 1)):
        raise InputRefused(f"the model's outputs are {tuple(scores.shape)}, the labels {tuple(labels.shape)}")
    return F.mse_loss(scores.reshape(labels.shape).float(), labels.float())


def loss_for(labels: Tensor) -> Loss:
    """Cross-entropy for whole numbers, squared error for floats."""
    return squared_error if labels.is_floating_point() else cross_entropy


def scores_of(outputs: Any) -> Tensor:
    """What a module's outputs say about the labels: `logits` where there are any, else the first tensor."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        outputs = outputs["logits"] if "logits" in outputs else next(iter(outputs.values()), None)
    elif isinstance(outputs, tuple | list):
        outputs = outputs[0] if outputs else None
    if not isinstance(outputs, Tensor):
        raise InputRefused(f"the model returns {type(outputs).__name__}, where a tensor of scores is needed")
    return outputs


# --- Training ---


@dataclass(frozen=True)
class History:
    """What happened, step by step."""

    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    peak_bytes: int  # on CUDA what tensors took at most; on the CPU the process, seen between forward and backward
    device: str

    def __str__(self) -> str:
        return (
            f"{len(self.losses):,} steps on {self.device} in {sum(self.seconds):.1f} s, "
            f"loss {self.losses[0]:.4g} -> {self.losses[-1]:.4g}, peak memory {self.peak_bytes / 2**20:,.0f} MiB"
        )


OnStep = Callable[[int, int, float], None]  # (steps done, steps in all, loss)


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
) -> History:
    """Train, in place, the parameters of `module` that require gradients: AdamW, warm-up and linear decay.

    `loss` is chosen by the labels' type unless given; `warmup` is a share of all steps; `precision` is
    that of autocast. On the CPU the same seed gives the same bits. The module is left in eval mode, on
    the device. Frozen batch norms stay in eval mode throughout: their statistics belong to the base.
    Raises InputRefused for a loss that is not finite, and where there is nothing to train; and
    EnvironmentLacking without accelerate or the device.
    """
    if epochs < 1 or batch_size < 1 or not 0 < learning_rate < math.inf or not 0 <= warmup < 1:
        raise InputRefused(
            f"epochs {epochs}, batch size {batch_size}, learning rate {learning_rate} and warm-up {warmup}: the first "
            "three must be positive, and the last a share below 1"
        )
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise InputRefused("there is nothing to train: no parameter of the model requires a gradient")
    _refuse_unknown_inputs(module, data)
    accelerator = _accelerator(device, precision)
    with torch.random.fork_rng(devices=[accelerator.device] if device == "cuda" else []):
        torch.manual_seed(seed)
        model, optimizer, loader = accelerator.prepare(
            _Scores(module),
            torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay),
            _loader(data, batch_size, torch.Generator().manual_seed(seed)),
        )
        steps = epochs * len(loader)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, _warm_up_and_decay(steps, warmup))
        losses: list[float] = []
        seconds: list[float] = []
        memory = _Memory(accelerator.device)
        _to_train_mode(module)
        try:
            started = time.perf_counter()
            for inputs, labels in _epochs(loader, epochs):
                with accelerator.autocast():
                    scores = model(**inputs)
                value = (loss or loss_for(labels))(scores, labels)
                losses.append(_finite(value.item(), step=len(losses) + 1, steps=steps))
                memory.look()
                accelerator.backward(value)
                accelerator.clip_grad_norm_(parameters, CLIP)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                now = time.perf_counter()
                seconds.append(now - started)
                started = now
                if on_step is not None:
                    on_step(len(losses), steps, losses[-1])
        finally:
            module.eval()
            accelerator.free_memory()
    return History(tuple(losses), tuple(seconds), memory.peak, str(accelerator.device))


class _Scores(nn.Module):
    """The module as accelerate sees it: its patches and marks stay on this shell."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, **inputs: Tensor) -> Tensor:
        return scores_of(self.module(**inputs))


def _refuse_unknown_inputs(module: nn.Module, data: Data) -> None:
    inputs, _ = data.batch([0])
    parameters = inspect.signature(module.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = {parameter.name for parameter in parameters}
    needed = {
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL
    }
    if set(inputs) - known or needed - set(inputs):
        raise InputRefused(
            f"the examples hold {', '.join(inputs)}; the model's forward takes {', '.join(sorted(known))}"
        )


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
    """From a first small step up to 1 over the warm-up, then down to a last small step."""
    warm = min(round(steps * warmup), steps - 1)

    def factor(step: int) -> float:
        return (step + 1) / (warm + 1) if step < warm else (steps - step) / (steps - warm)

    return factor


def _to_train_mode(module: nn.Module) -> None:
    module.train()
    for part in module.modules():
        if isinstance(part, _NormBase) and not any(parameter.requires_grad for parameter in part.parameters()):
            part.eval()


def _epochs(loader: Iterable[Batch], epochs: int) -> Iterator[Batch]:
    for _ in range(epochs):
        yield from loader


def _finite(loss: float, *, step: int, steps: int) -> float:
    if not math.isfinite(loss):
        raise InputRefused(
            f"the loss is {loss} at step {step} of {steps}: training has diverged. A lower learning rate is the usual "
            "remedy. Nothing was written."
        )
    return loss


class _Memory:
    """The most memory seen since it was made."""

    def __init__(self, device: torch.device):
        self.device = device
        self.peak = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def look(self) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            import psutil  # comes with accelerate

            self.peak = max(self.peak, psutil.Process().memory_info().rss)


# --- Judging ---


@dataclass(frozen=True)
class Score:
    """How a module does on examples that it may not have seen."""

    loss: float
    accuracy: float | None  # share of labels told right; None where values are predicted
    count: int  # labels that were judged

    def __str__(self) -> str:
        said = f"loss {self.loss:.4g} on {self.count:,}"
        return said if self.accuracy is None else f"accuracy {100 * self.accuracy:.1f} %, {said}"


def evaluate(module: nn.Module, data: Data, *, batch_size: int = 64, device: str = "cpu") -> Score:
    """Loss and accuracy, without dropout and without gradients; the module's mode is as before afterwards."""
    if not len(data.labels) or not (data.labels != IGNORED).any():
        raise InputRefused("there is no example to judge by")
    _refuse_unknown_inputs(module, data)
    training = module.training
    module.to(device).eval()
    total, right, count = 0.0, 0, 0
    try:
        with torch.no_grad():
            for inputs, labels in _loader(data, batch_size):
                scores = scores_of(module(**{name: value.to(device) for name, value in inputs.items()})).cpu()
                judged = torch.ones_like(labels, dtype=torch.bool) if labels.is_floating_point() else labels != IGNORED
                total += float(loss_for(labels)(scores, labels)) * int(judged.sum())
                count += int(judged.sum())
                if not labels.is_floating_point():
                    right += int((scores.argmax(-1) == labels)[judged].sum())
    finally:
        module.train(training)
    return Score(total / count, None if data.labels.is_floating_point() else right / count, count)
