"""The ways of training one model that `train` compares, and which of its modules are trained."""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lora_export import layers, plan
from lora_export.callbacks import OnMessage, OnProgress, Progress
from lora_export.errors import SHOWN_PROBLEMS, InputRefused, MatchError, count, first_of, listed
from lora_export.formats.peft_lost_layers import notes_on_lost_layers
from lora_export.formats.peft_writing import HEADS_OF_TASKS
from lora_export.layers.attachments import branch_tensors
from lora_export.layers.new_adapter import as_plain_lora, frozen_start, saved_modules, started_from_weights
from lora_export.lora import Adapter
from lora_export.models.model import Model
from lora_export.options.spelling import named
from lora_export.options.train import ComparedStrategy, TrainingSettings, TrainOptions
from lora_export.training.batches import Data
from lora_export.training.checkpoint import Checkpoints, EventLog, MemoryUse, StepRecord, TrainingHistory
from lora_export.training.evaluation import Score, evaluate_as_trained
from lora_export.training.loop import OnStep, fit
from lora_export.training.processes import shard_base, take_from_first
from lora_export.weights.checkpoint import open_checkpoint

FULL_RATE = 0.1  # of the adapter's learning rate: all weights are trained with about a tenth of it


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """What one way of training took, and how good it was."""

    strategy: str  # "lora", "full" or "frozen"
    rank: int | None
    parameters: layers.ParameterCount
    history: TrainingHistory
    settings: TrainingSettings
    score: Score | None  # on the held-out examples
    score_without: Score | None = None  # of an adapter: with the same head, and the adapter off
    adapter: Adapter | None = None  # as it was trained
    uncalled: tuple[str, ...] = ()  # layers that it changed, and that the model never calls

    @property
    def label(self) -> str:
        """`LoRA, rank 4`, `all weights` or `head alone`."""
        names = {"full": "all weights", "frozen": "head alone" if self.parameters.trained else "base as it is"}
        return names.get(self.strategy, f"LoRA, rank {self.rank}")

    @property
    def memory(self) -> MemoryUse:
        return self.history.memory

    @property
    def document(self) -> dict[str, Any]:
        """The row of the table, for JSON. Memory is in bytes, the time of a step in seconds."""
        losses = self.history.losses
        best = self.history.best
        return {
            "strategy": self.strategy,
            "rank": self.rank,
            "label": self.label,
            "trained_parameters": self.parameters.trained,
            "all_parameters": self.parameters.total,
            "learning_rate": self.settings.learning_rate,
            "memory": asdict(self.memory) | {"total": self.memory.total},
            "step_seconds": statistics.median(self.history.seconds) if losses else None,
            "final_loss": losses[-1] if losses else None,
            "best_loss": min(losses, default=None),
            "best_held_out_loss": best.held_out_loss if best else None,
            "held_out": asdict(self.score) if self.score else None,
            "losses": list(losses),
        }


@dataclass(frozen=True, eq=False)
class Trainer:
    """Everything that is the same for all strategies: the model, the data and how the loop runs."""

    module: nn.Module
    data: Data
    held_out: Data | None
    settings: TrainingSettings
    heads: tuple[str, ...]
    options: TrainOptions

    def adapter(self, new: Adapter, rank: int, checkpoints: Checkpoints | None = None) -> TrainingRun:
        """Train a new adapter. The base is as before afterwards, to the last bit.

        An adapter that starts from the weights (`init`) is returned as a plain one, of twice the rank. Raises
        InputRefused where a parameter of the base would be trained, and for weights that cannot be started from.
        """
        init, on_progress = self.options.init, self.options.on_progress

        def report(done: int, layers: int) -> None:
            on_progress(Progress(f"factors of the weights ({init})", done, layers, "layers"))

        start = started_from_weights(self.module, new, init, on_layer=report)
        frozen = [] if init == "default" else [frozen_start(start)]
        parts = plan.make([start, *frozen], layers.specs(self.module), identity_ok=True)
        dropout = new.metadata.get("lora_dropout", 0.0)
        layers.attach(self.module, parts, trainable=True, dropout=dropout, frozen={one.name for one in frozen})
        try:
            # Decompositions on another processor may have other signs.
            take_from_first(branch_tensors(self.module) if frozen else [], self.options.device)
            layers.refuse_trainable_base(self.module)
            layers.widen_trained(self.module)
            count = layers.count_parameters(self.module)
            if self.options.shard_base:
                shard_base(self.module, self.options.device)
            more = {"checkpoints": checkpoints, "resume": self.options.resume}
            is_compiled, is_scored = self.settings.compile, self.held_out is not None
            alone = _never_called(self.module, start.pairs, alone=True)
            with _uncalled(self.module, alone if is_compiled else start.pairs) as uncalled:  # hooks are compiled, too
                history = self._fit(self.module, self.settings, f"training, rank {rank}", f"rank-{rank}", **more)
            with _uncalled(self.module, start.pairs if is_compiled and is_scored else uncalled) as uncalled:
                score = self._score(self.module)  # which compiles nothing
            trained = layers.read_back(self.module, start)
            changed = tuple(name for name in uncalled if (trained.pairs[name].b != start.pairs[name].b).any())
            trained = as_plain_lora(trained, start) if frozen else trained
            with layers.scale_adapters(self.module, 0, keep_replaced=True):
                without = self._score(self.module)
        finally:
            layers.detach(self.module)
        return TrainingRun("lora", rank, count, history, self.settings, score, without, trained, changed)

    def head_alone(self) -> TrainingRun:
        """Train the head on the frozen base, in a copy. Without a head, the base is measured as it is."""
        module = copy.deepcopy(self.module).requires_grad_(False)
        for head in saved_modules(self.heads, [path for path, _ in module.named_modules() if path]):
            module.get_submodule(head).requires_grad_(True)
        return self._run("frozen", module, self.settings, "training the head alone")

    def compared(self, strategies: Iterable[ComparedStrategy]) -> list[TrainingRun]:
        """Train by each of these, in order: all weights of a copy with a lower learning rate, or the head alone."""
        slower = replace(self.settings, learning_rate=self.settings.learning_rate * FULL_RATE)
        return [
            self._run("full", copy.deepcopy(self.module).requires_grad_(True), slower, "training all weights")
            if strategy == "full"
            else self.head_alone()
            for strategy in strategies
        ]

    def _run(self, strategy: str, module: nn.Module, settings: TrainingSettings, stage: str) -> TrainingRun:
        layers.widen_trained(module)
        count = layers.count_parameters(module)
        untrained = TrainingHistory(self.options.device)
        history = self._fit(module, settings, stage, strategy) if count.trained else untrained
        return TrainingRun(strategy, None, count, history, settings, self._score(module))

    def _fit(
        self, module: nn.Module, settings: TrainingSettings, stage: str, name: str, **more: Any
    ) -> TrainingHistory:
        tensorboard = self.options.tensorboard
        more |= {"held_out": self.held_out, "log": tensorboard and EventLog(Path(tensorboard) / name)}
        on_step = _step_progress(stage, self.options.on_progress)
        return fit(module, self.data, settings, device=self.options.device, on_step=on_step, **more)

    def _score(self, module: nn.Module) -> Score | None:
        if self.held_out is None:
            return None
        return evaluate_as_trained(module, self.held_out, self.settings, self.options.device)


def _never_called(module: nn.Module, names: Collection[str], *, alone: bool) -> list[str]:
    """The output projections of nn.MultiheadAttention among modules: its class reads their weights.

    `alone` are those whose attention is not among the modules, or the others.
    """
    modules = dict(module.named_modules())
    owners = {name: name.rpartition(".")[0] for name in names}
    read = [name for name, owner in owners.items() if isinstance(modules.get(owner), nn.MultiheadAttention)]
    return [name for name in read if (owners[name] not in names) is alone]


@contextlib.contextmanager
def _uncalled(module: nn.Module, names: Collection[str]) -> Iterator[dict[str, Any]]:
    """Those of these modules, by name, that are not called within. The first call of a module removes its hook.

    A copy of the module keeps its hooks, and its calls count, too. The output projection of an nn.MultiheadAttention
    that is among the modules itself is left out: see `note_on_attention`.
    """
    modules = dict(module.named_modules())
    left: dict[str, Any] = {}

    def called(name: str) -> None:
        if handle := left.pop(name, None):
            handle.remove()

    of_attention = _never_called(module, names, alone=False)
    for name in names:
        if name in modules and name not in of_attention:
            left[name] = modules[name].register_forward_pre_hook(lambda *_, name=name: called(name))
    try:
        yield left
    finally:
        for handle in left.values():
            handle.remove()


def _step_progress(stage: str, on_progress: OnProgress) -> OnStep:
    """Report each step with its loss, its speed and the peak memory."""

    def report(record: StepRecord, steps: int, peak: int) -> None:
        speed = record.tokens / record.seconds if record.seconds else 0.0
        detail = f"loss {record.loss:.3f}, {speed:,.0f} tokens/s, {peak / 2**20:,.0f} MiB"
        on_progress(Progress(stage, record.step, steps, "steps", detail))

    return report


def losses_of(runs: Sequence[TrainingRun]) -> dict[str, tuple[float, ...]]:
    """The loss of each step, by the label of the run."""
    return {run.label: run.history.losses for run in runs if run.history.losses}


# The names of task heads in transformers.
HEADS = ("classifier", "score", "classification_head", "logits_proj", "sequence_summary", "qa_outputs")


def refuse_rank_beyond_layers(adapter: Adapter, *, named: bool, on_message: OnMessage) -> None:
    """Raise InputRefused for a rank that is larger than a named layer, or than all layers. Others get a note.

    A pattern that gives a layer a rank of its own names it.
    """
    small = layers.full_rank_layers(adapter)
    if not small:
        return
    message = f"the rank is larger than {len(small)} of {len(adapter.pairs)} layers"
    of_pattern = [name for name in small if adapter.pairs[name].rank != adapter.metadata["r"]]
    if named or of_pattern or len(small) == len(adapter.pairs):
        first = sorted(small, key=lambda name: name not in of_pattern)
        raise InputRefused(f"{message}. Lower it, or choose other layers:", listed([small[name] for name in first]))
    on_message(f"note: {message}, such as {next(iter(small.values()))}")


def heads_of(loaded: Model, task: str | None) -> tuple[str, ...]:
    """The task head of a Hugging Face classifier: the modules that its class has besides the base model.

    With a task of PEFT's, so are modules whose names end like those of its heads: DistilBERT's pre_classifier.
    """
    if not loaded.is_huggingface:
        return ()
    endings = HEADS_OF_TASKS.get(task or "", ())
    return tuple(
        name for name, _ in loaded.module.named_children() if name in HEADS or (endings and name.endswith(endings))
    )


def has_whole_head(loaded: Model, task: str, adapter: Adapter) -> bool:
    """Whether the adapter saves every module that PEFT takes for a part of the task's head, and looks for."""
    endings = HEADS_OF_TASKS.get(task, ())
    parts = [(path, part) for path, part in loaded.module.named_modules() if endings and path.endswith(endings)]
    return all(f"{path}.{name}" in adapter.replaced for path, part in parts for name, _ in part.named_parameters())


def with_new_modules(loaded: Model, heads: Sequence[str]) -> tuple[str, ...]:
    """The heads, and the modules whose weights the folder lacks. They are trained and saved too, or would be lost.

    Raises InputRefused where a new weight is not in a module of new weights alone.
    """
    new = set(loaded.new_weights)
    found: list[str] = []
    for path, part in loaded.module.named_modules():
        tensors = {f"{path}.{name}" for name in part.state_dict()} if path else set()
        if tensors and tensors <= new and not any(path.startswith(f"{outer}.") for outer in found):
            found.append(path)
    if lost := [name for name in sorted(new) if not name.startswith(tuple(f"{path}." for path in found))]:
        raise InputRefused(f"{loaded.source} lacks weights that no head contains:", listed(lost, 10))
    return (*heads, *(path for path in found if not any(f".{path}.".startswith(f".{head}.") for head in heads)))


def note_on_other_names(loaded: Model, new: Adapter) -> str:
    """A note where the names of the module are not those of the folder's files; empty where the adapter fits both."""
    if not loaded.is_huggingface:
        return ""
    try:
        checkpoint = open_checkpoint(Path(loaded.source), dequantise=True)
        plan.make([new], checkpoint.specs, identity_ok=True, may_add=True, rules=checkpoint.rules)
    except MatchError as error:
        example = min(misfit.key for misfit in error.misfits)
        return (
            f"note: the adapter will not fit the files of {loaded.source}: {len(error.misfits)} of its {error.targets} "
            f"tensors have names that transformers gives them when it loads the model, such as {example}. `merge` will "
            "refuse it. `onnx`, `torchscript` and PEFT take it"
        )
    return ""


def note_on_attention(new: Adapter) -> str:
    """A note on the output projection of an nn.MultiheadAttention, which PEFT reads otherwise; empty without one."""
    if not any(name.endswith(".out_proj") and name.removesuffix(".out_proj") in new.pairs for name in new.pairs):
        return ""
    return (
        "note: PEFT reads adapters of nn.MultiheadAttention in another way: it ignores the output projection of this "
        "adapter, and adds it twice in its own. lora-export and this adapter agree with each other"
    )


def note_on_uncalled(run: TrainingRun) -> str:
    """A note on layers whose weight the model reads itself, so that PEFT's layer is not run; empty without such."""
    if not run.uncalled:
        return ""
    return (
        f"note: the model reads the weights of {count(len(run.uncalled), 'layer')} itself, such as "
        f"{run.uncalled[0]}. PEFT's attached model leaves out the change of such a layer. lora-export trains, merges "
        "and exports it, and PEFT's merge adds it"
    )


def notes_on_peft(loaded: Model, new: Adapter) -> list[str]:
    """Notes on layers of the adapter that PEFT does not find when it loads it; none where it finds all."""
    if not loaded.is_huggingface:
        return []
    config: Any = loaded.module.config
    return [f"note: {note}" for note in notes_on_lost_layers(new.pairs, config.to_dict())]


def note_on_unknown_head(loaded: Model, heads: Sequence[str]) -> str:
    """A note where a Hugging Face classifier has no module that is known to be its head; empty where it has."""
    if heads or not loaded.is_huggingface:
        return ""
    return (
        f"note: no module of {type(loaded.module).__name__} has the name of a head ({', '.join(HEADS)}), so that its "
        f"head is not trained. {named('heads')} names the modules to train as a whole"
    )


def note_on_tied_rows(module: nn.Module, new: Adapter) -> str:
    """A note where rows of tokens are in a table of several modules, of which PEFT changes one; empty elsewhere.

    PEFT finds the other modules where the model's class itself declares tied weights.
    """
    model: Any = module
    if getattr(model, "_tied_weights_keys", None) and getattr(model.config, "tie_word_embeddings", True):
        return ""
    tensors = dict(module.named_parameters(remove_duplicate=False))
    for table in new.token_rows:
        if others := [name for name, value in tensors.items() if value is tensors[table] and name != table]:
            return (
                f"note: PEFT will change the rows of {table} alone, and not those of {', '.join(others)}, which are "
                "the same weight: its outputs will be others than in this training. `merge` changes them all"
            )
    return ""


def note_on_untrained(run: TrainingRun) -> str:
    """A note on the layers that the loss does not depend on; empty where there are none."""
    assert run.adapter is not None
    names = [f"`{name}`" for name, pair in run.adapter.pairs.items() if not (pair.a.any() and pair.b.any())]
    return (
        f"note: {first_of(names, SHOWN_PROBLEMS)} got no gradient, so that the adapter does not change them"
        if names
        else ""
    )
