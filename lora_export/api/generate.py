"""`lora_export.generate`: texts from the graphs of a model, with its adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_export.api.generation_files import genai_model
from lora_export.api.generation_prompts import (
    encoder_inputs,
    first_tokens,
    refuse_other_kinds,
    token_ids,
    tokens_with_images,
)
from lora_export.api.generation_settings import GenerationSettings
from lora_export.api.image_prompts import ImageSize, read_images
from lora_export.api.load import refuse_adapter_as_model
from lora_export.api.publish import require_provider
from lora_export.artifacts.artifact import open_artifact
from lora_export.artifacts.files import FOLDER_LAYOUTS, IMAGE_TEXT_FILES, graphs_in
from lora_export.artifacts.kind import artifact_kind
from lora_export.callbacks import OnMessage
from lora_export.errors import InputRefused, WrongUsage
from lora_export.graph.cache_names import IDS
from lora_export.models.cached_decoder import SEQUENCE_SYMBOL
from lora_export.models.processors import PIXELS, open_tokenizer, refusing_failures
from lora_export.options.declaring import takes
from lora_export.options.export import GenerateOptions, OnText, Prompt
from lora_export.options.spelling import command, named
from lora_export.provenance import refuse_larger
from lora_export.runtime.generation.decoder import Decoder, EncoderDecoder, EncoderDecoderRun, ImageText
from lora_export.runtime.generation.loop import (
    Sampling,
    TextLimits,
    generate_from_encoder,
    generate_in_run,
    generate_tokens,
)
from lora_export.storage import input_files
from lora_export.storage.artifact_kinds import ArtifactKind
from lora_export.storage.store_path import place

NAME_THE_GRAPHS = "Name the folder of the graphs"  # where an adapter is in their place


@dataclass(frozen=True)
class Generation:
    """What was generated after one prompt."""

    prompt: Prompt
    tokens: tuple[int, ...]  # the new ones; the last may be a token that ends a text
    text: str | None  # None where there is no tokenizer: the prompts were token ids


@takes(GenerateOptions)
def generate(options: GenerateOptions) -> list[Generation]:
    """Generate a text for each prompt with the graphs of `export_onnx(..., with_cache=True)`, or others like them.

    `source` is the folder of the graphs, or a decoder's .onnx, with the tokenizer and the configs beside it. Prompts
    are texts, or lists of token ids, which need no tokenizer. Those of a speech model are the paths of sounds, or
    arrays: samples (samples,) or features (features, frames). Those of a model that reads images are the paths of image
    files, or arrays (channels, height, width). `images` are the paths of images among the tokens of texts, in order:
    where the model's image token ("<image>") is in a text, or with `chat` also before it. With `chat`, each text is the
    message of a user, in the tokenizer's template. All prompts run as one batch.

    `adapters` is the name of one adapter for all prompts, or one name, or None for the base, for each prompt: then the
    graph has to be made with `lora="rows"` or "slots". With `lora="inputs"` and "slots", NAME.onnx_adapter is beside
    the graph.

    A text ends with a token of the model's `eos_token_id`, or after `max_new_tokens`. A `temperature` of 0 takes the
    most probable token; otherwise tokens are drawn, as `seed` determines, from the most probable ones whose
    probabilities add up to `top_p`. Tokens that generation_config.json forces, suppresses or penalises are so here.
    What else it asks for, such as beams, is a message. `language` ("en") is that of a multilingual speech model's
    sounds, None for that of its configs, or to let the model tell; with `translate` it writes English. `starts` are the
    first tokens of the texts of a model that reads images, one text or list of token ids for all or one for each: the
    task's token of a Donut. They are no part of the result. `on_text` receives each piece of a text as soon as it is
    known. `provider` is "cpu" or "cuda".

    Raises InputRefused for a folder without such graphs or tokenizer and for unknown adapters, WrongUsage for values
    out of range, EnvironmentLacking where the provider does not run, RuntimeRefused where onnxruntime refuses a run.
    """
    prompts, starts, chat, on_message = options.prompts, options.starts, options.chat, options.on_message
    if not prompts and not options.images:
        raise WrongUsage("there is no prompt")
    sampling = Sampling(options.temperature, options.top_p, options.seed)
    if not options.temperature and (unused := [named(name) for name in ("top_p", "seed") if name in options.chosen()]):
        on_message(f"note: no effect without {named('temperature')}, where nothing is drawn: {' and '.join(unused)}")
    graph = _graph_in(place(options.source))
    settings = GenerationSettings(graph if graph.is_dir() else graph.parent)
    new_tokens = None if "max_new_tokens" in options.chosen() else options.max_new_tokens
    if not_done := settings.not_done(sampling, new_tokens):
        on_message(f"note: not done: {', '.join(not_done)}, which the generation config asks for")
    require_provider(options.provider)
    model = _opened(graph, options.provider)
    if options.images and isinstance(model, EncoderDecoder):
        prompts, starts = options.images, options.prompts  # type: ignore[assignment]
    elif options.images and isinstance(model, Decoder):
        if options.prompts:
            _refuse_starts(model, chat=chat)
        raise InputRefused(f"{graph} takes texts alone, and no images")
    if not prompts:
        raise WrongUsage("there is no prompt")
    if isinstance(model, EncoderDecoder):
        refuse_other_kinds(prompts, model)
    if starts:
        _refuse_starts(model, chat=chat)
    texts_in = any(isinstance(given, str) for given in (*prompts, starts, *starts))
    tokenizer = _tokenizer(settings.folder, needed=texts_in)
    limits = TextLimits(
        settings.end_tokens, options.max_new_tokens, settings.padding, settings.rules, settings.recomputed_beyond
    )
    streams = [TextStream(number, tokenizer, options.on_text) for number in range(len(prompts))]

    def on_token(number: int, token: int) -> None:
        streams[number].add(token)

    if isinstance(model, EncoderDecoder):
        if (options.language is not None or options.translate) and not settings.languages:
            raise WrongUsage("a language and translating are for multilingual speech models")
        inputs = encoder_inputs(prompts, model, settings, tokenizer, chat=chat)
        _refuse_longer(model, {SEQUENCE_SYMBOL: inputs[IDS].shape[1]} if IDS in inputs else {}, graph, on_message)
        first = first_tokens(starts, len(prompts), tokenizer, settings) if starts else None
        run = model.start(inputs, *_chosen_adapters(model, graph, options.adapters, len(prompts)))
        first = first or _start_tokens(run, settings, len(prompts), options.language, translate=options.translate)
        generated = generate_from_encoder(run, first, limits, sampling, on_token)
    else:
        if options.language is not None or options.translate:
            raise WrongUsage("a language and translating are for speech models")
        if isinstance(model, ImageText):
            adapter, _ = _chosen_adapters(model, graph, options.adapters, len(prompts))
            read = read_images(options.images, model, settings)
            images = model.start(read.inputs, adapter, read.tiles)
            sizes = list(map(ImageSize, images.counts, read.grids))
            tokens = tokens_with_images(prompts, sizes, model.token, tokenizer, settings, chat=chat)
        else:
            tokens = [token_ids(prompt, tokenizer, settings, chat=chat) for prompt in prompts]
        reached = max(map(len, tokens)) + limits.new_tokens - 1  # the last new token is not run
        _refuse_longer(model, {SEQUENCE_SYMBOL: reached}, graph, on_message)
        if isinstance(model, ImageText):
            generated = generate_in_run(images, tokens, limits, sampling, on_token)
        else:
            name, ids = _chosen_adapters(model, graph, options.adapters, len(prompts))
            generated = generate_tokens(model, tokens, limits, sampling, on_token, adapter=name, adapter_ids=ids)
    texts = [stream.end() for stream in streams]
    return [Generation(prompt, tuple(new), text) for prompt, new, text in zip(prompts, generated, texts, strict=True)]


def count_texts(source: str | Path, prompts: Sequence[Prompt], images: Sequence[Path]) -> int:
    """How many texts `generate` makes: one for each prompt, or for each image that is no part of a prompt."""
    if prompts and images and graphs_in(_graph_in(place(source))) == IMAGE_TEXT_FILES:
        return len(prompts)
    return len(images or prompts)


def _opened(graph: Path, provider: str) -> Decoder | EncoderDecoder | ImageText:
    if not graph.is_dir():
        return Decoder(graph, provider)
    return ImageText(graph, provider) if graphs_in(graph) == IMAGE_TEXT_FILES else EncoderDecoder(graph, provider)


def _refuse_starts(model: Decoder | EncoderDecoder | ImageText, *, chat: bool) -> None:
    """Raise WrongUsage where a text has no first tokens of its own."""
    if not isinstance(model, EncoderDecoder) or PIXELS not in model.takes:
        raise WrongUsage(
            f"the first tokens of a text ({named('prompt')} beside {named('image')}) are for models that read images"
        )
    if chat:
        raise WrongUsage("a chat template is for prompts, not for the first tokens behind an image")


def _refuse_longer(
    model: Decoder | EncoderDecoder | ImageText, sizes: Mapping[str, int], source: Path, on_message: OnMessage
) -> None:
    """Raise InputRefused for texts beyond the sizes that the file states; a message on stated sizes not known here."""
    remedy = f"Shorten the prompts, or ask for fewer new tokens ({named('max_new_tokens')})"
    refuse_larger(sizes, model.longest, source, remedy)
    for symbol, most in model.longest.items():
        if symbol not in sizes:
            on_message(f"note: {source} was made for sizes of up to {most:,} in {symbol}, which are not checked here")


def _start_tokens(
    run: EncoderDecoderRun, settings: GenerationSettings, count: int, language: str | None, *, translate: bool
) -> list[list[int]]:
    """The tokens with which each text starts; a multilingual speech model chooses the language that is not stated."""
    start = settings.speech_start(language, translate=translate)
    chosen = [0] * count
    if None in start:
        first = np.full((count, 1), settings.start_token, np.int64)
        logits = run.step(first, np.ones_like(first), np.zeros_like(first))
        run.restart()
        known = np.array(sorted(settings.languages.values()))
        chosen = known[logits[:, known].argmax(axis=1)].tolist()
    return [[own if token is None else token for token in start] for own in chosen]


def _tokenizer(folder: Path, *, needed: bool) -> Any:
    try:
        return open_tokenizer(folder, needed=needed)
    except InputRefused as error:
        raise InputRefused(error.lines, "Prompts may be lists of token ids, too: lora_export.generate") from error


def _graph_in(source: Path) -> Path:
    """The graph that a path names: itself, or of a folder the one that its configs name, or the only one.

    That of an encoder-decoder is the folder.
    """
    files = {name for layout in FOLDER_LAYOUTS for name in layout}
    folder = source.parent if source.name in files else source
    if graphs_in(folder):
        return folder
    open_artifact(folder).refuse_missing_graph()
    if not source.is_dir():
        input_files.must_exist(source, "graph")
        if artifact_kind(source) not in (ArtifactKind.GRAPH, ArtifactKind.OTHER):
            refuse_adapter_as_model(source, way_out=NAME_THE_GRAPHS)
            raise InputRefused(f"{source} is no graph: give an .onnx or a folder of graphs")
        return source
    decoder = genai_model(source).get("decoder")
    name = decoder.get("filename") if isinstance(decoder, dict) else None
    if isinstance(name, str) and "/" not in name and (source / name).is_file():
        return source / name
    graphs = sorted(source.glob("*.onnx"))
    if not graphs:
        refuse_adapter_as_model(source, way_out=NAME_THE_GRAPHS)
        raise InputRefused(
            f"{source} has no .onnx. `{command('onnx', 'MODEL', output='FOLDER', with_cache=True)}` makes such a folder"
        )
    if len(graphs) > 1:
        names = ", ".join(path.name for path in graphs)
        raise InputRefused(f"{source} has several graphs ({names}): name the .onnx itself")
    return graphs[0]


def _chosen_adapters(
    model: Decoder | EncoderDecoder | ImageText, source: Path, adapters: str | Sequence[str | None] | None, count: int
) -> tuple[str | None, list[int] | None]:
    """The adapter that is loaded, or the ids of the rows' adapters.

    Raises InputRefused for unknown names, and WrongUsage for another number of them.
    """
    names = [adapters] * count if adapters is None or isinstance(adapters, str) else list(adapters)
    if len(names) != count:
        raise WrongUsage(f"there are {len(names)} adapters for {count} prompts: name one for all, or one for each")
    if not isinstance(model, ImageText) and model.has_slots:
        model.fill(dict.fromkeys(name for name in names if name is not None))
    if rows := model.rows:
        unknown = sorted({name for name in names if name is not None} - set(rows))
        if unknown:
            raise InputRefused(f"{source} has no adapter {', '.join(unknown)}; it has {', '.join(rows)}")
        return None, [0 if name is None else 1 + rows.index(name) for name in names]
    if len(set(names)) > 1:
        raise InputRefused(
            f"{source} runs one adapter at a time: a graph of {named('lora', 'rows')} or slots mixes them in a batch"
        )
    if names[0] is not None:
        model.load(names[0])
    return names[0], None


# --- the text of tokens that come one by one ---

CONTEXT = 16  # tokens before a new one that are decoded with it, at least; at most twice as many and those of its text


class TextStream:
    """Passes on the text that each token adds. A character may be made of several tokens.

    The text of a token depends on those before it: a tokenizer writes no space before the first word. A few of them
    are enough. With all of them, a text of n tokens would take n² / 2 decoded tokens.
    """

    def __init__(self, number: int, tokenizer: Any, on_text: OnText):
        self.number, self.tokenizer, self.on_text = number, tokenizer, on_text
        self.tokens: list[int] = []
        self.start, self.next_start = 0, 0  # tokens from `start` on are decoded; no character is split at either
        self.shown = 0  # characters of their text

    def add(self, token: int) -> None:
        """Pass on what is certain now. A character that is not complete yet is decoded as U+FFFD."""
        self.tokens.append(token)
        text = self._text(self.start)
        if text is None or text.endswith("\ufffd"):
            return
        self._show(text)
        if len(self.tokens) - self.next_start >= CONTEXT and (later := self._text(self.next_start)):
            self.start, self.next_start, self.shown = self.next_start, len(self.tokens), len(later)

    def end(self) -> str | None:
        """Pass on what is left, and return the whole text; None without a tokenizer."""
        self._show(self._text(self.start) or "")
        return self._text(0)

    def _text(self, start: int) -> str | None:
        if self.tokenizer is None:
            return None
        with refusing_failures("the tokenizer fails on the model's tokens"):
            return str(self.tokenizer.decode(self.tokens[start:], skip_special_tokens=True))

    def _show(self, text: str) -> None:
        if len(text) > self.shown:
            self.on_text(self.number, text[self.shown :])
            self.shown = len(text)
