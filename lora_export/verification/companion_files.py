"""What no weight shows: the config, generation config, tokenizer and chat template of a merged folder, and the like.

They are compared with those of the base. What a merge itself changes is expected. A value that both have and that is
another makes the folder different. A value that only one of them has is noted: it may be the default of the other.

A tokenizer that is saved again has other files and does the same. transformers opens both, offline and without code of
the folders: ids of texts are compared, and what shapes a batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_export.artifacts.artifact import Artifact
from lora_export.errors import EnvironmentLacking, InputRefused, count, first_of, one_line
from lora_export.isolation.limits import MAX_JSON
from lora_export.lora import Adapter
from lora_export.storage import input_files, json_files, safetensors_file
from lora_export.storage.hashes import file_sha256
from lora_export.storage.manifest import OF_THE_OUTPUT
from lora_export.storage.safetensors_file import is_safetensors
from lora_export.verification.parity import Findings
from lora_export.weights.checkpoint import CONFIG, OTHER_WEIGHTS
from lora_export.weights.quantised import (
    QUANTIZATION,
    QUANTIZATION_FILES,
    file_with_floats,
    with_floats,
    without_quantisation,
)
from lora_export.weights.task_head import config_with_heads
from lora_export.weights.weight_files import is_index

# Fields that say how and by what a file was written, and not what the model computes
UNIMPORTANT = frozenset(
    {
        *("transformers_version", "_name_or_path", "dtype", "torch_dtype", "_from_model_config", "use_cache"),
        *("_attn_implementation_autoset", "tokenizer_class", "processor_class", "name_or_path", "backend", "is_local"),
    }
)
# Files of tokenizers that are no JSON of fields: compared by their bytes
VOCABULARIES = (
    *("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("added_tokens.json", "tekken.json", "source.spm", "target.spm", "bpe.codes"),
)
TOKENIZER_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
CHAT_TEMPLATE = "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"
CONFIGS = (CONFIG, GENERATION_CONFIG)
UNREAD = (".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".pdf", ".ipynb", ".log")
WEIGHT_ENDINGS = (".safetensors", *OTHER_WEIGHTS)
SHOWN_VALUE = 60  # characters of a value in a message
SHOWN_DIFFERENCES = 8  # of one file
SHOWN_FILES = 8

Values = Mapping[str, Any]


def compare_files(
    base: Artifact,
    merged: Artifact,
    adapters: Sequence[Adapter],
    stored: Collection[str] = (),
    floats: Sequence[Sequence[str]] = (),
) -> Findings:
    """Compare the files beside the weights of two Hugging Face folders; nothing where one of them is no folder.

    Faults are what differs. What only one folder has is not judged.

    Every file of either folder is judged, listed as not judged, or one that no loader reads. `stored` are the dtypes of
    the merged weights. Where these are quantised, `floats` are the modules that became floats, and those that were (see
    `quantised_layers.float_modules`). Raises InputRefused for a file that is no JSON.
    """
    if not (base.path.is_dir() and merged.path.is_dir()):
        return Findings()
    found, before, after = _Found(), _Folder(base), _Folder(merged)
    if floats:
        found.differences += _unstated_floats(before, after, floats)
    for name in CONFIGS:
        if before.has(name) and after.has(name):
            expected, values = before.json(name), after.json(name)
            if name == CONFIG:
                found.differences += _wrong_dtype(expected, values, stored)
                expected = _expected_config(expected, values, adapters, floats)
            are_defaults = _same_in_transformers(base.path, merged.path, name)
            found.add_values(name, list(_compared(expected, values)), are_defaults)
    _compare_tokenizers(before, after, found)
    templates = [_chat_template(folder) for folder in (before, after)]
    if all(templates) and templates[0] != templates[1]:
        found.differences.append("the chat template is another than the base's")
    elif any(templates) and not all(templates):
        found.not_judged.append("the chat template, which only one folder has")
    if not any(merged.path.glob("*.onnx")):  # an export for a runtime has files of its own
        _compare_other_files(before, after, found, floats)
    not_judged, faults = (tuple(map(one_line, lines)) for lines in (found.not_judged, found.differences))
    return Findings(not_judged=not_judged, faults=faults)


class _Folder:
    """A folder that is compared. Its names and each of its files of values are read once."""

    def __init__(self, opened: Artifact):
        self.path, self.names = opened.path, frozenset(_names(opened))
        self.tokenizer = {name for name in self.names if _is_of_tokenizer(name)}
        self.json: Callable[[str], Values] = functools.cache(lambda name: json_files.read_json(opened.path / name))

    def has(self, name: str) -> bool:
        return (self.path / name).exists()


@dataclass
class _Found:
    """What `compare_files` collects."""

    differences: list[str] = field(default_factory=list)
    not_judged: list[str] = field(default_factory=list)

    def add_values(
        self, name: str, compared: Sequence[tuple[bool, str]], are_defaults: Callable[[], bool] = lambda: False
    ) -> None:
        """Take what `_compared` found in a file. `are_defaults` tells whether values of one folder are none of note."""
        differing = [f"{name}: {line}" for differs, line in compared if differs]
        self.differences += differing[:SHOWN_DIFFERENCES]
        if len(differing) > SHOWN_DIFFERENCES:
            self.differences.append(f"{name}: and {count(len(differing) - SHOWN_DIFFERENCES, 'more value')}")
        only = sorted(value for differs, value in compared if not differs)
        if only and (differing or not are_defaults()):
            self.not_judged.append(f"values in {name} that only one folder has: {first_of(only, SHOWN_FILES)}")


def _wrong_dtype(before: Values, after: Values, stored: Collection[str]) -> Iterator[str]:
    """A dtype in which a loader would compute, that is neither the base's nor the one of the weights."""
    one, other = (values.get("dtype") or values.get("torch_dtype") for values in (before, after))
    if other is not None and other != one and stored and set(stored) != {other}:
        kinds = " and ".join(sorted(stored))
        yield f"{CONFIG}: dtype is {other!r}, the base has {one!r}, and the weights are {kinds}"


def _same_in_transformers(base: Path, merged: Path, name: str) -> Callable[[], bool]:
    """Whether transformers reads the same values of both folders: its versions spell some of them differently."""

    def are_same() -> bool:
        from lora_export.models.processors import open_processor

        reader = {CONFIG: "AutoConfig", GENERATION_CONFIG: "GenerationConfig"}[name]
        try:
            one, other = (
                open_processor(
                    reader, folder, needs="configs need", failure=f"{folder / name} cannot be read"
                ).to_dict()
                for folder in (base, merged)
            )
        except (EnvironmentLacking, InputRefused):  # it stays not judged
            return False
        return not list(_compared(one, other))

    return are_same


# --- Files of tokenizers, and all others ---


def _is_of_tokenizer(name: str) -> bool:
    return name in (*VOCABULARIES, "special_tokens_map.json") or (name.startswith("tokenizer") and "/" not in name)


def _compare_tokenizers(base: _Folder, merged: _Folder, found: _Found) -> None:
    """The tokenizers by what they do, where their files are not the same; by their files where one cannot be opened."""
    before, after = base.tokenizer, merged.tokenizer
    if not (before and after):
        found.not_judged += ["the tokenizer, which only one folder has"] if before or after else []
        return
    if before == after and all(_are_equal(base.path / name, merged.path / name) for name in before):
        return
    done = tokenizer_differences(base.path, merged.path)
    if done is not None:
        found.differences += [f"the tokenizer: {line}" for line in done]
        name = "tokenizer.json"
        one, other = (_cutting(folder.json(name)) if folder.has(name) else {} for folder in (base, merged))
        found.add_values(name, list(_compared(one, other)))
        return
    for name in sorted(before & after):
        if (read := TOKENIZER_READERS.get(name)) is not None:
            found.add_values(name, list(_compared(read(base.json(name)), read(merged.json(name)))))
        elif not _are_equal(base.path / name, merged.path / name):
            found.differences.append(f"{name} is not the base's")
    if only := sorted(before ^ after):
        found.not_judged.append(f"files of the tokenizer that only one folder has: {first_of(only, SHOWN_FILES)}")


def _compare_other_files(base: _Folder, merged: _Folder, found: _Found, floats: Sequence[Sequence[str]]) -> None:
    """Processors, further templates, modules of embedding models, code, and other files beside the weights."""
    before, after = (
        {name for name in folder.names - folder.tokenizer if not (name == CHAT_TEMPLATE or _is_unread(name))}
        for folder in (base, merged)
    )
    for name in sorted(before & after - {*CONFIGS}):
        if _are_equal(base.path / name, merged.path / name):
            continue
        try:
            values = [folder.json(name) for folder in (base, merged)] if name.endswith(".json") else []
        except InputRefused:  # a list, such as modules.json
            values = []
        if values:
            is_stated = floats and name in QUANTIZATION_FILES
            expected = file_with_floats(name, values[0], *floats) if is_stated else values[0]
            found.add_values(name, list(_compared(expected, values[1])))
        else:
            found.differences.append(f"{name} is not the base's")
    if only := sorted(before ^ after):
        found.not_judged.append(f"files that only one folder has: {first_of(only, SHOWN_FILES)}")


def _names(folder: Artifact) -> Iterator[str]:
    """The files of a folder without hidden ones, and without weights but those of an embedding model's modules."""
    for name, path in folder.files.items():
        is_hidden = any(part.startswith(".") for part in name.split("/"))
        is_weights = name.endswith(WEIGHT_ENDINGS) or is_index(path.name)
        if not is_hidden and (path.parent in folder.module_folders or not is_weights):
            yield name


def _is_unread(name: str) -> bool:
    """Whether no loader reads a file: documents, pictures of them, and our own record."""
    is_document = name.rpartition("/")[2].startswith(("LICENSE", "NOTICE", "README"))
    return name in OF_THE_OUTPUT or is_document or name.endswith(UNREAD)


def _are_equal(one: Path, other: Path) -> bool:
    if not (one.is_file() and other.is_file()):
        return False
    return file_sha256(one) == file_sha256(other) or (is_safetensors(one) and _have_equal_tensors(one, other))


def _have_equal_tensors(one: Path, other: Path) -> bool:
    first, second = safetensors_file.open_file(one), safetensors_file.open_file(other)
    kinds = [{name: (each.dtype, each.shape) for name, each in file.entries.items()} for file in (first, second)]
    return kinds[0] == kinds[1] and all(
        first.read(name).tobytes() == second.read(name).tobytes() for name in first.entries
    )


def _unstated_floats(base: _Folder, merged: _Folder, floats: Sequence[Sequence[str]]) -> Iterator[str]:
    """Where a quantised folder does not state which of its layers became floats, or states others."""
    for name in (CONFIG, *QUANTIZATION_FILES):
        if base.has(name) and merged.has(name):
            before = base.json(name)
            stated = with_floats(before, *floats) if name == CONFIG else file_with_floats(name, before, *floats)
            for key in _not_as_stated(before, stated, merged.json(name)):
                yield f"{name}: {key} does not name the layers that are floats in the weights, and in the base are not"


def _not_as_stated(before: Values, stated: Values, found: Values, prefix: str = "") -> Iterator[str]:
    """The keys whose values should be others than before, as stated, and are not."""
    for key, value in stated.items():
        old, new = before.get(key), found.get(key)
        if old != value and isinstance(old, Mapping) and isinstance(value, Mapping) and isinstance(new, Mapping):
            yield from _not_as_stated(old, value, new, f"{prefix}{key}.")
        elif value not in (old, new):
            yield f"{prefix}{key}"


def _expected_config(
    before: Values, after: Values, adapters: Sequence[Adapter], floats: Sequence[Sequence[str]]
) -> Values:
    """The base's config with what a merge changes: new heads, and no quantisation where the weights are floats."""
    expected = config_with_heads(before, adapters)
    if QUANTIZATION not in after:
        return without_quantisation(expected)
    return with_floats(expected, *floats) if floats else expected


def _compared(expected: Values, found: Values, prefix: str = "") -> Iterator[tuple[bool, str]]:
    """Whether both have a value that differs, and then a sentence; or the name of the value that only one has."""
    for key in {**expected, **found}:
        one, other, name = expected.get(key), found.get(key), f"{prefix}{key}"
        if key in UNIMPORTANT or one == other:
            continue
        if one is None or other is None:
            yield False, name
        elif isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _compared(one, other, f"{name}.")
        elif not (key == "tie_word_embeddings" and one and not other):
            # A merge that adds a head of its own unties it; that this head is right, the weights show.
            yield True, f"{name} is {_shown(other)}, the base has {_shown(one)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_VALUE else f"{text[:SHOWN_VALUE]}…"


# --- Readers: the values of a file that decide what a model or tokenizer computes ---


def _cutting(tokenizer: Values) -> Values:
    """How a tokenizer.json cuts and pads texts by itself, as runtimes without transformers use it."""
    return {key: [tokenizer.get(key)] for key in ("truncation", "padding")}


def _tokenizer(tokenizer: Values) -> Values:
    """The vocabulary, merges, added tokens with their flags, steps, padding and truncation of a tokenizer.json."""
    model = tokenizer.get("model")
    model = model if isinstance(model, Mapping) else {}
    merges = model.get("merges")
    if isinstance(merges, list):
        merges = [" ".join(map(str, pair)) if isinstance(pair, list) else pair for pair in merges]
    added = tokenizer.get("added_tokens")
    tokens = {
        str(token.get("id")): {key: value for key, value in token.items() if key != "id"}
        for token in (added if isinstance(added, list) else ())
        if isinstance(token, Mapping)
    }
    steps = {part: [tokenizer.get(part)] for part in TOKENIZER_PARTS if tokenizer.get(part) is not None}
    return {"vocab": model.get("vocab"), "merges": merges, "added_tokens": tokens, **steps, **_cutting(tokenizer)}


def _special_tokens(values: Values) -> Values:
    """The special tokens and settings of a tokenizer_config.json or special_tokens_map.json."""
    return {
        key: value.get("content", value) if isinstance(value, Mapping) and key.endswith("_token") else value
        for key, value in values.items()
        if key not in ("chat_template", "added_tokens_decoder")
    }


TOKENIZER_READERS: Mapping[str, Callable[[Values], Values]] = {
    "tokenizer.json": _tokenizer,
    "tokenizer_config.json": _special_tokens,
    "special_tokens_map.json": _special_tokens,
}


def _chat_template(folder: _Folder) -> str:
    """The chat template, which is a file of its own or in the tokenizer's config; empty where there is none."""
    if folder.has(CHAT_TEMPLATE):
        return input_files.read_text(folder.path / CHAT_TEMPLATE, MAX_JSON).strip()
    try:
        template = folder.json("tokenizer_config.json").get("chat_template")
    except InputRefused:  # it is missing, or damaged
        return ""
    return template.strip() if isinstance(template, str) else repr(template) if template else ""


# --- what two tokenizers do differently ---

# Where tokenizers part: case, accents, white space, scripts, digits, symbols, what is no character of any text.
CORPUS = (
    *("", " ", "  two  spaces ", "\ttab\n\nlines\r\n", "MiXeD CASE Word", "naïve café Ünïcode ﬁ ①", "e\u0301 é"),
    *("don't we'll it's", "1234567890 3.14 1,000", "a_b-c/d\\e", "foo(bar)[0] = {x: 'y'}; // z", "!?…—“”«»"),
    *("日本語の文章です。", "中文文本", "한국어 텍스트", "Русский текст", "العربية", "עברית", "हिन्दी", "ไทย"),
    *("👩‍👩‍👧 🏳️‍🌈 😀", "\u200b\u00a0\u2028\ufeff", "\x00\x07", "▁Ġ##", "<s> </s> [CLS] <|endoftext|> <unk>", "a" * 200),
)
SHAPING = ("padding_side", "truncation_side", "model_max_length", "clean_up_tokenization_spaces", "model_input_names")
SAMPLED = 500  # tokens of the vocabulary that are texts themselves
SHOWN_IDS = 8


def tokenizer_differences(base: Path, merged: Path) -> list[str] | None:
    """Sentences on what the tokenizer of a merged folder does otherwise than the base's.

    None where one cannot be opened or run, and where transformers is not installed.
    """
    from lora_export.models.processors import open_tokenizer, refusing_failures

    try:
        with refusing_failures("the tokenizers cannot be compared"):
            before, after = open_tokenizer(base, needed=True), open_tokenizer(merged, needed=True)
            return [*_of_vocabularies(before, after), *_of_ids(before, after), *_of_settings(before, after)]
    except (InputRefused, EnvironmentLacking):  # its files show what differs
        return None


def _of_vocabularies(before: Any, after: Any) -> Iterator[str]:
    one, other = before.get_vocab(), after.get_vocab()
    different = sorted(token for token in one.keys() | other.keys() if one.get(token) != other.get(token))
    if different:
        token = different[0]
        more = f", and {len(different) - 1} more tokens differ" if len(different) > 1 else ""
        yield f"the token {token!r} has the id {other.get(token)}, in the base {one.get(token)}{more}"


def _of_ids(before: Any, after: Any) -> Iterator[str]:
    vocabulary = sorted(before.get_vocab())
    added = [str(token) for each in (before, after) for token in each.added_tokens_decoder.values()]
    around = [text for token in dict.fromkeys(added) for text in (token, f"a{token}b", f"a {token} b", token.upper())]
    texts = [*CORPUS, *around, *vocabulary[:: max(1, len(vocabulary) // SAMPLED)]]
    for special in (True, False):
        wrong = [
            (text, one, other)
            for text in texts
            if (one := before.encode(text, add_special_tokens=special))
            != (other := after.encode(text, add_special_tokens=special))
        ]
        if wrong:
            text, one, other = wrong[0]
            yield (
                f"the text {text!r} has the ids {other[:SHOWN_IDS]}, in the base {one[:SHOWN_IDS]} "
                f"({len(wrong)} of {len(texts)} texts differ)"
            )
            return


def _of_settings(before: Any, after: Any) -> Iterator[str]:
    names = [*SHAPING, *(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))]
    for name in names:
        one, other = getattr(before, name, None), getattr(after, name, None)
        if one != other:
            yield f"{name} is {other!r}, the base has {one!r}"
