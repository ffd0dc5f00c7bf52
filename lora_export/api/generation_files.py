"""The files beside a graph with which it generates: copied, and read for how texts start, go on and end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_export.callbacks import OnMessage
from lora_export.errors import InputRefused
from lora_export.runtime.generation.loop import TokenRules
from lora_export.storage import atomic_output, input_files, json_files

GENAI_CONFIG = "genai_config.json"
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "spiece.model", "preprocessor_config.json"),
    "processor_config.json",
)
MODEL_CONFIGS = ("config.json", "generation_config.json")


def copy_generation_files(graph: Path, output: Path, folder: Path, on_message: OnMessage) -> list[str]:
    """Copy what is needed to generate from the folder of a graph into `folder`; return the names.

    `folder` holds what is published beside `output`. The config is copied if it names `graph`, and then names
    `output`. A file that is beside `output` already is not replaced, and a note names it. Raises InputRefused for what
    is no file, and OutputFailed where it does not fit on the disk.
    """
    home = output.absolute().parent
    if home.is_dir() and home.samefile(graph.parent):
        return []
    return _publish_beside(output, folder, _config_of(graph, output), _tokenizer_files(graph), on_message)


def write_generation_files(
    model: Path,
    output: Path,
    folder: Path,
    genai: Mapping[str, Any] | None,
    on_message: OnMessage,
    *,
    overwrite: bool = False,
) -> list[str]:
    """Write what is needed to generate with the graph of a model's folder into `folder`; return the names.

    `genai` is the content of onnxruntime-genai's config; without it there is none. With `overwrite`, files beside
    `output` are replaced. Otherwise as `copy_generation_files`.
    """
    texts = {} if genai is None else {GENAI_CONFIG: json.dumps(genai, indent=4) + "\n"}
    home = output.absolute().parent
    is_there = home.is_dir() and model.is_dir() and home.samefile(model)
    names = () if is_there else (*MODEL_CONFIGS, *TOKENIZER)
    present = [model / name for name in names if (model / name).is_file()]
    return _publish_beside(output, folder, texts, present, on_message, overwrite=overwrite)


def _publish_beside(
    output: Path,
    folder: Path,
    texts: Mapping[str, str],
    files: list[Path],
    on_message: OnMessage,
    *,
    overwrite: bool = False,
) -> list[str]:
    """Write texts and copy files into `folder`; return the names.

    What is beside `output` already is left out, with a note, unless it is to be overwritten.
    """
    home = output.absolute().parent
    taken = [name for name in (*texts, *(path.name for path in files)) if (home / name).exists() and not overwrite]
    if taken:
        on_message(f"note: beside {output} these files exist already and stay as they are: {', '.join(taken)}")
    texts = {name: text for name, text in texts.items() if name not in taken}
    files = [path for path in files if path.name not in taken]
    atomic_output.refuse_lack_of_space(folder, sum(path.stat().st_size for path in files))
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    for path in files:
        with input_files.open_regular(path) as source, (folder / path.name).open("xb") as copy:
            shutil.copyfileobj(source, copy)
    return [*texts, *(path.name for path in files)]


def shorten_genai_config(folder: Path, longest: int | None) -> None:
    """Let onnxruntime-genai's config in a folder, if there is one, allow texts of so many tokens at most."""
    path = folder / GENAI_CONFIG
    if longest is None or not path.is_file():
        return
    config = json_files.read_json(path)
    for part, name in (("model", "context_length"), ("search", "max_length")):
        config[part][name] = min(longest, config[part][name] or longest)
    path.write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8", newline="\n")


def size_of_generation_files(graph: Path) -> int:
    """The bytes that `copy_generation_files` copies at most."""
    return sum(path.stat().st_size for path in _tokenizer_files(graph))


def _tokenizer_files(graph: Path) -> list[Path]:
    return [path for name in TOKENIZER if (path := graph.parent / name).is_file()]


def genai_model(folder: Path) -> dict[str, Any]:
    """What onnxruntime-genai's config in a folder has of the model; empty where there is none."""
    path = folder / GENAI_CONFIG
    model = json_files.read_json(path).get("model") if path.is_file() else None
    return model if isinstance(model, dict) else {}


def _config_of(graph: Path, output: Path) -> dict[str, str]:
    """The config of onnxruntime-genai for the output; nothing where there is none, or none that names the graph."""
    path = graph.parent / GENAI_CONFIG
    if not path.is_file():
        return {}
    config = json_files.read_json(path)
    model = config.get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    if not isinstance(decoder, dict) or decoder.get("filename") != graph.name:
        return {}
    decoder["filename"] = output.name
    return {GENAI_CONFIG: json.dumps(config, indent=4) + "\n"}


BEYOND_TOKENS = 1 << 31  # more than any vocabulary has, and than any number in these configs
# Fields of a generation config that ask for what is not done here, with their values that ask for nothing
NOT_DONE: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "sequence_bias": ({},),
    "guidance_scale": (1.0,),
}


class GenerationSettings:
    """The configs in the folder of a graph: of generation, of the model, of onnxruntime-genai."""

    def __init__(self, folder: Path):
        self.folder = folder
        paths = [folder / name for name in reversed(MODEL_CONFIGS)]
        self.configs = [json_files.read_json(path) for path in paths if path.is_file()]
        self.configs += filter(None, [genai_model(folder)])

    def value(self, name: str) -> Any:
        """The first value that is set, in a config or in the part of it for texts."""
        return _value(self.configs, name)

    @property
    def vocabulary(self) -> int | None:
        """The number of tokens that the model has rows for; None where no config tells."""
        return next(iter(_tokens(self.value("vocab_size"))), None)

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a text, as transformers takes them: of the first config alone."""
        return frozenset(_tokens(_value(self.configs[:1], "eos_token_id")))

    @property
    def padding(self) -> int:
        """The token of padding; 0 where there is none."""
        return next(iter(_tokens(self.value("pad_token_id"))), 0)

    @property
    def rules(self) -> TokenRules:
        """The rules for each token. They are those of the first config, as transformers takes them."""
        first = self.configs[:1]
        forced = {name: next(iter(_tokens(_value(first, f"forced_{name}_token_id"))), None) for name in ("bos", "eos")}
        return TokenRules(
            repetition_penalty=_number(_value(first, "repetition_penalty"), 1.0),
            no_repeat_ngram_size=int(_number(_value(first, "no_repeat_ngram_size"), 0)),
            forced_bos=forced["bos"],
            forced_eos=forced["eos"],
            suppress=_tokens(_value(first, "suppress_tokens")),
            begin_suppress=_tokens(_value(first, "begin_suppress_tokens")),
        )

    @property
    def not_done(self) -> list[str]:
        """What the first config asks for and a run here does not do, such as `num_beams 4`."""
        config = self.configs[0] if self.configs else {}
        return [
            f"{name} {config[name]}"
            for name, neutral in NOT_DONE.items()
            if config.get(name) is not None and config[name] not in neutral
        ]

    @property
    def start_token(self) -> int:
        """The token before the first one of a decoder behind an encoder. Raises InputRefused where none is known."""
        for name in ("decoder_start_token_id", "bos_token_id"):
            if found := _tokens(self.value(name)):
                return found[0]
        raise InputRefused(f"no config in {self.folder} has a decoder_start_token_id: with it every text starts")

    def first_tokens(self, given: Sequence[int]) -> list[int]:
        """The first tokens of a decoder behind an encoder, where some are given: the start token is before them.

        Donut has none: each of its tasks starts with a token of its own.
        """
        encoders = (config.get("encoder") for config in self.configs)
        kinds = [str(encoder.get("model_type")) for encoder in encoders if isinstance(encoder, dict)]
        is_whole = any("donut" in kind for kind in kinds) or given[0] == self.start_token
        return [*([] if is_whole else [self.start_token]), *given]

    def language_token(self, language: str) -> int:
        """The token of a language, such as "en", of a multilingual speech model. Raises InputRefused without one."""
        known = self.languages
        token = known.get(f"<|{language}|>", known.get(language))
        if token is None:
            names = ", ".join(sorted(name.strip("<|>") for name in known)) or "none"
            raise InputRefused(f"the model has no token of the language {language!r}; it has: {names}")
        return token

    @property
    def languages(self) -> dict[str, int]:
        """Names of languages -> their tokens; none for a model of one language."""
        return self._table("lang_to_id")

    def speech_tokens(self, *, translate: bool) -> list[int]:
        """What follows the token of the language: the token of the task, and that of texts without timestamps.

        Raises InputRefused where the model cannot translate.
        """
        tasks, name = self._table("task_to_id"), "translate" if translate else "transcribe"
        if translate and name not in tasks:
            raise InputRefused("the model has no token for translating: it only transcribes")
        return [*([tasks[name]] if name in tasks else []), *_tokens(self.value("no_timestamps_token_id"))]

    def _table(self, name: str) -> dict[str, int]:
        table = self.value(name)
        entries = table.items() if isinstance(table, dict) else ()
        return {str(key): token for key, value in entries for token in _tokens(value)}


def _value(configs: Sequence[dict[str, Any]], name: str) -> Any:
    parts = [
        part
        for config in configs
        for part in (config, config.get("text_config"), config.get("decoder"))
        if isinstance(part, dict)
    ]
    return next((part[name] for part in parts if part.get(name) is not None), None)


def _tokens(value: Any) -> tuple[int, ...]:
    tokens = value if isinstance(value, list) else [value]
    return tuple(token for token in tokens if isinstance(token, int) and 0 <= token < BEYOND_TOKENS)


def _number(value: Any, neutral: float) -> float:
    is_one = isinstance(value, int | float) and abs(value) < BEYOND_TOKENS  # which no infinity and no NaN is
    return float(value) if is_one else neutral
