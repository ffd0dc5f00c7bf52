"""`lora_export.train`: make an adapter, or compare ways to train a model."""

from __future__ import annotations

import contextlib
import importlib.metadata
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lora_export import __version__, formats, layers, plan
from lora_export.api.callbacks import OnMessage, OnProgress, ignore
from lora_export.api.load import model_paths, refuse_pt2
from lora_export.api.training_data import TrainingData, encoded_data, read_training_data
from lora_export.api.training_strategies import ComparedStrategy, Trainer, TrainingRun, losses_of
from lora_export.errors import SHOWN_PROBLEMS, InputRefused, MatchError, OutputFailed, WrongUsage, listed
from lora_export.formats import peft
from lora_export.lora import Adapter
from lora_export.models.load import load_model
from lora_export.models.model import Model
from lora_export.report.comparison import comparison_page, draw_losses, require_matplotlib
from lora_export.report.html import require_jinja2
from lora_export.report.model_card import MODEL_CARD, model_card
from lora_export.storage import atomic_output
from lora_export.storage.hub_cache import hub_name, locate
from lora_export.storage.json_files import write_json
from lora_export.storage.manifest import write_manifest
from lora_export.training.batches import ReadyBatches
from lora_export.training.checkpoint import Checkpoints, checkpoint_folder
from lora_export.training.evaluation import Score
from lora_export.training.history import METRICS, TrainingHistory
from lora_export.training.loop import accelerator_for
from lora_export.training.processes import rank as process_rank
from lora_export.training.processes import wait_for_all
from lora_export.training.settings import Precision, TrainingSettings
from lora_export.weights.checkpoint import open_checkpoint

HEADS = ("classifier", "score", "classification_head", "qa_outputs")  # names of task heads in transformers
COMPARISON = "comparison"  # the name of the table's files: .json, .png and .html
SHOWN_VERSIONS = ("torch", "transformers", "accelerate")


@dataclass(frozen=True, eq=False)
class TrainResult:
    """The adapters as they were saved, and what training measured."""

    output: Path
    adapters: tuple[Adapter, ...]  # one for each rank
    runs: tuple[TrainingRun, ...]  # of each rank, and of each strategy that it was compared with

    @property
    def adapter(self) -> Adapter:
        """The first adapter."""
        return self.adapters[0]

    @property
    def history(self) -> TrainingHistory:
        """Loss and seconds of every step, of the first adapter."""
        return self.runs[0].history

    @property
    def scores(self) -> Mapping[str, Score]:
        """On held-out examples: "adapter" and "adapter_off" of the first one; and, where compared, "full", "frozen"."""
        first = self.runs[0]
        found = {"adapter": first.score, "adapter_off": first.score_without}
        found |= {run.strategy: run.score for run in self.runs if run.strategy != "lora"}
        return {name: score for name, score in found.items() if score is not None}


def train(
    model: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    rank: int | Sequence[int] = 8,
    alpha: float | None = None,
    rslora: bool = False,
    target: str | Sequence[str] = "all-linear",
    heads: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
    task: str | None = None,
    max_length: int = 128,
    packing: bool = False,
    epochs: int = 3,
    batch_size: int = 32,
    accumulate: int = 1,
    learning_rate: float = 1e-3,
    b_ratio: float = 1.0,
    schedule: str = "linear",
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    max_gradient_norm: float = 1.0,
    precision: Precision = "no",
    gradient_checkpointing: bool = False,
    holdout: float = 0.2,
    evaluate_every: int = 0,
    patience: int = 0,
    keep_best: bool = False,
    save_every: int = 100,
    resume: bool = False,
    compare: Sequence[ComparedStrategy] = (),
    seed: int = 0,
    device: Literal["cpu", "cuda"] = "cpu",
    overwrite: bool = False,
    download: bool = False,
    on_message: OnMessage = ignore,
    on_progress: OnProgress = ignore,
) -> TrainResult:
    """Train a LoRA adapter for a model and save it as a PEFT folder.

    `model` is a Hugging Face folder, `package.module:factory` or `file.py:factory`. `data` is a file, a folder, or
    `file.py:factory` (`lora-export guide training`). The columns of its rows decide what is learnt, unless `task` names
    it; `columns` renames them (name here -> name in the data). `max_length` is in tokens; with `packing`, several
    short texts share a row.

    A has `rank` rows and B has `rank` columns; B·A is scaled by alpha/rank, or by alpha/√rank with `rslora`. `alpha` is
    twice the rank unless it is given. `target` is "all-linear" or endings of layer names. `heads` are modules that are
    trained and saved whole. Several ranks give a folder of adapters, `rank-4` and so on. With several, and with
    `compare` ("full": all weights; "frozen": the head alone), all are trained from the same seed and data, and
    `comparison.json`, `.png` and `.html` in the output have the table.

    The other settings are those of `TrainingSettings`. `holdout` (0 to 1) is the part of the examples that is not
    trained on. The base is frozen. The same arguments give the same adapter on the same machine. A checkpoint is
    written to `OUTPUT.training` every `save_every` steps and when training is interrupted; with `resume`, training
    continues from it, with the same results to the last bit on a CPU.

    With `download`, what the cache lacks of a name of the Hugging Face Hub is downloaded (`owner/name[@revision]`).
    Then EnvironmentLacking is raised without a connection.

    Raises InputRefused for a model or data that cannot be used and for a loss that is not finite, EnvironmentLacking
    where a package, the device or memory is missing, and OutputFailed where `output` cannot be written. After an error
    nothing new is left behind but the checkpoint, where there is one.
    """
    refuse_pt2(model)
    ranks = (rank,) if isinstance(rank, int) else tuple(rank)
    is_comparison = len(ranks) > 1 or bool(compare)
    if len(set(ranks)) < len(ranks) or not ranks:
        raise WrongUsage("each --rank is given once")
    if resume and is_comparison:
        raise WrongUsage("a comparison is not continued: --resume is for the training of one adapter")
    if is_comparison:
        require_matplotlib()
        require_jinja2()
    accelerator_for(device, precision)  # before anything is read: a missing device ends the command at once
    if process_rank() > 0:  # one process speaks, and writes the files
        on_message, on_progress = ignore, ignore
    model = locate(model, on_message, download)
    output = Path(output)
    learnt = read_training_data(data, columns=columns, task=task)
    on_message(f"{data}: {learnt}")
    settings = TrainingSettings(
        epochs, learning_rate, 1 if isinstance(learnt.content, ReadyBatches) else batch_size, seed, accumulate,
        schedule, warmup, weight_decay, max_gradient_norm, b_ratio, precision, gradient_checkpointing,
        evaluate_every, patience, keep_best, save_every,
    )  # fmt: skip
    if settings.evaluates and not holdout:
        raise WrongUsage("--evaluate-every, --patience and --keep-best need held-out examples (--holdout)")
    folder = checkpoint_folder(output)
    if process_rank() == 0 and folder.exists() and not (resume or overwrite):
        raise OutputFailed(f"{folder} has the checkpoint of a training that did not end: add --resume, or --overwrite")
    inputs = [*filter(Path.exists, [Path(data)]), *(path for path in model_paths(model) if path.is_dir())]
    with _staged(output, inputs, overwrite=overwrite, on_message=on_message) as stage:
        torch.manual_seed(seed)  # the first values of a new head depend on it
        loaded = load_model(str(model), head=learnt.head, may_add=True)
        data_in, held_out = encoded_data(
            loaded, learnt, holdout=holdout, seed=seed, max_length=max_length, packing=packing
        )
        heads = _with_new_modules(loaded, heads or _heads_of(loaded))
        base_hash = loaded.fingerprint()
        trainer = Trainer(loaded.module, data_in, held_out, settings, heads, device, on_progress)
        new = {
            rank: layers.create_adapter(
                loaded.module, targets=_targets(target), rank=rank, alpha=alpha or 2.0 * rank, rslora=rslora, seed=seed,
                modules_to_save=heads,
            )
            for rank in ranks
        }  # fmt: skip
        for adapter in new.values():
            _refuse_full_rank(adapter, named=target != "all-linear", on_message=on_message)
        if misfit := _misfit(loaded, new[ranks[0]]):
            on_message(misfit)
        identity = {
            "base": base_hash, "data": learnt.sha256, **settings.recorded, "holdout": holdout, "max_length": max_length,
            "packing": packing, "rank": ranks[0], "alpha": alpha or 2.0 * ranks[0], "rslora": rslora,
            "targets": list(new[ranks[0]].pairs), "heads": list(heads), "columns": dict(columns or {}), "task": task,
        }  # fmt: skip
        checkpoints = None if is_comparison else Checkpoints(folder, identity)
        runs: list[TrainingRun] = []
        for one_rank, adapter in new.items():
            with _noted_checkpoint(folder):
                run = trainer.adapter(adapter, one_rank, checkpoints=checkpoints, resume=resume)
            on_message(f"{run.parameters}")
            on_message(str(run.history))
            if note := _untrained(run):
                on_message(note)
            runs.append(run)
            facts = _facts(loaded, learnt, run, base_hash, str(data))
            place = stage / f"rank-{one_rank}" if len(ranks) > 1 else stage
            _write_adapter(place, loaded, learnt, run, new[one_rank], facts)
        runs += trainer.compared(compare)
        if is_comparison:
            table = {"model": str(model), "data": f"{data}: {learnt}", "settings": settings.recorded}
            _write_comparison(stage, table | {"runs": [run.document for run in runs]}, runs)
        made = {"made_by": f"lora-export {__version__}", "model": str(model), "settings": settings.recorded}
        write_manifest(stage, made)
    if checkpoints is not None and process_rank() == 0:
        checkpoints.remove()
    wait_for_all()
    names = {name for adapter in new.values() for name in adapter.pairs}
    if any(name.endswith(".out_proj") and name.removesuffix(".out_proj") in names for name in names):
        on_message(
            "note: PEFT reads adapters of nn.MultiheadAttention in another way: it ignores the output projection of "
            "this adapter, and adds it twice in its own. lora-export and this adapter agree with each other"
        )
    places = [output / f"rank-{rank}" for rank in ranks] if len(ranks) > 1 else [output]
    return TrainResult(output, tuple(map(formats.load, places)), tuple(runs))


@contextlib.contextmanager
def _staged(output: Path, inputs: Sequence[Path], *, overwrite: bool, on_message: OnMessage) -> Iterator[Path]:
    """A folder that becomes the output. Of several processes one writes it; the files of the others are dropped."""
    if process_rank() > 0:
        with tempfile.TemporaryDirectory(prefix="lora-export-") as dropped:
            yield Path(dropped)
        return
    with atomic_output.stage_folder(output, inputs=inputs, overwrite=overwrite, on_message=on_message) as stage:
        yield stage


@contextlib.contextmanager
def _noted_checkpoint(folder: Path) -> Iterator[None]:
    """Let the message of an interrupted command name the checkpoint that it has left."""
    try:
        yield
    except KeyboardInterrupt:
        if folder.exists():
            atomic_output.published.append(folder)
        raise


def _refuse_full_rank(adapter: Adapter, *, named: bool, on_message: OnMessage) -> None:
    """Raise InputRefused for a rank that is larger than a named layer, or than all layers. Others get a note."""
    small = layers.full_rank_layers(adapter)
    if not small:
        return
    message = f"the rank is larger than {len(small)} of {len(adapter.pairs)} layers"
    if named or len(small) == len(adapter.pairs):
        raise InputRefused(f"{message}. Lower it, or choose other layers:", listed(small))
    on_message(f"note: {message}, such as {small[0]}")


def _untrained(run: TrainingRun) -> str:
    """A note on the layers that the loss does not depend on; empty where there are none."""
    assert run.adapter is not None
    names = [f"`{name}`" for name, pair in run.adapter.pairs.items() if not pair.b.any()]
    more = f" and {len(names) - SHOWN_PROBLEMS} more" if len(names) > SHOWN_PROBLEMS else ""
    listing = ", ".join(names[:SHOWN_PROBLEMS])
    return f"note: {listing}{more} got no gradient, so that the adapter does not change them" if names else ""


def _targets(target: str | Sequence[str]) -> Any:
    if target == "all-linear":
        return target
    return [name for name in (target.split(",") if isinstance(target, str) else target) if name]


def _heads_of(loaded: Model) -> tuple[str, ...]:
    """The task head of a Hugging Face classifier: the modules that its class has besides the base model."""
    if not loaded.is_huggingface:
        return ()
    return tuple(name for name, _ in loaded.module.named_children() if name in HEADS)


def _with_new_modules(loaded: Model, heads: Sequence[str]) -> tuple[str, ...]:
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


def _misfit(loaded: Model, new: Adapter) -> str:
    """A note where the names of the module are not those of the folder's files; empty where the adapter fits both."""
    if not loaded.is_huggingface:
        return ""
    try:
        checkpoint = open_checkpoint(Path(loaded.source))
        plan.make([new], checkpoint.specs, identity_ok=True, may_add=True, rules=checkpoint.rules)
    except MatchError as error:
        example = min(misfit.key for misfit in error.misfits)
        return (
            f"note: the adapter will not fit the files of {loaded.source}: {len(error.misfits)} of its {error.targets} "
            f"tensors have names that transformers gives them when it loads the model, such as {example}. `merge` will "
            "refuse it. `onnx`, `torchscript` and PEFT take it"
        )
    return ""


def _write_adapter(
    folder: Path, loaded: Model, learnt: TrainingData, run: TrainingRun, new: Adapter, facts: Mapping[str, Any]
) -> None:
    """Write an adapter with its card and its metrics."""
    assert run.adapter is not None and run.rank is not None
    folder.mkdir(exist_ok=True)
    shape = new.metadata
    base = hub_name(Path(loaded.source)) or loaded.source
    fields: dict[str, Any] = {"use_rslora": shape["use_rslora"], "base_model_name_or_path": base}
    fields |= {"task_type": learnt.peft_task} if learnt.peft_task and loaded.is_huggingface else {}
    peft.write(run.adapter, folder, rank=run.rank, alpha=shape["lora_alpha"], targets=new.targets, **fields)
    if loaded.is_huggingface:
        # The head's class and labels: PEFT's own files do not name the labels.
        config: Any = loaded.module.config
        config.architectures = [type(loaded.module).__name__]
        config.save_pretrained(folder)
    run.history.write(folder / METRICS)
    (folder / MODEL_CARD).write_text(model_card(facts), encoding="utf-8", newline="\n")


def _facts(loaded: Model, learnt: TrainingData, run: TrainingRun, base_hash: str, data: str) -> dict[str, Any]:
    """What the card of an adapter contains."""
    assert run.adapter is not None
    scores = {"held out": run.score, "held out, adapter off": run.score_without}
    versions = {"lora-export": __version__}
    for package in SHOWN_VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "base": hub_name(Path(loaded.source)) or loaded.source,
        "base_sha256": base_hash,
        "data": data,
        "data_sha256": learnt.sha256,
        "examples": str(learnt),
        "adapter": {**run.adapter.metadata, "layers": len(run.adapter.pairs), "trained": str(run.parameters)},
        "settings": {name.replace("_", " "): value for name, value in run.settings.recorded.items()},
        "figures": {"training": str(run.history), **{name: str(score) for name, score in scores.items() if score}},
        "versions": versions,
    }


def _write_comparison(stage: Path, document: Mapping[str, Any], runs: Sequence[TrainingRun]) -> None:
    write_json(stage / f"{COMPARISON}.json", dict(document))
    draw_losses(losses_of(runs), stage / f"{COMPARISON}.png")
    page = comparison_page(document, f"{COMPARISON}.png")
    (stage / f"{COMPARISON}.html").write_text(page, encoding="utf-8", newline="\n")
