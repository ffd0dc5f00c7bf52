"""The files that onnxruntime-genai reads beside a graph: its own config, and the tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from lora_export.api.callbacks import OnMessage
from lora_export.storage import atomic_output, input_files, json_files

GENAI_CONFIG = "genai_config.json"
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
)


def copy_generation_files(graph: Path, output: Path, folder: Path, on_message: OnMessage) -> list[str]:
    """Copy what is needed to generate from the folder of a graph into `folder`; return the names.

    `folder` holds what is published beside `output`. The config is copied if it names `graph`, and then names
    `output`. A file that is beside `output` already is not replaced, and a note names it. Raises InputRefused for what
    is no file, and OutputFailed where it does not fit on the disk.
    """
    home = output.absolute().parent
    if home.is_dir() and home.samefile(graph.parent):
        return []
    texts = _config_of(graph, output)
    present = [name for name in TOKENIZER if (graph.parent / name).is_file()]
    taken = [name for name in (*texts, *present) if (home / name).exists()]
    if taken:
        on_message(f"note: beside {output} these files exist already and stay as they are: {', '.join(taken)}")
    copied = [name for name in present if name not in taken]
    atomic_output.refuse_lack_of_space(folder, sum((graph.parent / name).stat().st_size for name in copied))
    for name, text in texts.items():
        if name not in taken:
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
    for name in copied:
        with input_files.open_regular(graph.parent / name) as source, (folder / name).open("xb") as copy:
            shutil.copyfileobj(source, copy)
    return [name for name in (*texts, *present) if name not in taken]


def size_of_generation_files(graph: Path) -> int:
    """The bytes that `copy_generation_files` copies at most."""
    files = [graph.parent / name for name in TOKENIZER]
    return sum(path.stat().st_size for path in files if path.is_file())


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
