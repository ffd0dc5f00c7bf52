"""`lora_export.generate`: texts from the graph of a decoder, with its adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export.api.generation_files import GENAI_CONFIG, MODEL_CONFIGS
from lora_export.api.publish import require_provider
from lora_export.errors import InputRefused, WrongUsage
from lora_export.models.tokenizer import open_tokenizer
from lora_export.runtime.generation.decoder import Decoder
from lora_export.runtime.generation.loop import TextLimits, generate_tokens
from lora_export.runtime.generation.sampling import Sampling
from lora_export.storage import input_files, json_files

Prompt = str | Sequence[int]
OnText = Callable[[int, str], None]  # receives the number of a prompt, and the text of its next tokens


@dataclass(frozen=True)
class Generation:
    """What was generated after one prompt."""

    prompt: Prompt
    tokens: tuple[int, ...]  # the new ones; the last may be a token that ends a text
    text: str | None  # None where there is no tokenizer: the prompts were token ids


def _no_text(_: int, __: str) -> None:
    """Ignore a text."""


def generate(
    source: str | Path,
    prompts: Sequence[Prompt],
    *,
    adapters: str | Sequence[str | None] | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    provider: str = "cpu",
    on_text: OnText = _no_text,
) -> list[Generation]:
    """Generate a text after each prompt with a graph of `export_onnx(..., with_cache=True)`, or one like it.

    `source` is the graph's folder or its .onnx, with the tokenizer and the configs beside it. Prompts are texts, or
    lists of token ids, which need no tokenizer. With `chat`, each text is the message of a user, in the tokenizer's
    template. All prompts run as one batch.

    `adapters` is the name of one adapter for all prompts, or one name, or None for the base, for each prompt: then the
    graph has to be made with `--lora rows`. With `--lora inputs`, NAME.onnx_adapter is beside the graph.

    A text ends with a token of the model's `eos_token_id`, or after `max_new_tokens`. A `temperature` of 0 takes the
    most probable token; otherwise tokens are drawn, as `seed` determines, from the most probable ones whose
    probabilities add up to `top_p`. `on_text` receives each piece of a text as soon as it is known. `provider` is "cpu"
    or "cuda".

    Raises InputRefused for a folder without such a graph or tokenizer and for unknown adapters, WrongUsage for values
    out of range, EnvironmentLacking where the provider does not run, RuntimeRefused where onnxruntime refuses a run.
    """
    if not prompts:
        raise WrongUsage("there is no prompt")
    if max_new_tokens < 1:
        raise WrongUsage(f"the number of new tokens is {max_new_tokens}; it has to be 1 or more")
    sampling = Sampling(temperature, top_p, seed)
    graph = _graph_in(Path(source))
    configs = _configs_beside(graph)
    are_texts = [isinstance(prompt, str) for prompt in prompts]
    tokenizer = _tokenizer_beside(graph, needed=any(are_texts))
    tokens = [_token_ids(prompt, tokenizer, configs, chat=chat) for prompt in prompts]
    require_provider(provider)
    decoder = Decoder(graph, provider)
    adapter, adapter_ids = _chosen_adapters(decoder, adapters, len(prompts))
    limits = TextLimits(_end_tokens(configs), max_new_tokens, _setting(configs, "pad_token_id") or 0)
    streams = [_TextStream(number, tokenizer, on_text) for number in range(len(prompts))]
    generated = generate_tokens(
        decoder,
        tokens,
        limits,
        sampling,
        lambda number, token: streams[number].add(token),
        adapter=adapter,
        adapter_ids=adapter_ids,
    )
    texts = [stream.end() for stream in streams]
    return [Generation(prompt, tuple(new), text) for prompt, new, text in zip(prompts, generated, texts, strict=True)]


class _TextStream:
    """The text of tokens that come one by one: a character may be made of several of them."""

    def __init__(self, number: int, tokenizer: Any, on_text: OnText):
        self.number, self.tokenizer, self.on_text = number, tokenizer, on_text
        self.tokens: list[int] = []
        self.shown = 0

    def add(self, token: int) -> None:
        """Pass on what is certain now. A character that is not complete yet is decoded as U+FFFD."""
        self.tokens.append(token)
        text = self._text()
        if text is not None and not text.endswith("\ufffd"):
            self._show(text)

    def end(self) -> str | None:
        """Pass on what is left, and return the whole text; None without a tokenizer."""
        text = self._text()
        if text is not None:
            self._show(text)
        return text

    def _text(self) -> str | None:
        if self.tokenizer is None:
            return None
        text: str = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        return text

    def _show(self, text: str) -> None:
        if len(text) > self.shown:
            self.on_text(self.number, text[self.shown :])
            self.shown = len(text)


def _tokenizer_beside(graph: Path, *, needed: bool) -> Any:
    try:
        return open_tokenizer(graph.parent, needed=needed)
    except InputRefused as error:
        raise InputRefused(error.lines, "Prompts may be lists of token ids, too: lora_export.generate") from error


def _graph_in(source: Path) -> Path:
    """The graph that a path names: itself, or of a folder the one that its configs name, or the only one."""
    if not source.is_dir():
        input_files.must_exist(source, "graph")
        return source
    config = source / GENAI_CONFIG
    if config.is_file():
        named = json_files.read_json(config).get("model")
        decoder = named.get("decoder") if isinstance(named, dict) else None
        name = decoder.get("filename") if isinstance(decoder, dict) else None
        if isinstance(name, str) and "/" not in name and (source / name).is_file():
            return source / name
    graphs = sorted(source.glob("*.onnx"))
    if not graphs:
        raise InputRefused(
            f"{source} has no .onnx. `lora-export onnx MODEL --with-cache -o FOLDER` makes such a folder"
        )
    if len(graphs) > 1:
        names = ", ".join(path.name for path in graphs)
        raise InputRefused(f"{source} has several graphs ({names}): name the .onnx itself")
    return graphs[0]


def _configs_beside(graph: Path) -> list[dict[str, Any]]:
    """The configs beside a graph: of generation, of the model, of onnxruntime-genai."""
    paths = [graph.with_name(name) for name in reversed(MODEL_CONFIGS)]
    configs = [json_files.read_json(path) for path in paths if path.is_file()]
    genai = graph.with_name(GENAI_CONFIG)
    if genai.is_file() and isinstance(model := json_files.read_json(genai).get("model"), dict):
        configs.append(model)
    return configs


def _setting(configs: Sequence[dict[str, Any]], name: str) -> Any:
    """The first value that is set, in a config or in the part of it for texts."""
    parts = [part for config in configs for part in (config, config.get("text_config")) if isinstance(part, dict)]
    return next((part[name] for part in parts if part.get(name) is not None), None)


def _end_tokens(configs: Sequence[dict[str, Any]]) -> frozenset[int]:
    """The tokens that end a text, as transformers takes them: of the first config alone."""
    ends = _setting(configs[:1], "eos_token_id")
    tokens = ends if isinstance(ends, list) else [ends]
    return frozenset(token for token in tokens if isinstance(token, int))


def _token_ids(prompt: Prompt, tokenizer: Any, configs: Sequence[dict[str, Any]], *, chat: bool) -> list[int]:
    """A prompt as token ids. Raises InputRefused for an empty one, and for ids that the model does not have."""
    if isinstance(prompt, str):
        if chat:
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
            )
        else:
            ids = tokenizer(prompt)["input_ids"]
    else:
        ids = list(prompt)
    if not ids:
        raise InputRefused("a prompt has no token: there is nothing to go on from")
    size = _setting(configs, "vocab_size")
    unknown = [token for token in ids if isinstance(size, int) and token not in range(size)]
    if unknown:
        raise InputRefused(f"a prompt has the token {unknown[0]}; the model has rows for 0 to {size - 1}")
    return list(ids)


def _chosen_adapters(
    decoder: Decoder, adapters: str | Sequence[str | None] | None, count: int
) -> tuple[str | None, list[int] | None]:
    """The name of the adapter to load, or the ids of each row's adapter."""
    names = [adapters] * count if adapters is None or isinstance(adapters, str) else list(adapters)
    if len(names) != count:
        raise WrongUsage(f"there are {len(names)} adapters for {count} prompts: name one for all, or one for each")
    if decoder.rows:
        unknown = sorted({name for name in names if name is not None} - set(decoder.rows))
        if unknown:
            raise InputRefused(f"{decoder.graph} has no adapter {', '.join(unknown)}; it has {', '.join(decoder.rows)}")
        return None, [0 if name is None else 1 + decoder.rows.index(name) for name in names]
    if len(set(names)) > 1:
        raise InputRefused(f"{decoder.graph} runs one adapter at a time: a graph of --lora rows mixes them in a batch")
    if names[0] is not None:
        decoder.load(names[0])
    return names[0], None
