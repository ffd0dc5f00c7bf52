"""Which files of a candidate were judged, and which others a loader of its folder might take in their place.

transformers and the runtimes that serve its folders choose among several sets of weights by their names. A folder that
is judged by one set must not have another one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_export.errors import one_line
from lora_export.storage import input_files
from lora_export.storage.manifest import MANIFEST
from lora_export.verification.companion_files import CHAT_TEMPLATE, READERS, VOCABULARIES, ComparedFiles
from lora_export.weights.checkpoint import CONFIG, OTHER_WEIGHTS, Checkpoint
from lora_export.weights.sentence_modules import MODULES_FILE, TRANSFORMER_CONFIG, module_folders

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
MERGED_DECODER = (
    "decoder_model_merged.onnx"  # optimum's graph with a branch for the first tokens and one for the others
)


@dataclass(frozen=True)
class LoadedFiles:
    """The files of a candidate that were judged, by their names, and what was found of the others."""

    judged: Mapping[str, Path]
    others: ComparedFiles = field(default_factory=ComparedFiles)


def loaded_files(checkpoint: Checkpoint) -> LoadedFiles:
    """The files of a candidate that a loader reads, and leftovers. Reads names alone."""
    candidate = checkpoint.path
    if not checkpoint.is_folder:
        return LoadedFiles({candidate.name: candidate})
    files = {path.relative_to(candidate).as_posix(): path for path in input_files.regular_files(candidate)}
    judged = {*checkpoint.shards, checkpoint.index, *READERS, *VOCABULARIES, CHAT_TEMPLATE, *_of_modules(candidate)}
    judged &= set(files)
    others = sorted(set(files) - judged - {MANIFEST})
    leftovers = [name for name in others if NAMES_OF_LOADERS.fullmatch(name)]
    differences = [f"{name} is not what was judged, and a loader may take it. Remove it" for name in leftovers]
    if named := checkpoint.config.get(OTHER_FILE):
        differences.append(
            f"{CONFIG} names the weights {named!r} ({OTHER_FILE}), which transformers loads in place of those that "
            "were judged. Remove this entry"
        )
    notes = _notes_on(name for name in others if name not in leftovers)
    found = ComparedFiles(tuple(map(one_line, differences)), notes=notes)
    return LoadedFiles({name: files[name] for name in sorted(judged)}, found)


def files_of_graphs(folder: Path, graphs: Mapping[str, Path]) -> LoadedFiles:
    """The files of an encoder-decoder's graphs and their data, `graphs`, and those that a loader reads beside them."""
    files = {path.relative_to(folder).as_posix(): path for path in input_files.regular_files(folder)}
    judged = dict(graphs) | {name: files[name] for name in (*READERS, *VOCABULARIES, CHAT_TEMPLATE) if name in files}
    others = sorted(set(files) - set(judged) - {MANIFEST})
    leftovers = [name for name in others if Path(name).name == MERGED_DECODER]
    differences = [
        f"{name} is not what was judged, and a loader takes it before the two decoders. Remove it" for name in leftovers
    ]
    notes = _notes_on(name for name in others if name not in leftovers)
    return LoadedFiles(judged, ComparedFiles(tuple(map(one_line, differences)), notes=notes))


def _of_modules(candidate: Path) -> list[str]:
    """The files that make an embedding model of a folder."""
    found = [path for folder in module_folders(candidate) for path in input_files.regular_files(folder)]
    return [MODULES_FILE, TRANSFORMER_CONFIG, *(path.relative_to(candidate).as_posix() for path in found)]


def _notes_on(names: Iterable[str]) -> tuple[str, ...]:
    """A note on other weights, which no loader takes by their names, and on texts."""
    weights, texts = (".safetensors", ".onnx", *OTHER_WEIGHTS), TEXTS
    shown = sorted((not name.endswith(weights), name) for name in names if name.endswith((*weights, *texts)))
    more = f" and {len(shown) - SHOWN_FILES} more" if len(shown) > SHOWN_FILES else ""
    text = f"not compared: {', '.join(name for _, name in shown[:SHOWN_FILES])}{more}"
    return (one_line(text),) if shown else ()
