"""`lora_export.train`: make an adapter, or compare ways to train a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lora_export import __version__, formats, layers
from lora_export.api.callbacks import OnMessage, OnProgress, ignore
from lora_export.api.load import model_paths, refuse_no_source, refuse_pt2
from lora_export.api.requested_adapter import AdapterRequest
from lora_export.api.training_data import encoded_data, read_training_data
from lora_export.api.training_modules import (
    HEADS,
    heads_of,
    note_on_other_names,
    note_on_untrained,
    refuse_rank_beyond_layers,
    with_new_modules,
)
from lora_export.api.training_output import (
    facts_for_card,
    noted_checkpoint,
    staged_output,
    write_comparison,
    write_trained_adapter,
)
from lora_export.api.training_strategies import ComparedStrategy, Trainer, TrainingRun
from lora_export.errors import InputRefused, OutputFailed, WrongUsage
from lora_export.layers.initial_factors import Init
from lora_export.layers.new_adapter import TrainedBiases
from lora_export.lora import Adapter
from lora_export.models.four_bit_base import BaseQuantization, TrainedBase, require_bitsandbytes
from lora_export.models.load import load_model
from lora_export.report.comparison import require_matplotlib
from lora_export.report.files.page import require_jinja2
from lora_export.storage.hub_cache import locate
from lora_export.storage.manifest import write_manifest
from lora_export.training.batches import ReadyBatches
from lora_export.training.checkpoint import Checkpoints, checkpoint_folder
from lora_export.training.compiling import refuse_without_compiler
from lora_export.training.evaluation import Score
from lora_export.training.event_log import require_tensorboard
from lora_export.training.history import TrainingHistory
from lora_export.training.loop import accelerator_for
from lora_export.training.processes import rank as process_rank
from lora_export.training.processes import wait_for_all, world_size
from lora_export.training.settings import Precision, TrainingSettings

BaseDtype = Literal["float32", "bfloat16", "float16"]


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
    rank: int | Sequence[int] | None = None,
    alpha: float | None = None,
    rslora: bool = False,
    dora: bool = False,
    init: Init = "default",
    dropout: float | None = None,
    bias: TrainedBiases = "none",
    target: str | Sequence[str] | None = None,
    target_pattern: str = "",
    target_parameters: Sequence[str] = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    token_indices: Sequence[int] = (),
    heads: Sequence[str] = (),
    continue_from: str | Path | None = None,
    quantize_base: BaseQuantization | None = None,
    base_dtype: BaseDtype = "float32",
    shard_base: bool = False,
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
    compile: bool = False,
    holdout: float = 0.2,
    evaluate_every: int = 0,
    patience: int = 0,
    keep_best: bool = False,
    save_every: int = 100,
    resume: bool = False,
    compare: Sequence[ComparedStrategy] = (),
    tensorboard: str | Path | None = None,
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

    A has `rank` rows (8 unless it is given) and B has `rank` columns; B·A is scaled by alpha/rank, or by alpha/√rank
    with `rslora`. `alpha` is twice the rank unless it is given. `rank_pattern` and `alpha_pattern` map regular
    expressions for ends of layer names to others. `dora` trains the length of each output too, `bias` also the biases
    of the adapted layers ("lora_only") or all; `dropout` is the part of the inputs of A that is dropped. With `init`
    "pissa" or "olora", A and B start from the weights themselves, and the saved adapter has twice the rank.

    `target` is "all-linear" (the default where nothing else chooses layers) or endings of layer names: linear layers,
    convolutions, embeddings, nn.MultiheadAttention. `target_pattern` is a regular expression for whole names,
    `target_parameters` are endings of stacked parameters of experts. `token_indices` are rows of the input embeddings
    that are trained alone. `heads` are modules that are trained and saved whole. With `continue_from`, an adapter in
    any format is trained further, with a new optimiser: its layers, ranks and scales stay.

    With `quantize_base` "nf4", the linear layers of a Hugging Face folder have frozen weights of 4 bits, with double
    quantisation (QLoRA, by bitsandbytes). A folder that bitsandbytes has stored in nf4 or fp4 is trained beside as it
    is. Heads, embeddings and norms are fp32. With `base_dtype` "bfloat16" or "float16", all frozen weights are in this
    dtype, and the steps are computed in it (`precision`); A, B and heads are fp32. With `shard_base`, each of several
    processes holds a share of the frozen weights alone (FSDP).

    Several ranks give a folder of adapters, `rank-4` and so on. With several, and with
    `compare` ("full": all weights; "frozen": the head alone), all are trained from the same seed and data, and
    `comparison.json`, `.png` and `.html` in the output have the table.

    The other settings are those of `TrainingSettings`. `holdout` (0 to 1) is the part of the examples that is not
    trained on. The base is frozen. The same arguments give the same adapter on the same machine. A checkpoint is
    written to `OUTPUT.training` every `save_every` steps and when training is interrupted; with `resume`, training
    continues from it, with the same results to the last bit on a CPU. With `tensorboard`, the metrics of each run are
    also written to a folder there while it runs; this folder stays after an error.

    With `download`, what the cache lacks of a name of the Hugging Face Hub is downloaded (`owner/name[@revision]`).
    Then EnvironmentLacking is raised without a connection.

    Raises InputRefused for a model or data that cannot be used and for a loss that is not finite, EnvironmentLacking
    where a package, the device or memory is missing, and OutputFailed where `output` cannot be written. After an error
    nothing new is left behind but the checkpoint, where there is one.
    """
    refuse_pt2(model)
    source = None if continue_from is None else Path(locate(continue_from, on_message, download))
    wanted = AdapterRequest(
        ranks=(rank,) if isinstance(rank, int) else tuple(rank or ()), alpha=alpha, rslora=rslora, dora=dora,
        init=init, dropout=dropout, bias=bias, target=target, target_pattern=target_pattern,
        target_parameters=tuple(target_parameters), rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}), token_indices=tuple(token_indices),
        continue_from=source,
    )  # fmt: skip
    is_comparison = len(wanted.ranks) > 1 or bool(compare)
    if resume and is_comparison:
        raise WrongUsage("a comparison is not continued: --resume is for the training of one adapter")
    if is_comparison:
        require_matplotlib()
        require_jinja2()
    if tensorboard is not None:
        require_tensorboard()
    if quantize_base:
        _refuse_full_training(compare)
        require_bitsandbytes()
    _refuse_wider_steps(base_dtype, precision)
    if shard_base and (is_comparison or compile):
        raise WrongUsage("--shard-base trains one adapter: leave out --compare, --compile and further ranks")
    accelerator_for(device, precision)  # before anything is read: a missing device ends the command at once
    if shard_base and world_size() == 1:
        raise WrongUsage(
            "--shard-base gives each of several processes a share of the base, and this is the only one. Start them "
            "with `torchrun --nproc-per-node N -m lora_export train ...`, or leave it out"
        )
    if compile:
        refuse_without_compiler(device)
    if process_rank() > 0:  # one process speaks, and writes the files
        on_message, on_progress = ignore, ignore
    model = locate(model, on_message, download)
    refuse_no_source(model)
    output = Path(output)
    learnt = read_training_data(data, columns=columns, task=task)
    on_message(f"{data}: {learnt}")
    learnt = learnt.for_base(model)
    if note := learnt.note_on_labels(model):
        on_message(note)
    settings = TrainingSettings(
        epochs, learning_rate, 1 if isinstance(learnt.content, ReadyBatches) else batch_size, seed, accumulate,
        schedule, warmup, weight_decay, max_gradient_norm, b_ratio, precision, gradient_checkpointing, compile,
        evaluate_every, patience, keep_best, save_every,
    )  # fmt: skip
    if settings.evaluates and not holdout:
        raise WrongUsage("--evaluate-every, --patience and --keep-best need held-out examples (--holdout)")
    folder = checkpoint_folder(output)
    if process_rank() == 0 and folder.exists() and not (resume or overwrite):
        raise OutputFailed(f"{folder} has the checkpoint of a training that did not end: add --resume, or --overwrite")
    given = [Path(data), *([wanted.continue_from] if wanted.continue_from else [])]
    inputs = [*filter(Path.exists, given), *(path for path in model_paths(model) if path.is_dir())]
    with staged_output(output, inputs, overwrite=overwrite, on_message=on_message) as stage:
        torch.manual_seed(seed)  # the first values of a new head depend on it
        floats = (*heads, *HEADS)
        loaded = load_model(
            str(model),
            head=learnt.head,
            dtype=getattr(torch, base_dtype),
            may_add=True,
            streamed=shard_base,
            base=TrainedBase(quantize_base, floats),
        )
        layers.compute_in_input_dtype(loaded.module)
        if quantised := layers.four_bit_layers(loaded.module):
            _refuse_full_training(compare)
            on_message(f"base: {quantised}")
        elif quantize_base:
            raise InputRefused(f"{model} has no linear layer to quantise (--quantize-base)")
        data_in, held_out = encoded_data(
            loaded, learnt, holdout=holdout, seed=seed, max_length=max_length, packing=packing
        )
        heads = with_new_modules(loaded, heads or heads_of(loaded))
        base_hash = loaded.fingerprint()
        trainer = Trainer(
            loaded.module,
            data_in,
            held_out,
            settings,
            heads,
            device,
            on_progress,
            shard_base,
            Path(tensorboard) if tensorboard else None,
        )
        new = wanted.adapters(loaded, heads, seed=seed)
        first = next(iter(new.values()))
        for note in first.notes:  # on how an adapter that is continued was read
            on_message(f"note: {note}")
        for adapter in () if wanted.continue_from else new.values():
            refuse_rank_beyond_layers(adapter, named=wanted.names_layers, on_message=on_message)
        if misfit := note_on_other_names(loaded, first):
            on_message(misfit)
        identity = {
            "base": base_hash, "data": learnt.sha256, **settings.recorded, "holdout": holdout, "max_length": max_length,
            "packing": packing, "rank": first.metadata["r"], "alpha": first.metadata["lora_alpha"], **wanted.recorded,
            "targets": list(first.pairs), "heads": list(heads), "columns": dict(columns or {}), "task": task,
            "continued_from": first.sha256, "quantize_base": quantize_base, "base_dtype": base_dtype,
        }  # fmt: skip
        checkpoints = None if is_comparison else Checkpoints(folder, identity)
        runs: list[TrainingRun] = []
        for one_rank, adapter in new.items():
            with noted_checkpoint(folder):
                run = trainer.adapter(adapter, one_rank, init=init, checkpoints=checkpoints, resume=resume)
            on_message(f"{run.parameters}")
            on_message(str(run.history))
            if (settings.keep_best or settings.patience) and (best := run.history.best):
                on_message(f"kept: step {best.step}, with the lowest held-out loss ({best.held_out_loss:.4g})")
            if note := note_on_untrained(run):
                on_message(note)
            runs.append(run)
            facts = facts_for_card(loaded, learnt, run, base_hash, str(data), quantised, base_dtype)
            place = stage / f"rank-{one_rank}" if len(new) > 1 else stage
            write_trained_adapter(place, loaded, learnt, run, new[one_rank], facts)
            if not facts["plot"]:
                on_message("note: the losses are not drawn: matplotlib is missing (pip install 'lora-export[plot]')")
        runs += trainer.compared(compare)
        if is_comparison:
            table = {"model": str(model), "data": f"{data}: {learnt}", "settings": settings.recorded}
            write_comparison(stage, table | {"runs": [run.document for run in runs]}, runs)
        made = {"made_by": f"lora-export {__version__}", "model": str(model), "settings": settings.recorded}
        write_manifest(stage, made | ({"base_quantization": quantised} if quantised else {}))
    if checkpoints is not None and process_rank() == 0:
        checkpoints.remove()
    wait_for_all()
    names = {name for adapter in new.values() for name in adapter.pairs}
    if any(name.endswith(".out_proj") and name.removesuffix(".out_proj") in names for name in names):
        on_message(
            "note: PEFT reads adapters of nn.MultiheadAttention in another way: it ignores the output projection of "
            "this adapter, and adds it twice in its own. lora-export and this adapter agree with each other"
        )
    places = [output / f"rank-{one_rank}" for one_rank in new] if len(new) > 1 else [output]
    return TrainResult(output, tuple(map(formats.load, places)), tuple(runs))


def _refuse_wider_steps(base_dtype: BaseDtype, precision: Precision) -> None:
    """Raise WrongUsage where the steps would be computed in another dtype than that of the frozen weights."""
    fitting = {"bfloat16": "bf16", "float16": "fp16"}.get(base_dtype, precision)
    if precision != fitting:
        raise WrongUsage(
            f"with --base-dtype {base_dtype} the steps are computed in {base_dtype}, too: add --precision {fitting}"
        )


def _refuse_full_training(compare: Sequence[ComparedStrategy]) -> None:
    if "full" in compare:
        raise WrongUsage("--compare full trains all weights, and those of a base in 4 bits are frozen. Leave it out")
