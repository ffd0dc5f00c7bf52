"""`lora-export generate`: texts from the graphs of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_export.cli.arguments import cli_command, print_document
from lora_export.cli.parameters import FilePath
from lora_export.errors import WrongUsage, one_line, printable
from lora_export.options.export import GenerateOptions, no_text

if TYPE_CHECKING:
    from lora_export.api.generate import Generation


@cli_command(
    GenerateOptions,
    'generate served --prompt "Once upon a time"',
    'generate served --prompt "Hello" --adapter pirate --temperature 0.7 --seed 1',
)
@click.option(
    "--prompt",
    "texts",
    multiple=True,
    help="Text to go on from, or to translate or sum up. Several run as one batch. With an --image that is read "
    "alone: the first tokens of the text, such as the token of a Donut's task, once for all images or once for each.",
)
@click.option(
    "--audio",
    "sounds",
    multiple=True,
    type=FilePath(),
    metavar="FILE",
    help="Sound for a speech model: .wav, .flac, .ogg, .mp3.",
)
@click.option(
    "--image",
    "images",
    multiple=True,
    type=FilePath(),
    metavar="FILE",
    help="Image to read: to write a text of it, or among the words of --prompt.",
)
@click.option(
    "--adapter",
    "chosen",
    multiple=True,
    metavar="NAME",
    help="Adapter to use: once for all prompts, or in a graph of --lora rows or slots once for each. `base` is none.",
)
def generate_command(
    texts: tuple[str, ...],
    sounds: tuple[Path, ...],
    images: tuple[Path, ...],
    chosen: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Generate a text for each prompt, sound or image, with the graphs in FOLDER, under onnxruntime.

    FOLDER is an output of `lora-export onnx --with-cache`, with the tokenizer beside the graphs, or an .onnx. A single
    text is shown while it is generated. The same seed gives the same text.
    """
    from lora_export.api.generate import count_texts, generate

    if [bool(texts), bool(sounds), bool(images)].count(True) != 1 and not (texts and images and not sounds):
        raise WrongUsage(
            "give --prompt TEXT, --audio FILE for a speech model, or --image FILE for a model that reads images, "
            "with or without --prompt"
        )
    streams = not as_json and count_texts(options["source"], sounds or texts, images) == 1
    results = generate(
        prompts=sounds or texts,
        images=images,
        adapters=_by_prompt(chosen),
        on_text=(lambda _, text: click.echo(shown_text(text), nl=False)) if streams else no_text,
        **options,
    )
    if as_json:
        names = list(chosen) if len(chosen) > 1 else [chosen[0] if chosen else None] * len(results)
        print_document(
            [
                {"prompt": str(result.prompt), "adapter": name, "text": result.text, "tokens": list(result.tokens)}
                for result, name in zip(results, names, strict=True)
            ]
        )
    elif streams:
        click.echo("" if results[0].text is not None else _text(results[0]))
    else:
        for number, result in enumerate(results, 1):
            click.echo(f"{number}. {one_line(str(result.prompt))}")
            click.echo(shown_text(_text(result)))


def _text(result: Generation) -> str:
    """The text; the token ids where there is no tokenizer."""
    return f"tokens {' '.join(map(str, result.tokens))}" if result.text is None else result.text


def _by_prompt(chosen: tuple[str, ...]) -> str | list[str | None] | None:
    """One name for all prompts, or one for each; `base` is none."""
    names = [None if name == "base" else name for name in chosen]
    return (names[0] if names else None) if len(names) < 2 else names


def shown_text(text: str) -> str:
    """A model's text for a terminal: its lines and tabs as they are, and other control characters escaped."""
    return "\t".join(printable(part) for part in text.split("\t"))
