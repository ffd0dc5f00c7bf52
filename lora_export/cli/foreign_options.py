"""Options of other tools, and what they are called here: an error names the right one."""

from __future__ import annotations

import click

# name here -> names elsewhere: transformers, PEFT, optimum, Olive, mergekit, mlx-lm, and Unix
ELSEWHERE = {
    "--adapter": "--adapters --adapter-path --lora-adapter --lora-adapters --lora-path --lora-model --lora-weights "
    "--peft --peft-model --peft-path --lora",
    "--output": "--out --output-dir --output-path --output-file --save-path --save-dir --save --out-path "
    "--outfile --dest",
    "--weight": "--weights --scale --strength --multiplier --lora-scale --lora-weight --ratio --adapter-weight "
    "--factor",
    "--overwrite": "--force --yes --replace --overwrite-output-dir --exist-ok -f -y",
    "--dtype": "--precision --torch-dtype --data-type --fp16 --half --float16 --bf16 --out-dtype --save-dtype",
    "--provider": "--device --execution-provider --ep --cuda --gpu",
    "--device": "--provider --cuda --gpu --accelerator",
    "--verbose": "--debug --loglevel --log-level",
    "--quiet": "--silent --no-progress",
    "--lora": "--mode --lora-mode --adapter-mode",
    "--opset": "--opset-version --target-opset",
    "--target": "--targets --target-module --target-modules --lora-target --lora-layers --modules",
    "--rank": "--r --lora-r --lora-rank -r",
    "--alpha": "--lora-alpha",
    "--rslora": "--use-rslora",
    "--data": "--dataset --train-file --training-data --train --dataset-path",
    "--quantize-base": "--load-in-4bit --quantization-bit --qlora --use-4bit --bnb-4bit-quant-type",
    "--epochs": "--num-epochs --num-train-epochs --n-epochs",
    "--learning-rate": "--lr",
    "--batch-size": "--batch --per-device-train-batch-size --bs",
    "--max-length": "--max-seq-length --max-seq-len --seq-length --max-len",
    "--head": "--modules-to-save --save-modules",
    "--holdout": "--validation-split --test-size --eval-split --val-split",
    "--report": "--junit --junit-xml --junitxml --report-file --html --xml",
    "--inputs": "--input --input-file --example-inputs --sample-inputs --npz --load-inputs",
    "--atol": "--tolerance --tol --abs-tol",
    "--rtol": "--rel-tol",
    "--no-verify": "--skip-verify --no-check --skip-validation --no-validate --skip-checks",
    "--dry-run": "--plan --simulate",
    "--base": "--checkpoint --base-checkpoint",
    "--for": "--graph --onnx",
    "--check": "--hash-check --validate",
    "--json": "--as-json --format-json",
}
HERE: dict[str, list[str]] = {}
for _name, _others in ELSEWHERE.items():
    for _other in _others.split():
        HERE.setdefault(_other, []).append(_name)

# What other tools take by an option, and each command here as its first argument
FIRST_ARGUMENT = {"--model", "--base", "--base-model", "--model-path", "--model-id", "--model-name", "--path", "-m"}
FIRST_ARGUMENT |= {"--base-model-path", "--model-name-or-path", "--pretrained-model-name-or-path", "--candidate"}


def renamed(error: click.NoSuchOption, ctx: click.Context) -> click.UsageError:
    """The error with the name that the option has in this command, where one is known."""
    written = error.option_name.partition("=")[0].replace("_", "-").lower()
    options = {name for parameter in ctx.command.params for name in parameter.opts}
    possible = [name for name in (written, *HERE.get(written, ())) if name in options]
    if possible:
        meant = " or ".join(f"'{name}'" for name in possible)
        return click.UsageError(f"No such option '{error.option_name}'. Did you mean {meant}?", ctx)
    first = next((one for one in ctx.command.params if isinstance(one, click.Argument)), None)
    if written in FIRST_ARGUMENT and first is not None:
        usage = f"{ctx.command_path} {' '.join(ctx.command.collect_usage_pieces(ctx))}"
        message = f"No such option '{error.option_name}'. {first.make_metavar(ctx)} is an argument: {usage}"
        return click.UsageError(message, ctx)
    return error
