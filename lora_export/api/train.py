"""`lora_export.train`: make an adapter, or compare ways to train a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lora_export import formats, layers
from lora_export.api.load import load_adapters, refuse_adapter_as_model
from lora_export.api.load_model import model_paths, refuse_no_source, refuse_pt2
from lora_export.api.training_data import TrainingData, encoded_data, read_training_data
from lora_export.api.training_output import (
    facts_for_card,
    noted_checkpoint,
    staged_output,
    write_comparison,
    write_trained_adapter,
)
from lora_export.api.training_strategies import (
    HEADS,
    Trainer,
    TrainingRun,
    heads_of,
    note_on_attention,
    note_on_other_names,
    note_on_tied_rows,
    note_on_uncalled,
    note_on_unknown_head,
    note_on_untrained,
    notes_on_peft,
    refuse_rank_beyond_layers,
    with_new_modules,
)
from lora_export.callbacks import ignore, note_each
from lora_export.errors import InputRefused, OutputFailed, WrongUsage
from lora_export.extras import pip_install
from lora_export.formats.peft_records import as_peft_computes
from lora_export.isolation.turns import in_turn
from lora_export.lora import Adapter
from lora_export.models.four_bit_base import TrainedBase, require_bitsandbytes
from lora_export.models.load import load_model
from lora_export.models.model import Model
from lora_export.options.declaring import narrowed, takes
from lora_export.options.reading import DEFAULTS
from lora_export.options.spelling import named
from lora_export.options.train import AdapterChoice, TrainingSettings, TrainOptions
from lora_export.storage.hub_cache import locate
from lora_export.storage.manifest import write_manifest
from lora_export.storage.store_path import place
from lora_export.training.batches import ReadyBatches
from lora_export.training.checkpoint import (
    TRAINING_STATE,
    Checkpoints,
    TrainingHistory,
    checkpoint_folder,
    refuse_other_files,
    require_tensorboard,
)
from lora_export.training.compiling import refuse_without_compiler
from lora_export.training.evaluation import Score
from lora_export.training.loop import accelerator_for
from lora_export.training.processes import rank as process_rank
from lora_export.training.processes import wait_for_all, world_size
from lora_export.version import __version__


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


@dataclass(frozen=True, eq=False)
class _Base:
    """The frozen model, and what a record contains of it."""

    model: Model
    sha256: str
    quantised: str  # describes weights of 4 bits; empty without


@takes(TrainOptions)
@in_turn
def train(options: TrainOptions) -> TrainResult:
    """Train a LoRA adapter for a model and save it as a PEFT folder.

    `model` is a Hugging Face folder, `package.module:factory` or `file.py:factory`. `data` is a file, a folder, or
    `file.py:factory` (`lora-export guide training`). The columns of its rows decide what is learnt, unless `task` names
    it. The base is frozen. The same arguments give the same adapter on the same machine.

    A has `rank` rows and B has `rank` columns; B·A is scaled by alpha/rank, or by alpha/√rank with `rslora`. With
    `init` "pissa" or "olora", A and B start from the weights themselves, and the saved adapter has twice the rank.
    `target` is "all-linear" (the default where nothing else chooses layers) or endings of layer names: linear layers,
    convolutions, embeddings, nn.MultiheadAttention. With `continue_from`, an adapter in any format is trained further.

    With `quantize_base`, the linear layers of a Hugging Face folder have frozen weights of 4 bits, with double
    quantisation (QLoRA, by bitsandbytes). A folder that bitsandbytes has stored in nf4 or fp4 is trained beside as it
    is. Heads, embeddings and norms are fp32. With `base_dtype`, all frozen weights are in this dtype, and the steps are
    computed in it; A, B and heads are fp32.

    Several ranks give a folder of adapters, `rank-4` and so on. With several, and with `compare`, all are trained from
    the same seed and data, and `comparison.json`, `.html` (with jinja2) and `.png` (with matplotlib) have the table.

    A checkpoint is written to `OUTPUT.training` every `save_every` steps and when training is interrupted; with
    `resume`, training continues from it, with the same results to the last bit on a CPU, or starts where none was
    written yet. The folder of `tensorboard` stays after an error.

    Raises InputRefused for a model or data that cannot be used and for a loss that is not finite, EnvironmentLacking
    where a package, the device or memory is missing, and OutputFailed where `output` cannot be written. After an error
    nothing new is left behind but the checkpoint, where there is one.
    """
    options = _prepared(options)
    output, on_message = place(options.output), options.on_message
    learnt = read_training_data(options.data, columns=options.columns, task=options.task, on_message=on_message)
    on_message(f"{options.data}: {learnt}")
    learnt, note = learnt.for_base(options.model)
    if note:
        on_message(note)
    rows = {"batch_size": 1} if isinstance(learnt.content, ReadyBatches) else {}
    settings = narrowed(options, TrainingSettings, **rows)
    folder = _place_of_checkpoint(options)
    given = [place(path) for path in (options.data, options.continue_from) if path is not None]
    inputs = [
        *(path for path in given if path.exists()),
        *(path for path in model_paths(options.model) if path.is_dir()),
    ]
    with staged_output(output, inputs, overwrite=options.overwrite, on_message=on_message) as stage:
        torch.manual_seed(options.seed)  # the first values of a new head depend on it
        model, quantised = _load_base(options, learnt)
        data_in, held_out = encoded_data(model, learnt, options)
        heads = with_new_modules(model, options.heads or heads_of(model, learnt.peft_task))
        if learnt.head and (note := note_on_unknown_head(model, heads)):
            options.on_message(note)
        base = _Base(model, model.fingerprint(), quantised)
        trainer = Trainer(model.module, data_in, held_out, settings, heads, options)
        new = requested_adapters(options, model, heads, seed=options.seed)
        _show_notes(options, model, new)
        identity = _identity(options, settings, base, learnt, new, heads)
        checkpoints = None if options.is_comparison else Checkpoints(folder, identity)
        runs: list[TrainingRun] = []
        for rank, adapter in new.items():
            with noted_checkpoint(folder):
                run = trainer.adapter(adapter, rank, checkpoints)
            runs.append(run)
            own = stage / f"rank-{rank}" if len(new) > 1 else stage
            _write_run(options, base, learnt, run, adapter, own)
        runs += trainer.compared(options.compare)
        if options.is_comparison:
            table = {"model": str(options.model), "data": f"{options.data}: {learnt}", "settings": settings.recorded}
            write_comparison(stage, table | {"runs": [run.document for run in runs]}, runs, on_message)
        made = {"made_by": f"lora-export {__version__}", "model": str(options.model), "settings": settings.recorded}
        write_manifest(stage, made | ({"base_quantization": quantised} if quantised else {}))
    if checkpoints is not None and process_rank() == 0:
        checkpoints.remove()
    wait_for_all()
    places = [output / f"rank-{rank}" for rank in new] if len(new) > 1 else [output]
    return TrainResult(output, tuple(map(formats.load, places)), tuple(runs))


def _prepared(options: TrainOptions) -> TrainOptions:
    """The options with models found, and without callbacks in all processes but one.

    Raises before anything is read: EnvironmentLacking for a missing package or device, WrongUsage for a base that is to
    be shared by one process.
    """
    refuse_pt2(options.model)
    continued = options.continue_from
    if continued is not None:
        continued = locate(continued, options.on_message, options.download)
    if options.tensorboard is not None:
        require_tensorboard()
    if options.quantize_base:
        require_bitsandbytes()
    accelerator_for(options.device, options.precision)
    if options.shard_base and world_size() == 1:
        raise WrongUsage(
            f"{named('shard_base')} gives each of several processes a share of the base, and this is the only one. "
            "Start them with `torchrun --nproc-per-node N -m lora_export train ...`, or leave it out"
        )
    if options.compile:
        refuse_without_compiler(options.device)
    if process_rank() > 0:  # one process speaks, and writes the files
        options = replace(options, on_message=ignore, on_progress=ignore)
    model = locate(options.model, options.on_message, options.download)
    refuse_adapter_as_model(model)
    refuse_no_source(model)
    return replace(options, model=model, continue_from=continued)


def _place_of_checkpoint(options: TrainOptions) -> Path:
    """The folder of the checkpoint. Raises OutputFailed for one that is to be neither continued nor replaced.

    Also for one with other files, which would be removed with the checkpoint.
    """
    folder = checkpoint_folder(place(options.output))
    if process_rank() == 0 and folder.exists() and not (options.resume or options.overwrite):
        raise OutputFailed(
            f"{folder} has the checkpoint of a training that did not end: add {named('resume', True)}, or "
            f"{named('overwrite', True)}"
        )
    if process_rank() == 0 and not options.is_comparison:
        refuse_other_files(folder)
    if options.resume and not (folder / TRAINING_STATE).is_file():
        options.on_message(f"note: there is no checkpoint in {folder}: training starts from the beginning")
    return folder


def _load_base(options: TrainOptions, learnt: TrainingData) -> tuple[Model, str]:
    """The model with a head for what is learnt, and a description of its weights of 4 bits, where it has some."""
    loaded = load_model(
        str(options.model),
        head=learnt.head,
        dtype=getattr(torch, options.base_dtype),
        may_add=True,
        streamed=options.shard_base,
        base=TrainedBase(options.quantize_base, (*options.heads, *HEADS)),
    )
    layers.compute_in_input_dtype(loaded.module)
    quantised = layers.four_bit_layers(loaded.module)
    if quantised:
        options.refuse_full_training()
        options.on_message(f"base: {quantised}")
    elif options.quantize_base:
        raise InputRefused(f"{options.model} has no linear layer to quantise ({named('quantize_base')})")
    return loaded, quantised


def _show_notes(options: TrainOptions, loaded: Model, new: Mapping[int, Adapter]) -> None:
    """Notes on the adapters before they are trained. Raises InputRefused for a rank that is larger than a layer."""
    first = next(iter(new.values()))
    note_each(options.on_message, first.notes)  # on how an adapter that is continued was read
    for adapter in () if options.continue_from else new.values():
        refuse_rank_beyond_layers(adapter, named=options.names_layers, on_message=options.on_message)
    notes = (
        note_on_attention(first),
        note_on_other_names(loaded, first),
        *notes_on_peft(loaded, first),
        note_on_tied_rows(loaded.module, first),
    )
    for note in notes:
        if note:
            options.on_message(note)


def _identity(
    options: TrainOptions,
    settings: TrainingSettings,
    base: _Base,
    learnt: TrainingData,
    new: Mapping[int, Adapter],
    heads: tuple[str, ...],
) -> dict[str, object]:
    """What a training has to have in common with the one whose checkpoint it continues."""
    names = ("holdout", "max_length", "packing", "task", "quantize_base", "base_dtype")
    rank, first = next(iter(new.items()))
    return {
        "base": base.sha256,
        "data": learnt.sha256,
        **settings.recorded,
        **{name: getattr(options, name) for name in names},
        "rank": rank,
        "alpha": first.metadata.get("lora_alpha"),  # which other formats than PEFT's do not have
        **options.identity,
        "targets": list(first.pairs),
        "heads": list(heads),
        "columns": dict(options.columns or {}),
        "continued_from": first.sha256,
    }


def _write_run(
    options: TrainOptions, base: _Base, learnt: TrainingData, run: TrainingRun, new: Adapter, folder: Path
) -> None:
    """Write a trained adapter, with messages on what its training measured."""
    on_message, settings = options.on_message, run.settings
    on_message(f"{run.parameters}")
    on_message(str(run.history))
    if (settings.keep_best or settings.patience) and (best := run.history.best):
        on_message(f"kept: step {best.step}, with the lowest held-out loss ({best.held_out_loss:.4g})")
    for note in filter(None, (note_on_untrained(run), note_on_uncalled(run))):
        on_message(note)
    facts = facts_for_card(base.model, learnt, run, base.sha256, base.quantised, options)
    write_trained_adapter(folder, base.model, learnt, run, new, facts)
    if not facts["plot"]:
        on_message(f"note: the losses are not drawn: matplotlib is missing ({pip_install('plot')})")


# --- the adapters that it starts from ---

DEFAULT_RANK = 8
ALPHA_PER_RANK = 2.0


def requested_adapters(choice: AdapterChoice, loaded: Model, heads: Sequence[str], *, seed: int) -> dict[int, Adapter]:
    """The adapters to train, by rank. Raises InputRefused as `create_adapter`, and for one that cannot go on."""
    if choice.continue_from is not None:
        adapter = _continued(choice, loaded, heads)
        return {int(adapter.metadata.get("r") or max(pair.rank for pair in adapter.pairs.values())): adapter}
    return {
        rank: layers.create_adapter(
            loaded.module,
            targets=choice.targets,
            rank=rank,
            alpha=choice.alpha or ALPHA_PER_RANK * rank,
            rank_pattern=choice.rank_pattern or {},
            alpha_pattern={**(choice.alpha_pattern or {}), **_alphas_of_ranks(choice)},
            target_pattern=choice.target_pattern,
            target_parameters=choice.target_parameters,
            rslora=choice.rslora,
            dora=choice.dora,
            dropout=choice.dropout or 0.0,
            bias=choice.bias,
            token_indices=choice.token_indices,
            modules_to_save=heads,
            seed=seed,
        )
        for rank in choice.ranks or (DEFAULT_RANK,)
    }


def _alphas_of_ranks(choice: AdapterChoice) -> dict[str, float]:
    """Twice the rank of each pattern that has no alpha of its own, unless an alpha is given."""
    ranks = {} if choice.alpha else choice.rank_pattern or {}
    return {name: ALPHA_PER_RANK * rank for name, rank in ranks.items() if name not in (choice.alpha_pattern or {})}


def _continued(choice: AdapterChoice, loaded: Model, heads: Sequence[str]) -> Adapter:
    assert choice.continue_from is not None
    source = Path(choice.continue_from)
    (stored,) = load_adapters(source, reading=DEFAULTS.for_base(loaded.source if loaded.is_huggingface else None))
    if kind := stored.metadata.get("peft_type"):
        raise InputRefused(f"{source} is an adapter of the kind {kind}; only LoRA is trained further")
    (adapter,) = layers.respelled_for(loaded.module, [as_peft_computes(stored)])
    if adapter.added or adapter.biases:
        what = ", ".join((*adapter.added, *adapter.biases))
        raise InputRefused(f"{source} adds to vectors, which is not trained further: {what}")
    _refuse_other_labels(adapter, loaded, source)
    dropout = choice.dropout if choice.dropout is not None else float(adapter.metadata.get("lora_dropout", 0.0))
    new = {
        name: value
        for name, value in layers.tensors_of(loaded.module, heads).items()
        if name not in adapter.replaced and name.removesuffix(".weight") not in adapter.pairs
    }
    metadata = {key: value for key, value in adapter.metadata.items() if key != "model_config"}
    return dataclasses.replace(
        adapter, replaced={**adapter.replaced, **new}, metadata={**metadata, "lora_dropout": dropout}
    )


def _refuse_other_labels(adapter: Adapter, loaded: Model, source: Path) -> None:
    """Raise InputRefused where the head of the adapter has other classes, or another order of them, than the data."""
    trained = (adapter.metadata.get("model_config") or {}).get("id2label")
    config: Any = getattr(loaded.module, "config", None)
    if not trained or not adapter.replaced or config is None:
        return
    own, data = ({int(key): str(label) for key, label in table.items()} for table in (trained, config.id2label))
    if own != data:
        raise InputRefused(
            f"{source} was trained on the classes {', '.join(own.values())}, and the data has "
            f"{', '.join(data.values())}: its head means other classes"
        )
