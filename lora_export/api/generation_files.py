"""The files beside a graph with which it generates: copied, written, and shortened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.callbacks import OnMessage
from lora_export.storage import atomic_output, input_files, json_files

GENAI_CONFIG = "genai_config.json"
MODEL_CONFIGS = ("config.json", "generation_config.json")
BESIDE_GRAPH = (
    *MODEL_CONFIGS,
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "spiece.model", "preprocessor_config.json"),
    *("processor_config.json", "chat_template.json", "tekken.json", "normalizer.json", "sentencepiece.bpe.model"),
    # Of Marian, FSMT, SpeechT5, ProphetNet, BARTpho and others, which have no tokenizer.json
    *("source.spm", "target.spm", "target_vocab.json", "vocab-src.json", "vocab-tgt.json", "spm_char.model"),
    *("prophetnet.tokenizer", "dict.txt", "byte_maps.json", "emoji.json", "spm.model", "sentencepiece.model"),
)


def copy_generation_files(graph: Path, output: Path, folder: Path, on_message: OnMessage) -> list[str]:
    """Copy what is needed to generate from the folder of a graph into `folder`; return the names.

    `folder` holds what is published beside `output`. onnxruntime-genai's config is copied if it names `graph`, and then
    names `output`. A file that is beside `output` already is not replaced, and a note names it. Raises InputRefused for
    what is no file, and OutputFailed where it does not fit on the disk.
    """
    home = output.absolute().parent
    if home.is_dir() and home.samefile(graph.parent):
        return []
    return _publish_beside(output, folder, _config_of(graph, output), _files_beside(graph), on_message)


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
    names = () if is_there else BESIDE_GRAPH
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
    return sum(path.stat().st_size for path in _files_beside(graph))


def _files_beside(graph: Path) -> list[Path]:
    return [path for name in BESIDE_GRAPH if (path := graph.parent / name).is_file()]


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
