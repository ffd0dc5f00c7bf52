"""The configs beside a graph, read for how texts start, go on and end."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_export.api.generation_files import MODEL_CONFIGS, genai_model
from lora_export.errors import InputRefused
from lora_export.runtime.generation.loop import Sampling, TokenRules
from lora_export.storage import json_files

BEYOND_TOKENS = 1 << 31  # more than any vocabulary has, and than any number in these configs
# Fields of a generation config that ask for what is not done here, with their values that ask for nothing
NOT_DONE: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "sequence_bias": ({}, []),
    "guidance_scale": (1.0,),
    "stop_strings": ([],),
    "exponential_decay_length_penalty": (),
    "watermarking_config": ({},),
    "token_healing": (False,),
    "penalty_alpha": (0,),
    "dola_layers": (),
}
# Types of models whose rotary embedding has other angles for all tokens of a longer text (LongRoPE), and which then
# compute these again (modeling_phi3.py, prepare_inputs_for_generation)
RECOMPUTING = ("phi3", "phimoe", "phi4_multimodal")
# Those that have an effect where tokens are drawn
NOT_DRAWN: dict[str, tuple[Any, ...]] = {
    "top_k": (0,),
    "min_p": (0,),
    "top_h": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}
# Those that have an effect where none are drawn
NOT_GREEDY: dict[str, tuple[Any, ...]] = {"do_sample": (False,)}
UNSET_LENGTH = 20  # `max_length` of a config of transformers that sets none


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
    def encoder_vocabulary(self) -> int | None:
        """The number of tokens that an encoder of texts has rows for: its own, or that of the model."""
        encoders = [each for config in self.configs if isinstance(each := config.get("encoder"), dict)]
        return next(iter(_tokens(_value(encoders, "vocab_size"))), self.vocabulary)

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a text, as transformers takes them: of the first config alone."""
        return frozenset(_tokens(_value(self.configs[:1], "eos_token_id")))

    @property
    def padding(self) -> int:
        """The token of padding; 0 where there is none."""
        return next(iter(_tokens(self.value("pad_token_id"))), 0)

    @property
    def recomputed_beyond(self) -> int | None:
        """The length of a text beyond which all its tokens are computed again; None where none is."""
        length = self.value("original_max_position_embeddings")
        return length if self.value("model_type") in RECOMPUTING and type(length) is int else None

    @property
    def rules(self) -> TokenRules:
        """The rules for each token. They are those of the first config, as transformers takes them."""
        first = self.configs[:1]
        return TokenRules(
            repetition_penalty=_number(_value(first, "repetition_penalty"), 1.0),
            no_repeat_ngram_size=int(_number(_value(first, "no_repeat_ngram_size"), 0)),
            forced_bos=next(iter(_tokens(_value(first, "forced_bos_token_id"))), None),
            forced_eos=_tokens(_value(first, "forced_eos_token_id")),
            suppress=_tokens(_value(first, "suppress_tokens")),
            begin_suppress=_tokens(_value(first, "begin_suppress_tokens")),
        )

    def not_done(self, sampling: Sampling, new_tokens: int | None = None) -> list[str]:
        """What the first config asks for and a run here does not do, such as `num_beams 4`.

        A `top_p` is named where tokens are drawn from all, and a `temperature` where the config draws them and the run
        does not. Where the length of the texts was not stated, `new_tokens` is that of the run.
        """
        config = self.configs[0] if self.configs else {}
        unapplied = NOT_DONE | (NOT_DRAWN if sampling.temperature else NOT_GREEDY)
        if sampling.temperature and sampling.top_p == 1:
            unapplied |= {"top_p": (1.0,)}
        if not sampling.temperature and config.get("do_sample"):
            unapplied |= {"temperature": ()}
        if new_tokens is not None:
            unapplied |= {"max_length": (UNSET_LENGTH,), "max_new_tokens": (new_tokens,)}
        return [
            f"{name} {config[name]}"
            for name, neutral in unapplied.items()
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
        if token is None and known:
            whisper: Any = importlib.import_module("transformers.models.whisper.tokenization_whisper")
            token = known.get(f"<|{whisper.TO_LANGUAGE_CODE.get(language.lower())}|>")  # of a name such as "german"
        if token is None:
            names = ", ".join(sorted(name.strip("<|>") for name in known)) or "none"
            raise InputRefused(f"the model has no token of the language {language!r}; it has: {names}")
        return token

    @property
    def languages(self) -> dict[str, int]:
        """Names of languages -> their tokens; none for a model of one language."""
        return self._table("lang_to_id")

    def speech_start(self, language: str | None = None, *, translate: bool = False) -> list[int | None]:
        """The tokens with which a text starts: of a speech model with language, task, and none for timestamps.

        None is a language that the model is to tell. What is not stated here is what the configs ask for, older ones by
        `forced_decoder_ids`, as transformers takes them. Raises InputRefused for a language or a task without a token.
        """
        tasks, is_multilingual = self._table("task_to_id"), bool(self.languages)
        stated, task = (self.value(name) if is_multilingual else None for name in ("language", "task"))
        forced = {} if language or translate or stated or task else self._forced_tokens
        translate = translate or task == "translate" or forced.get(2, -1) == tasks.get("translate")
        if translate and "translate" not in tasks:
            raise InputRefused("the model has no token for translating: it only transcribes")
        tokens: list[int | None] = [self.start_token, *([] if is_multilingual else forced.values())]
        if is_multilingual:
            chosen = language or stated
            tokens.append(self.language_token(chosen) if isinstance(chosen, str) else forced.get(1))
            tokens += _tokens(tasks.get("translate" if translate else "transcribe"))
        return [*tokens, *(each for each in _tokens(self.value("no_timestamps_token_id")) if each != tokens[-1])]

    @property
    def _forced_tokens(self) -> dict[int, int]:
        """The tokens behind the first one that configs of Whisper state, by their places. A language may be open."""
        stated = self.value("forced_decoder_ids") if self.value("model_type") == "whisper" else None
        entries = [each for each in stated if isinstance(each, list)] if isinstance(stated, list) else []
        pairs = [each for each in entries if len(each) == 2 and isinstance(each[0], int)]
        return {place: token for place, value in sorted(pairs, key=lambda each: each[0]) for token in _tokens(value)}

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
