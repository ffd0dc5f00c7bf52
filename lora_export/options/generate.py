"""The options of `generate`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from lora_export.callbacks import OnMessage, ignore
from lora_export.options.common import PROVIDER, ProviderName, Running
from lora_export.options.declaring import Option, Options, Positional

if TYPE_CHECKING:
    from numpy.typing import NDArray

OnText: TypeAlias = Callable[[int, str], None]  # receives the number of a prompt, and the text of its next tokens
Prompt: TypeAlias = "str | Sequence[int] | Path | NDArray[Any]"
Prompts: TypeAlias = "Sequence[Prompt]"
Starts: TypeAlias = str | Sequence[str | Sequence[int]]  # a text or token ids: one for all, or one for each


def no_text(_: int, __: str) -> None:
    """Ignore a text."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(Options):
    """What `generate` takes."""

    source: Annotated[str | Path, Positional(metavar="FOLDER", kind="path")] = field(kw_only=False)
    prompts: Annotated[
        Prompts,
        Option(
            "Texts, lists of token ids, or what an encoder reads: paths or arrays. All run as one batch.",
            python_only=True,
            kind="text",
            multiple=True,
        ),
    ] = field(kw_only=False)
    adapters: Annotated[
        str | Sequence[str | None] | None,
        Option(
            "The adapter for all prompts, or one for each in a graph of {lora=rows}. None is the base.",
            python_only=True,
            kind="text",
            multiple=True,
        ),
    ] = None
    starts: Annotated[
        Starts,
        Option(
            "The first tokens of the texts that are made of images: one for all or one for each.",
            python_only=True,
            kind="text",
            multiple=True,
        ),
    ] = ()
    language: Annotated[str | None, Option("Language of the sounds. Default: as the model hears it.", metavar="en")] = (
        None
    )
    translate: Annotated[bool, Option("Let a speech model write English.")] = False
    max_new_tokens: Annotated[int, Option("Most new tokens.", at_least=1)] = 128
    temperature: Annotated[float, Option("0 takes the most probable token. More draws a token.", at_least=0)] = 0.0
    top_p: Annotated[
        float, Option("Draw among the most probable tokens whose probabilities add up to this.", above=0, at_most=1)
    ] = 1.0
    seed: Annotated[int, Option("Seed of the draws.", at_least=0)] = 0
    chat: Annotated[bool, Option("Put each prompt into the tokenizer's chat template, as a user's message.")] = False
    provider: Annotated[ProviderName, PROVIDER] = Running.provider
    on_text: OnText = field(default=no_text, repr=False, compare=False)
    on_message: OnMessage = field(default=ignore, repr=False, compare=False)
