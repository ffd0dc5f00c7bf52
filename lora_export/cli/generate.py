"""`lora-export generate`: texts from the graphs of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_export.cli.arguments import Command, json_option, print_document, print_message, provider_option
from lora_export.cli.paths import FilePath
from lora_export.errors import WrongUsage, one_line, printable

if TYPE_CHECKING:
    from lora_export.api.generate import Generation

EXAMPLE = """\b
Examples:
  lora-export generate served --prompt "Once upon a time"
  lora-export generate served --prompt "Hello" --adapter pirate --temperature 0.7 --seed 1"""


@click.command(cls=Command, epilog=EXAMPLE)
@click.argument("source", type=FilePath(), metavar="FOLDER")
@click.option(
    "--prompt",
    "texts",
    multiple=True,
    help="Text to go on from, or to translate or sum up. Several run as one batch. With --image: the first tokens of "
    "the text, such as the token of a Donut's task, once for all images or once for each.",
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
    "--image", "images", multiple=True, type=FilePath(), metavar="FILE", help="Image that an image-to-text model reads."
)
@click.option("--language", metavar="en", help="Language of the sounds. Default: as the model hears it.")
@click.option("--translate", is_flag=True, help="Let a speech model write English.")
@click.option(
    "--adapter",
    "chosen",
    multiple=True,
    metavar="NAME",
    help="Adapter to use: once for all prompts, or in a graph of --lora rows once for each. `base` is none.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Most new tokens.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 takes the most probable token. More draws a token.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    show_default=True,
    help="Draw among the most probable tokens whose probabilities add up to this.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the draws.")
@click.option("--chat", is_flag=True, help="Put each prompt into the tokenizer's chat template, as a user's message.")
@provider_option
@json_option
def command(
    source: Path,
    texts: tuple[str, ...],
    sounds: tuple[Path, ...],
    images: tuple[Path, ...],
    language: str | None,
    translate: bool,
    chosen: tuple[str, ...],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    chat: bool,
    provider: str,
    as_json: bool,
) -> None:
    """Generate a text for each prompt, sound or image, with the graphs in FOLDER, under onnxruntime.

    FOLDER is an output of `lora-export onnx --with-cache`, with the tokenizer beside the graphs, or an .onnx. A single
    text is shown while it is generated. The same seed gives the same text.
    """
    from lora_export.api.generate import generate

    if [bool(texts), bool(sounds), bool(images)].count(True) != 1 and not (texts and images and not sounds):
        raise WrongUsage(
            "give --prompt TEXT, --audio FILE for a speech model, or --image FILE for a model that reads images, "
            "with or without --prompt"
        )
    prompts: tuple[str | Path, ...] = images or sounds or texts
    streams = len(prompts) == 1 and not as_json
    results = generate(
        source,
        prompts,
        adapters=_by_prompt(chosen),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chat=chat,
        language=language,
        translate=translate,
        starts=texts if images else (),
        provider=provider,
        on_text=(lambda _, text: click.echo(shown_text(text), nl=False)) if streams else lambda _, __: None,
        on_message=print_message,
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
