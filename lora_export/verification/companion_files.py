"""What no weight shows: the config, generation config, tokenizer and chat template of a merged folder, and leftovers.

They are compared with those of the base. What a merge itself changes is expected. A value that both have and that is
another makes the folder different. A value that only one of them has is noted: it may be the default of the other.

transformers and the runtimes that serve its folders choose among several sets of weights by their names. A folder that
is judged by one set must not have another one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_export.artifacts.artifact import Artifact, ArtifactKind
from lora_export.artifacts.files import hashes_of
from lora_export.errors import InputRefused, one_line
from lora_export.lora import Adapter
from lora_export.storage import input_files, json_files
from lora_export.storage.hashes import file_sha256
from lora_export.storage.manifest import MANIFEST
from lora_export.weights.checkpoint import CONFIG, OTHER_WEIGHTS
from lora_export.weights.quantised import QUANTIZATION, without_quantisation
from lora_export.weights.task_head import config_with_heads

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
SHOWN_VALUE = 60  # characters of a value in a message
SHOWN_DIFFERENCES = 8  # of one file

Values = Mapping[str, Any]


@dataclass(frozen=True)
class ComparedFiles:
    """Sentences: what differs, and what was not judged because only one folder has it."""

    differences: tuple[str, ...] = ()
    not_judged: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def compare_files(base: Path, merged: Path, adapters: Sequence[Adapter]) -> ComparedFiles:
    """Compare the files beside the weights of two Hugging Face folders; nothing where one of them is no folder.

    Raises InputRefused for a file that is no JSON.
    """
    if not (base.is_dir() and merged.is_dir()):
        return ComparedFiles()
    differences: list[str] = []
    not_judged: list[str] = []
    for name, read in READERS.items():
        if not ((base / name).exists() and (merged / name).exists()):
            continue
        before, after = read(base, name), read(merged, name)
        expected = _expected_config(before, after, adapters) if name == "config.json" else before
        compared = list(_compared(expected, after))
        found = [f"{name}: {line}" for differs, line in compared if differs]
        differences += found[:SHOWN_DIFFERENCES]
        if len(found) > SHOWN_DIFFERENCES:
            differences.append(f"{name}: and {len(found) - SHOWN_DIFFERENCES} more values")
        if only := sorted(value for differs, value in compared if not differs):
            more = f" and {len(only) - SHOWN_DIFFERENCES} more" if len(only) > SHOWN_DIFFERENCES else ""
            not_judged.append(f"values in {name} that only one folder has: {', '.join(only[:SHOWN_DIFFERENCES])}{more}")
    templates = [_chat_template(folder) for folder in (base, merged)]
    if all(templates) and templates[0] != templates[1]:
        differences.append("the chat template is another than the base's")
    elif any(templates) and not all(templates):
        not_judged.append("the chat template, which only one folder has")
    for name in VOCABULARIES:
        if not (merged / name).is_file():
            continue
        if not (base / name).is_file():
            not_judged.append(f"{name}, which the base does not have")
        elif file_sha256(base / name) != file_sha256(merged / name):
            differences.append(f"{name} is not the base's")
    return ComparedFiles(tuple(map(one_line, differences)), tuple(map(one_line, not_judged)))


def _expected_config(before: Values, after: Values, adapters: Sequence[Adapter]) -> Values:
    """The base's config with what a merge changes: new heads, and no quantisation where the weights are floats."""
    expected = config_with_heads(before, adapters)
    return expected if QUANTIZATION in after else without_quantisation(expected)


def _compared(expected: Values, found: Values, prefix: str = "") -> Iterator[tuple[bool, str]]:
    """Whether both have a value that differs, and then a sentence; or the name of the value that only one has."""
    for key in expected.keys() | found.keys():
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


def _json(folder: Path, name: str) -> Values:
    return json_files.read_json(folder / name)


def _tokenizer(folder: Path, name: str) -> Values:
    """The vocabulary, merges, added tokens and steps of a tokenizer.json; not its padding and truncation."""
    tokenizer = json_files.read_json(folder / name)
    model = tokenizer.get("model")
    model = model if isinstance(model, Mapping) else {}
    merges = model.get("merges")
    if isinstance(merges, list):
        merges = [" ".join(map(str, pair)) if isinstance(pair, list) else pair for pair in merges]
    added = tokenizer.get("added_tokens")
    tokens = {
        str(token.get("id")): token.get("content")
        for token in (added if isinstance(added, list) else ())
        if isinstance(token, Mapping)
    }
    steps = {part: [tokenizer.get(part)] for part in TOKENIZER_PARTS if tokenizer.get(part) is not None}
    return {"vocab": model.get("vocab"), "merges": merges, "added_tokens": tokens, **steps}


def _special_tokens(folder: Path, name: str) -> Values:
    """The special tokens of a tokenizer_config.json or special_tokens_map.json, and which of them are added."""
    values = json_files.read_json(folder / name)
    chosen = {
        key: value for key, value in values.items() if key.endswith("_token") and not isinstance(value, list | bool)
    }
    added = {key: value for key, value in values.items() if key.startswith("add_") and isinstance(value, bool)}
    contents = {key: value.get("content") if isinstance(value, Mapping) else value for key, value in chosen.items()}
    return {**contents, **added}


READERS: Mapping[str, Callable[[Path, str], Values]] = {
    "config.json": _json,
    "generation_config.json": _json,
    "tokenizer.json": _tokenizer,
    "tokenizer_config.json": _special_tokens,
    "special_tokens_map.json": _special_tokens,
    "preprocessor_config.json": _json,
}


def _chat_template(folder: Path) -> str:
    """The chat template, which is a file of its own or in the tokenizer's config; empty where there is none."""
    own, config = folder / CHAT_TEMPLATE, folder / "tokenizer_config.json"
    if own.is_file():
        return input_files.read_text(own, json_files.MAX_JSON).strip()
    if not config.is_file():
        return ""
    try:
        template = json_files.read_json(config).get("chat_template")
    except InputRefused:
        return ""
    return template.strip() if isinstance(template, str) else repr(template) if template else ""


# --- Files that were judged, and others that a loader of the folder might take in their place ---

# Names under which loaders look for weights in a model's folder, or for an adapter to attach.
NAMES_OF_LOADERS = re.compile(
    r"""(pytorch_model|model|tf_model|flax_model|adapter_model)([.-].*)?\.(safetensors|bin|h5|msgpack)(\.index\.json)?
    |consolidated([.-].*)?\.(safetensors|pth|pt)
    |model\.ckpt.*
    |adapter_config\.json""",
    re.VERBOSE | re.IGNORECASE,
)
TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken")  # of a tokenizer, among others
OTHER_FILE = "transformers_weights"  # of a config: the file that transformers loads in place of the model's
SHOWN_FILES = 8
# optimum's graph with a branch for the first tokens and one for the others
MERGED_DECODER = "decoder_model_merged.onnx"


@dataclass(frozen=True)
class LoadedFiles:
    """The files of a candidate that were judged, by their names, and what was found of the others."""

    judged: Mapping[str, Path]
    others: ComparedFiles = field(default_factory=ComparedFiles)

    @property
    def hashes(self) -> dict[str, str]:
        """Name -> SHA-256 of the files that were judged."""
        return hashes_of(self.judged)


def loaded_files(candidate: Artifact) -> LoadedFiles:
    """The files of a candidate that a loader reads, and leftovers. Reads names, and headers of weights."""
    folder, beside = candidate.path, (*READERS, *VOCABULARIES, CHAT_TEMPLATE)
    if not folder.is_dir():
        return LoadedFiles(candidate.files)
    files, differences = candidate.files, []
    if candidate.kind is ArtifactKind.GENERATION:
        judged = dict(candidate.graph_files) | {name: files[name] for name in beside if name in files}
        why = "a loader takes it before the two decoders"
    else:
        checkpoint = candidate.checkpoint
        names = {*checkpoint.shards, checkpoint.index, *beside, *candidate.module_files}
        judged = {name: files[name] for name in sorted(names & set(files))}
        why = "a loader may take it"
        if named := checkpoint.config.get(OTHER_FILE):
            differences = [
                f"{CONFIG} names the weights {named!r} ({OTHER_FILE}), which transformers loads in place of those that "
                "were judged. Remove this entry"
            ]
    others = sorted(set(files) - set(judged) - {MANIFEST})
    leftovers = [name for name in others if _is_leftover(name, candidate.kind)]
    differences = [f"{name} is not what was judged, and {why}. Remove it" for name in leftovers] + differences
    notes = _notes_on(name for name in others if name not in leftovers)
    return LoadedFiles(judged, ComparedFiles(tuple(map(one_line, differences)), notes=notes))


def _is_leftover(name: str, kind: ArtifactKind) -> bool:
    if kind is ArtifactKind.GENERATION:
        return Path(name).name == MERGED_DECODER
    return NAMES_OF_LOADERS.fullmatch(name) is not None


def _notes_on(names: Iterable[str]) -> tuple[str, ...]:
    """A note on other weights, which no loader takes by their names, and on texts."""
    weights, texts = (".safetensors", ".onnx", *OTHER_WEIGHTS), TEXTS
    shown = sorted((not name.endswith(weights), name) for name in names if name.endswith((*weights, *texts)))
    more = f" and {len(shown) - SHOWN_FILES} more" if len(shown) > SHOWN_FILES else ""
    text = f"not compared: {', '.join(name for _, name in shown[:SHOWN_FILES])}{more}"
    return (one_line(text),) if shown else ()
