"""`lora_export.train`: make an adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lora_export import __version__, formats, layers, plan
from lora_export.api.callbacks import OnMessage, OnProgress, Progress, ignore
from lora_export.api.load import model_paths, refuse_pt2
from lora_export.errors import InputRefused, MatchError, WrongUsage, listed
from lora_export.formats import peft
from lora_export.lora import Adapter
from lora_export.models.huggingface import load_tokenizer, set_padding_token
from lora_export.models.load import load_model
from lora_export.models.model import Model
from lora_export.storage import atomic_output
from lora_export.storage.hub_cache import hub_name, locate
from lora_export.storage.manifest import write_manifest
from lora_export.training.batches import Data, array_data, token_data
from lora_export.training.data import Examples, read_examples, split
from lora_export.training.evaluation import Score, evaluate
from lora_export.training.loop import TrainingHistory, fit
from lora_export.weights.checkpoint import open_checkpoint

HEADS = ("classifier", "score", "classification_head", "qa_outputs")  # names of task heads in transformers


@dataclass(frozen=True, eq=False)
class TrainResult:
    """The adapter as it was saved, and what training measured."""

    output: Path
    adapter: Adapter
    history: TrainingHistory  # loss and seconds of every step
    scores: Mapping[str, Score]  # on held-out examples: "adapter", "adapter_off" and, where compared, "frozen"


@dataclass(frozen=True)
class _Settings:
    """How one module is trained."""

    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    device: Literal["cpu", "cuda"]

    @property
    def recorded(self) -> dict[str, Any]:
        """What the manifest contains. The device is not part of it: results do not depend on it by intent."""
        return {name: getattr(self, name) for name in ("epochs", "batch_size", "learning_rate", "seed")}

    def fit(self, module: nn.Module, data: Data, on_step: Callable[[int, int, float], None]) -> TrainingHistory:
        return fit(module, data, device=self.device, on_step=on_step, **self.recorded)


def train(
    model: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    rslora: bool = False,
    target: str | Sequence[str] = "all-linear",
    heads: Sequence[str] = (),
    epochs: int = 3,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    max_length: int = 128,
    holdout: float = 0.2,
    compare_frozen: bool = False,
    seed: int = 0,
    device: Literal["cpu", "cuda"] = "cpu",
    overwrite: bool = False,
    download: bool = False,
    on_message: OnMessage = ignore,
    on_progress: OnProgress = ignore,
) -> TrainResult:
    """Train a LoRA adapter for a model and save it as a PEFT folder.

    `model` is a Hugging Face folder, `package.module:factory` or `file.py:factory`. `data` is a .jsonl or .csv file
    with the columns `text` and `label` (a classification head is added, trained and saved with the adapter), or an .npz
    with the model's inputs and `labels`. A has `rank` rows and B has `rank` columns; B·A is scaled by alpha/rank, or by
    alpha/√rank with `rslora`. `target` is "all-linear" or endings of layer names. `heads` are modules that are trained
    and saved whole. `max_length` is in tokens. `holdout` (0 to 1) is the part of the examples that is not trained on.
    With `compare_frozen` the head alone is trained first, on the frozen base, for comparison.

    The base is frozen. The same arguments give the same adapter on the same machine.

    With `download`, what the cache lacks of a name of the Hugging Face Hub is downloaded (`owner/name[@revision]`).
    Then EnvironmentLacking is raised without a connection.

    Raises InputRefused for a model or data that cannot be used, EnvironmentLacking where a package is missing, and
    OutputFailed where `output` cannot be written. After an error nothing new is left behind.
    """
    refuse_pt2(model)
    model = locate(model, on_message, download)
    data, output = Path(data), Path(output)
    settings = _Settings(epochs, batch_size, learning_rate, seed, device)
    examples = read_examples(data)
    on_message(f"{data}: {examples}")
    inputs = [data, *(path for path in model_paths(model) if path.is_dir())]
    with atomic_output.stage_folder(output, inputs=inputs, overwrite=overwrite, on_message=on_message) as stage:
        torch.manual_seed(seed)  # the first values of a new head depend on it
        loaded = load_model(str(model), labels=examples.classes if examples.texts else (), may_add=True)
        data_in, held_out = _prepared(loaded, examples, holdout=holdout, seed=seed, max_length=max_length)
        heads = _with_new_modules(loaded, heads or _heads_of(loaded))
        scores: dict[str, Score] = {}
        if compare_frozen:
            scores["frozen"] = _head_alone(loaded, heads, data_in, held_out, settings, on_message, on_progress)
        new = layers.create_adapter(
            loaded.module,
            targets=_targets(target),
            rank=rank,
            alpha=alpha,
            rslora=rslora,
            seed=seed,
            modules_to_save=heads,
        )
        if misfit := _misfit(loaded, new):
            on_message(misfit)
        layers.attach(loaded.module, plan.make([new], layers.specs(loaded.module), identity_ok=True), trainable=True)
        on_message(str(layers.count_parameters(loaded.module)))
        history = settings.fit(loaded.module, data_in, _on_step("training", on_progress))
        on_message(str(history))
        trained = layers.read_back(loaded.module, new)
        if held_out is not None:
            scores |= _with_and_without(loaded.module, held_out, device)
        peft.write(trained, stage, rank=rank, alpha=alpha, targets=new.targets, **_config(loaded, rslora=rslora))
        _write_model_config(loaded, stage)
        made = {"made_by": f"lora-export {__version__}", "model": str(model), "settings": settings.recorded}
        write_manifest(stage, made)
    if any(name.endswith(".out_proj") and name.removesuffix(".out_proj") in new.pairs for name in new.pairs):
        on_message(
            "note: PEFT reads adapters of nn.MultiheadAttention in another way: it ignores the output projection of "
            "this adapter, and adds it twice in its own. lora-export and this adapter agree with each other"
        )
    return TrainResult(output, formats.load(output), history, scores)


def _targets(target: str | Sequence[str]) -> Any:
    if target == "all-linear":
        return target
    return [name for name in (target.split(",") if isinstance(target, str) else target) if name]


def _on_step(stage: str, on_progress: OnProgress) -> Callable[[int, int, float], None]:
    return lambda done, total, loss: on_progress(Progress(stage, done, total, "steps", f"loss {loss:.3f}"))


def _prepared(
    loaded: Model, examples: Examples, *, holdout: float, seed: int, max_length: int
) -> tuple[Data, Data | None]:
    """The examples to train on and those held out, as the model takes them."""
    trained_on, held_out = split(examples, holdout, seed=seed) if holdout else (examples, None)
    if not examples.texts:
        return array_data(trained_on), None if held_out is None else array_data(held_out)
    tokenizer = load_tokenizer(loaded)
    tokens = token_data(trained_on, tokenizer, max_length=max_length)
    set_padding_token(loaded, tokenizer)
    return tokens, None if held_out is None else token_data(held_out, tokenizer, max_length=max_length)


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


def _head_alone(
    loaded: Model,
    heads: Sequence[str],
    data: Data,
    held_out: Data | None,
    settings: _Settings,
    on_message: OnMessage,
    on_progress: OnProgress,
) -> Score:
    """The score of the head alone on the frozen base, with the same data, steps and seed."""
    on_message("the head alone, on the frozen base:")
    if not heads or held_out is None:
        raise WrongUsage("--compare-frozen needs a head to train (--head) and held-out examples (--holdout)")
    module: nn.Module = copy.deepcopy(loaded.module).requires_grad_(False)
    for head in heads:
        module.get_submodule(head).requires_grad_(True)
    on_message(str(settings.fit(module, data, _on_step("training the head alone", on_progress))))
    return evaluate(module, held_out, device=settings.device)


def _with_and_without(module: nn.Module, held_out: Data, device: str) -> dict[str, Score]:
    """The scores with the adapter, and with the same head and the adapter disabled."""
    adapter = evaluate(module, held_out, device=device)
    with layers.scale_adapters(module, 0, keep_replaced=True):
        return {"adapter": adapter, "adapter_off": evaluate(module, held_out, device=device)}


def _config(loaded: Model, *, rslora: bool) -> dict[str, Any]:
    base = hub_name(Path(loaded.source)) or loaded.source
    fields: dict[str, Any] = {"use_rslora": rslora, "base_model_name_or_path": base}
    return fields | ({"task_type": "SEQ_CLS"} if _heads_of(loaded) else {})


def _write_model_config(loaded: Model, stage: Path) -> None:
    """Write the head's class and labels beside the adapter: PEFT's own files do not name the labels."""
    if loaded.is_huggingface:
        config: Any = loaded.module.config
        config.architectures = [type(loaded.module).__name__]
        config.save_pretrained(stage)
