"""What a training measured, and the files that it writes: metrics, TensorBoard's, and the checkpoint `OUT.training`.

A checkpoint has all that the next step depends on: the trained tensors, AdamW's moments, and the number of the step;
and the tensors of the best evaluation until then, which a later one of another learning rate must not replace.
What is random in a step depends on the seed and the step alone. A file is written beside the former one and renamed, so
that a kill or a full disk leaves the former one whole.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from lora_export.errors import (
    SHOWN_PROBLEMS,
    EnvironmentLacking,
    InputRefused,
    OutputFailed,
    brief,
    count,
    first_of,
    listed,
)
from lora_export.extras import pip_install
from lora_export.options.spelling import named

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class StepRecord:
    """One step."""

    step: int  # from 1
    epoch: int  # from 1
    loss: float  # the mean of what counted in the step, before it
    learning_rate: float
    tokens: int  # of the inputs; examples, where they are no tokens
    seconds: float


@dataclass(frozen=True)
class EvaluationRecord:
    """One measurement on held-out examples."""

    step: int  # after which it was made
    held_out_loss: float
    held_out_accuracy: float | None


@dataclass(frozen=True)
class MemoryUse:
    """The memory of a training, in bytes."""

    weights: int  # parameters and buffers
    gradients: int
    optimizer: int
    activations: int  # what the forward pass of one part of a step keeps for the backward pass, without weights
    peak: int  # on CUDA of all tensors; on the CPU of the process, measured between forward and backward

    @property
    def total(self) -> int:
        """Weights, gradients, the state of the optimiser and activations together."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(repr=False)
class TrainingHistory:
    """All steps and evaluations."""

    device: str
    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    memory: MemoryUse = MemoryUse(0, 0, 0, 0, 0)

    def __repr__(self) -> str:
        loss = f"loss {self.losses[0]:.4g} to {self.losses[-1]:.4g}" if self.steps else ""
        return brief(self, count(len(self.steps), "step"), loss)

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(step.loss for step in self.steps)

    @property
    def seconds(self) -> tuple[float, ...]:
        return tuple(step.seconds for step in self.steps)

    @property
    def best(self) -> EvaluationRecord | None:
        """The evaluation with the lowest held-out loss, the first of equal ones."""
        return min(self.evaluations, key=lambda record: record.held_out_loss, default=None)

    @property
    def latest(self) -> list[StepRecord | EvaluationRecord]:
        """The last step, and the evaluation after it where there is one."""
        step = self.steps[-1]
        return [step, *(record for record in self.evaluations[-1:] if record.step == step.step)]

    def without_improvement(self) -> int:
        """How many evaluations have followed the best one."""
        return len(self.evaluations) - 1 - self.evaluations.index(self.best) if self.best else 0

    def __str__(self) -> str:
        taken = sum(self.seconds)
        return (
            f"{count(len(self.steps), 'step')} on {self.device} in {taken:.1f} s, "
            f"loss {self.losses[0]:.4g} -> {self.losses[-1]:.4g}, peak memory {self.memory.peak / 2**20:,.0f} MiB"
        )

    def as_table(self) -> dict[str, Any]:
        """Steps and evaluations as lists, for a checkpoint."""
        return {
            "steps": [list(asdict(step).values()) for step in self.steps],
            "evaluations": [list(asdict(record).values()) for record in self.evaluations],
        }

    def restore(self, table: dict[str, Any]) -> None:
        """Take over what `as_table` returned."""
        self.steps = [StepRecord(*values) for values in table["steps"]]
        self.evaluations = [EvaluationRecord(*values) for values in table["evaluations"]]

    def write(self, path: Path) -> None:
        """Write all records as lines of JSON, by step."""
        records: list[StepRecord | EvaluationRecord] = [*self.steps, *self.evaluations]
        records.sort(key=lambda record: record.step)
        path.write_text("".join(map(json_line, records)), encoding="utf-8", newline="\n")


def json_line(record: StepRecord | EvaluationRecord) -> str:
    """A record as one line of JSON."""
    return json.dumps(asdict(record), allow_nan=False) + "\n"


# --- Checkpoints ---

TRAINING_STATE = "state.safetensors"
# The files of a checkpoint, with one of the first format; beside them only what was not whole, FILE.partial.
OF_CHECKPOINT = (METRICS, TRAINING_STATE, "best.safetensors")
CHECKPOINT_FORMAT = "lora-export/training/2"
OF_TRAINED, OF_BEST = "trained.", "best."  # begin the names of tensors: after the last step, and of the best evaluation
MAY_DIFFER = ("learning_rate",)  # after a training that diverged, it is what must change

# PyTorch's common class of these is private.
NORMS_WITH_STATISTICS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d),
    *(nn.LazyInstanceNorm1d, nn.LazyInstanceNorm2d, nn.LazyInstanceNorm3d),
)


def norms_with_statistics(module: nn.Module) -> dict[str, bool]:
    """By its path: whether a batch norm is trained as a whole. Only then an adapter has its statistics."""
    return {
        path: all([parameter.requires_grad for parameter in part.parameters()] or [False])
        for path, part in module.named_modules()
        if isinstance(part, NORMS_WITH_STATISTICS)
    }


def checkpoint_folder(output: Path) -> Path:
    """Where the checkpoint of a training with this output is. One without a name, such as `.`, is refused later."""
    return output.with_name(f"{output.name}.training") if output.name else output / ".training"


def refuse_other_files(folder: Path) -> None:
    """Raise OutputFailed for the folder of a checkpoint that has other files: they would be removed with it."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if others := sorted(name for name in names if name.removesuffix(".partial") not in OF_CHECKPOINT):
        raise OutputFailed(
            f"{folder} is the place of the checkpoint, and has files that are none: "
            f"{first_of(others, SHOWN_PROBLEMS)}. Move them, or name another output"
        )


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters that require gradients, and statistics of batch norms trained as a whole."""
    tensors: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for path, is_trained in norms_with_statistics(module).items():
        if is_trained:
            tensors |= {f"{path}.{name}": buffer for name, buffer in module.get_submodule(path).named_buffers()}
    return tensors


@dataclass(frozen=True)
class Checkpoints:
    """Reads and writes the checkpoint of one training."""

    folder: Path
    identity: Mapping[str, Any]  # model, data and settings: those of a continued training must be the same

    @property
    def exists(self) -> bool:
        return (self.folder / TRAINING_STATE).is_file()

    def begin(self) -> None:
        """Make the folder, or empty it. Raises OutputFailed where it cannot be made."""
        try:
            self.remove()
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise OutputFailed(f"{self.folder} could not be made: {error.strerror}") from error

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def remove_if_empty(self) -> None:
        """Remove the folder of a training that has ended before its first checkpoint."""
        if not self.exists:
            self.remove()

    def record(self, history: TrainingHistory) -> None:
        """Append the last step, and an evaluation after it, to the file of metrics."""
        with (self.folder / METRICS).open("a", encoding="utf-8", newline="\n") as file:
            file.writelines(map(json_line, history.latest))

    def save(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: Any,
        history: TrainingHistory,
        best: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Write the state after the last step. Raises InputRefused for values that are not finite, OutputFailed.

        `best` are the tensors of the evaluation with the lowest loss.
        """
        trained = trained_tensors(module)
        if broken := [name for name, tensor in trained.items() if not torch.isfinite(tensor).all()]:
            raise InputRefused("training has diverged: these are not finite:", listed(broken))
        tensors = {f"{OF_TRAINED}{name}": tensor for name, tensor in trained.items()}
        tensors |= {f"{OF_BEST}{name}": tensor for name, tensor in best.items()}
        names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
        for parameter, state in optimizer.state.items():
            tensors |= {f"{key}.{names[parameter]}": value for key, value in state.items()}
        of_scaler = scaler.state_dict() if scaler is not None else None
        facts = {"identity": dict(self.identity), "history": history.as_table(), "scaler": of_scaler}
        self._write(tensors, len(history.steps), json.dumps(facts))

    def _write(self, tensors: Mapping[str, Tensor], step: int, facts: str) -> None:
        copies = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        beside = self.folder / f"{TRAINING_STATE}.partial"
        try:
            with beside.open("wb") as file:
                file.write(to_bytes(copies, {"format": CHECKPOINT_FORMAT, "facts": facts}))
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.folder / TRAINING_STATE)
        except OSError as error:
            beside.unlink(missing_ok=True)
            kept = f"; the checkpoint before it is whole. Continue with {named('resume', True)}" if self.exists else ""
            raise OutputFailed(
                f"the checkpoint of step {step} could not be written to {self.folder}: {error.strerror}{kept}"
            ) from error

    def load(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any, history: TrainingHistory
    ) -> dict[str, Tensor]:
        """Take over the state of the checkpoint, and return the tensors of its best evaluation, if it has one.

        Raises InputRefused for one that is damaged or of another training.
        """
        tensors, facts = self._read()
        self._refuse_another(facts["identity"])
        trained = trained_tensors(module)
        stored, best = (
            {name.removeprefix(own): value for name, value in tensors.items() if name.startswith(own)}
            for own in (OF_TRAINED, OF_BEST)
        )
        if set(stored) != set(trained) or any(stored[name].shape != trained[name].shape for name in trained):
            raise InputRefused(f"{self.folder} is the checkpoint of another adapter")
        with torch.no_grad():
            for name, tensor in trained.items():
                tensor.copy_(stored[name])
        for name, parameter in module.named_parameters():
            keys = {"step", "exp_avg", "exp_avg_sq"}
            state = {key: tensors[f"{key}.{name}"] for key in keys if f"{key}.{name}" in tensors}
            if state:  # AdamW keeps its count of steps on the CPU
                optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
                }
        if scaler is not None and facts["scaler"]:
            scaler.load_state_dict(facts["scaler"])
        history.restore(facts["history"])
        return best

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        try:
            opened: Any = safetensors.safe_open(self.folder / TRAINING_STATE, framework="pt")
        except (OSError, safetensors.SafetensorError) as error:
            raise InputRefused(f"{self.folder / TRAINING_STATE} is damaged: {error}") from error
        with opened as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != CHECKPOINT_FORMAT:
                raise InputRefused(f"{self.folder / TRAINING_STATE} is no checkpoint of this version of lora-export")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        return tensors, json.loads(metadata["facts"])

    def _refuse_another(self, stored: Mapping[str, Any]) -> None:
        current = json.loads(json.dumps(dict(self.identity)))
        differing = [
            f"{name} was {stored.get(name)}, and is {current.get(name)}"
            for name in sorted(current.keys() | stored.keys())
            if stored.get(name) != current.get(name) and name not in MAY_DIFFER
        ]
        if differing:
            raise InputRefused(f"{self.folder} is the checkpoint of another training:", listed(differing, 10))


def require_tensorboard() -> None:
    """Raise EnvironmentLacking where TensorBoard is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise EnvironmentLacking(f"{named('tensorboard')} needs tensorboard: {pip_install('tensorboard')}")


class EventLog:
    """The event files of one training, in a folder that is made with the first record.

    Files that are there stay. After a resumed training, TensorBoard shows no step twice. Raises OutputFailed where the
    folder cannot be written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._tracker: Any = None

    def write(self, records: Iterable[StepRecord | EvaluationRecord]) -> None:
        """Write each number of the records as a curve of its own."""
        for record in records:
            numbers = {name: value for name, value in asdict(record).items() if name != "step" and value is not None}
            try:
                self._opened(record.step).log(numbers, step=record.step)
            except OSError as error:
                raise OutputFailed(f"{self.folder} could not be written: {error.strerror}") from error

    def close(self) -> None:
        """Write what is left."""
        if self._tracker is not None:
            self._tracker.finish()

    def _opened(self, step: int) -> Any:
        if self._tracker is None:
            from accelerate.tracking import TensorBoardTracker

            self._tracker = TensorBoardTracker("", str(self.folder), purge_step=step)
            self._tracker.start()
        return self._tracker
