"""Which files of a model's folder hold its weights: one file, the shards of an index, or one variant of several.

A variant has its name before the ending, as diffusers writes it: `model.fp16.safetensors` beside `model.safetensors`,
`model.fp16-00001-of-00002.safetensors` with `model.safetensors.index.fp16.json`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_export.errors import InputRefused, first_of
from lora_export.options.spelling import named
from lora_export.storage import json_files

PIPELINE_INDEX = "model_index.json"  # of a diffusion pipeline, whose models are in folders of their own
MODULES_FILE = "modules.json"  # of an embedding model: see `sentence_modules`
WITHOUT_NAME = "none"  # how the variant without a name is chosen
_FILE = re.compile(r"(?P<stem>[^.]+?)(?:\.(?P<variant>\w+?))?(?:-\d+-of-\d+)?\.safetensors")
_INDEX = re.compile(r".+\.safetensors\.index(\.\w+)?\.json")


def is_index(name: str) -> bool:
    """Whether a file is an index of shards, of any variant."""
    return _INDEX.fullmatch(name) is not None


def variant_of(names: Iterable[str]) -> str | None:
    """The variant of files of weights, as a user chooses it; None where they are of several."""
    found = {match["variant"] or "" if (match := _FILE.fullmatch(name)) else "" for name in names}
    return (found.pop() or WITHOUT_NAME) if len(found) == 1 else None


def variant_like(folder: Path, names: Iterable[str] = ()) -> str | None:
    """Which of several variants in a folder has the name of these files, else the first; None where it has only one.

    The tensors of all variants have the same names and shapes.
    """
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    if not _are_of_one_model(present):
        return None
    choices = [name or WITHOUT_NAME for name in _by_variant(present)]
    wanted = variant_of(names)
    return wanted if wanted in choices else choices[0]


def weight_files(folder: Path, variant: str | None = None) -> tuple[str, list[str]]:
    """The name of the index, or an empty string, and the names of the files that hold the weights.

    `variant` chooses one of several: its name, or WITHOUT_NAME. Raises InputRefused where no set of files is the
    weights, or several are.
    """
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    of_variants = _by_variant(present)
    if variant is not None:
        own = of_variants.get("" if variant == WITHOUT_NAME else variant)
        if own is None:
            raise InputRefused(f"{folder} has no weights of the variant {variant}. It has {_listed(of_variants)}")
        present = own
    elif _are_of_one_model(present):
        choices = " or ".join(named("variant", name or WITHOUT_NAME) for name in of_variants)
        raise InputRefused(
            f"{folder} has its weights in several variants: {_listed(of_variants)}. `merge` takes {choices}; "
            "elsewhere name the file that you mean"
        )
    own_name = variant_of(present)
    ending = f".{own_name}" if own_name not in (None, WITHOUT_NAME) else ""
    indices = sorted(path.name for path in folder.glob(f"*.safetensors.index{ending}.json"))
    if len(indices) > 1:
        raise InputRefused(f"{folder} has {len(indices)} index files: {', '.join(indices)}. Keep only one of them")
    if indices:
        return indices[0], _indexed_files(folder, indices[0], present)
    if len(present) == 1:
        return "", present
    if present:
        raise InputRefused(
            f"{folder} has {len(present)} safetensors files and no index: {', '.join(present)}. Add the index, or name "
            "the file that you mean"
        )
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if (folder / PIPELINE_INDEX).is_file():
        raise InputRefused(f"{folder} is a diffusion pipeline. Name the folder of one of its models")
    if pickles:
        raise InputRefused(
            f"{folder} has its weights in pickle files ({', '.join(pickles)}), which can run code when they are "
            "opened. Load the model where you trust it, and save it as safetensors"
        )
    files = sorted(path.name for path in folder.glob("*.gguf"))
    instead = f". Name the GGUF file in it: {first_of(files, 3)}" if files else ""
    raise InputRefused(f"{folder} has no safetensors weights{instead}")


def _by_variant(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        match = _FILE.fullmatch(name)
        found.setdefault(match["variant"] or "" if match else "", []).append(name)
    return found


def _are_of_one_model(names: Sequence[str]) -> bool:
    """Whether files differ by their variant alone, and by the number of a shard."""
    matches = [_FILE.fullmatch(name) for name in names]
    stems = {match["stem"] for match in matches if match}
    return all(matches) and len(stems) == 1 and len({match["variant"] for match in matches if match}) > 1


def _listed(of_variants: Iterable[str]) -> str:
    return " and ".join(name or "one without a name" for name in sorted(of_variants)) or "none"


def _indexed_files(folder: Path, index: str, present: Sequence[str]) -> list[str]:
    """The shards that an index names. Raises InputRefused where they are not exactly the files of the folder."""
    table = json_files.read_json(folder / index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise InputRefused(f"{folder / index} has no weight_map")
    strange = [
        name for name in table.values() if not isinstance(name, str) or Path(name).name != name or name in ("", "..")
    ]
    if strange:
        raise InputRefused(
            f"{folder / index} may only name files of its own folder, and names {', '.join(map(repr, strange))}"
        )
    named = list(dict.fromkeys(table.values()))
    missing = [name for name in named if name not in present]
    if missing:
        raise InputRefused(f"{folder} lacks shards that its index names: {', '.join(missing)}")
    extra = [name for name in present if name not in named]
    if extra:
        raise InputRefused(
            f"{folder} has an index and, besides its shards, {', '.join(extra)}. Remove what is not the model, or name "
            "the file that you mean"
        )
    return named
