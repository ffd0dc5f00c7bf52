"""`lora-export train`: make an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_export import __version__
from lora_export.cli.arguments import json_option, overwrite_option, refuse_exported, say

if TYPE_CHECKING:
    from torch import nn

    from lora_export.models.model import Model
    from lora_export.training.data import Examples
    from lora_export.training.loop import Data, Score

HEADS = ("classifier", "score", "classification_head", "qa_outputs")  # what transformers calls a model's task head


@click.command()
@click.argument("model")
@click.option("--data", "data_path", required=True, type=click.Path(path_type=Path), help=".jsonl, .csv or .npz.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The adapter's folder.")
@click.option("--rank", type=click.IntRange(min=1), default=8, show_default=True, help="Rows of A, columns of B.")
@click.option(
    "--alpha",
    type=click.FloatRange(min=0, min_open=True),
    default=16.0,
    show_default=True,
    help="B·A is scaled by alpha/rank.",
)
@click.option("--rslora", is_flag=True, help="Scale by alpha/√rank instead of alpha/rank.")
@click.option(
    "--target",
    default="all-linear",
    show_default=True,
    metavar="NAMES|all-linear",
    help="The layers to adapt: endings of their names, separated by commas.",
)
@click.option("--head", "heads", multiple=True, metavar="NAME", help="A module to train whole and save whole.")
@click.option("--epochs", type=click.IntRange(min=1), default=3, show_default=True, help="Passes over the data.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Examples a step.")
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    default=1e-3,
    show_default=True,
    help="AdamW's step size at its peak.",
)
@click.option("--max-length", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens a text.")
@click.option(
    "--holdout",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.2,
    show_default=True,
    help="The share of the data that is kept from training and measured on.",
)
@click.option("--compare-frozen", is_flag=True, help="Also train the head alone on the frozen base, and print both.")
@click.option("--seed", type=int, default=0, show_default=True, help="Fixes the split, the start and the order.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to train.")
@overwrite_option
@json_option
def command(
    model: str,
    data_path: Path,
    output: Path,
    rank: int,
    alpha: float,
    rslora: bool,
    target: str,
    heads: tuple[str, ...],
    epochs: int,
    batch_size: int,
    learning_rate: float,
    max_length: int,
    holdout: float,
    compare_frozen: bool,
    seed: int,
    device: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Train a LoRA adapter for MODEL and save it in PEFT's format.

    MODEL is a Hugging Face folder, `package.module:factory` or `file.py:factory`. DATA is .jsonl or
    .csv with `text` and `label` (a classification head is added and trained with the adapter), or
    .npz with the model's inputs and `labels` (whole numbers to classify, floats to predict).
    """
    import torch

    from lora_export import formats, layers, plan
    from lora_export.cli.progress import step_progress
    from lora_export.errors import one_line
    from lora_export.formats import peft
    from lora_export.models.load import load_model
    from lora_export.storage import atomic_output
    from lora_export.storage.manifest import write_manifest
    from lora_export.training import loop
    from lora_export.training.data import read_examples

    refuse_exported(model)
    examples = read_examples(data_path)
    say(f"{data_path}: {examples}")
    with atomic_output.stage_folder(
        output, inputs=[data_path, *_folder_of(model)], overwrite=overwrite, say=say
    ) as stage:
        torch.manual_seed(seed)  # a new head starts from it
        loaded = load_model(model, labels=examples.classes if examples.texts else ())
        data, judged = _prepared(loaded, examples, holdout=holdout, seed=seed, max_length=max_length)
        heads = heads or _heads_of(loaded)
        settings = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
        scores: dict[str, Score] = {}
        if compare_frozen:
            say("the head alone, on the frozen base:")
            scores["frozen"] = _head_alone(loaded, heads, data, judged, device=device, **settings)
        targets: Any = "all-linear" if target == "all-linear" else [name for name in target.split(",") if name]
        adapter = layers.create_adapter(
            loaded.module, targets=targets, rank=rank, alpha=alpha, rslora=rslora, seed=seed, modules_to_save=heads
        )
        start = plan.make([adapter], layers.specs(loaded.module), identity_ok=True)
        layers.attach(loaded.module, start, trainable=True)
        say(str(layers.count_parameters(loaded.module)))
        with step_progress("training") as on_step:
            history = loop.fit(loaded.module, data, device=device, on_step=on_step, **settings)  # type: ignore[arg-type]
        say(str(history))
        trained = layers.read_back(loaded.module, adapter)
        if judged is not None:
            scores["adapter"] = loop.evaluate(loaded.module, judged, device=device)
            with layers.scale_adapters(loaded.module, 0, keep_replaced=True):
                scores["adapter_off"] = loop.evaluate(loaded.module, judged, device=device)
        peft.write(trained, stage, rank=rank, alpha=alpha, targets=adapter.targets, **_config(loaded, rslora=rslora))
        _write_model_config(loaded, stage)
        write_manifest(stage, {"made_by": f"lora-export {__version__}", "model": model, "settings": settings})
    if any(name.endswith(".out_proj") and name.removesuffix(".out_proj") in adapter.pairs for name in adapter.pairs):
        say(
            "note: PEFT does not read adapters of nn.MultiheadAttention as they are meant: it passes over the output "
            "projection here, and adds it twice in its own. lora-export and this adapter agree with each other"
        )
    saved = formats.load(output)
    if as_json:
        accuracies = {name: score.accuracy for name, score in scores.items()}
        losses = {name: score.loss for name, score in scores.items()}
        click.echo(
            json.dumps(
                {
                    "output": str(output),
                    "sha256": saved.sha256,
                    "parameters": saved.parameters,
                    "steps": len(history.losses),
                    "seconds": sum(history.seconds),
                    "accuracy": accuracies,
                    "loss": losses,
                }
            )
        )
        return
    for name, score in scores.items():
        click.echo(f"{_TOLD[name]}: {score}")
    click.echo(f"wrote {one_line(str(output))} ({saved.parameters:,} numbers)")


_TOLD = {
    "frozen": "held out, head trained alone on the frozen base",
    "adapter": "held out, with the adapter",
    "adapter_off": "held out, same head, adapter off",
}


def _folder_of(model: str) -> list[Path]:
    return [Path(model)] if Path(model).is_dir() else []


def _prepared(
    loaded: Model, examples: Examples, *, holdout: float, seed: int, max_length: int
) -> tuple[Data, Data | None]:
    """What to train on and what to judge by, as the model takes it."""
    from lora_export.models import huggingface
    from lora_export.training import loop
    from lora_export.training.data import split

    kept, held = split(examples, holdout, seed=seed) if holdout else (examples, None)
    if not examples.texts:
        return loop.arrays(kept), None if held is None else loop.arrays(held)
    tokenizer = huggingface.load_tokenizer(loaded)
    tokens = loop.tokenised(kept, tokenizer, max_length=max_length)
    return tokens, None if held is None else loop.tokenised(held, tokenizer, max_length=max_length)


def _heads_of(loaded: Model) -> tuple[str, ...]:
    """The task head of a Hugging Face classifier: what its class has besides the base model."""
    if not loaded.is_huggingface:
        return ()
    return tuple(name for name, _ in loaded.module.named_children() if name in HEADS)


def _head_alone(
    loaded: Model, heads: tuple[str, ...], data: Data, judged: Data | None, *, device: str, **settings: Any
) -> Score:
    """How far the head alone gets on the frozen base, with the same data, steps and seed."""
    import copy

    from lora_export.cli.progress import step_progress
    from lora_export.training import loop

    if not heads or judged is None:
        raise click.UsageError("--compare-frozen needs a head to train (--head) and examples held out (--holdout)")
    module: nn.Module = copy.deepcopy(loaded.module).requires_grad_(False)
    for head in heads:
        module.get_submodule(head).requires_grad_(True)
    with step_progress("training the head alone") as on_step:
        say(str(loop.fit(module, data, device=device, on_step=on_step, **settings)))  # type: ignore[arg-type]
    return loop.evaluate(module, judged, device=device)


def _config(loaded: Model, *, rslora: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {"use_rslora": rslora, "base_model_name_or_path": loaded.source}
    return fields | ({"task_type": "SEQ_CLS"} if _heads_of(loaded) else {})


def _write_model_config(loaded: Model, stage: Path) -> None:
    """The head's class and labels, beside the adapter: PEFT's own files do not say what the labels are called."""
    if loaded.is_huggingface:
        config: Any = loaded.module.config
        config.architectures = [type(loaded.module).__name__]
        config.save_pretrained(stage)
