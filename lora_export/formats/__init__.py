"""Adapter formats. Each is one file, recognised by the contents of the adapter.

To add the format NAME, write `formats/NAME.py` with what `AdapterFormat` asks for (DESCRIPTION, `recognises`, `read`),
and `tests/formats/test_NAME.py`. Every module of this folder that has these is a format. To write the format, add what
`AdapterWriter` asks for (SUFFIX, `write`), and the name in `options.adapters.WrittenFormat`.

`read` returns an `Adapter`: pairs A (rank, in...) and B (out, rank...) with a final scale, under the module names of
the base. What is special about the format (alpha, prefixes, file layout) stays in its file. It refuses what it does not
support, by name, with InputRefused. `write` refuses by name what its format cannot express. It drops nothing, and it
rounds no tensor.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, cast

from lora_export.errors import InputRefused, listed
from lora_export.formats.adapter_files import SHARD, is_tensor_file
from lora_export.lora import Adapter
from lora_export.options.reading import DEFAULTS, ReadOptions
from lora_export.options.spelling import command, named
from lora_export.plan.diffusion import Family
from lora_export.storage import input_files
from lora_export.storage.artifact_kinds import ArtifactKind, claimed_kind
from lora_export.storage.hub_cache import hub_source
from lora_export.storage.store_path import place

SHOWN_KEYS = 8
OF_A_MODEL = re.compile(r"(pytorch_|diffusion_pytorch_)?model[.-]")  # files of weights
# Names that trainers give to every adapter's file: that of the folder is the adapter's.
SAME_FOR_ALL = frozenset({"adapter_model", "adapters", "lit_model", "pytorch_lora_weights"})


class AdapterFormat(Protocol):
    """What the module of a format provides."""

    DESCRIPTION: str  # what such an adapter consists of, for messages: "a folder with ..."

    def recognises(self, path: Path) -> bool:
        """Whether the adapter at `path` is in this format. Reads headers only, and raises nothing."""

    def read(self, path: Path, name: str, options: ReadOptions) -> Adapter:
        """Read the adapter. Raises InputRefused with everything that is wrong with it."""


@dataclass(frozen=True)
class WriteOptions:
    """How an adapter is written."""

    reading: ReadOptions = DEFAULTS  # how it was read; `base_config` has what some formats need of the base
    family: Family = Family.UNKNOWN  # of the diffusion pipeline, which numbers its text encoders
    stacked_experts: bool = False  # of PEFT's format: one tensor for all experts of a projection, as SGLang reads them


class AdapterWriter(Protocol):
    """What the module of a format that can be written provides."""

    SUFFIX: str  # of the file; empty where the output is a folder

    def write(self, adapter: Adapter, path: Path, options: WriteOptions) -> tuple[str, ...]:
        """Write the adapter to a folder that exists, or to a file that does not, both staged by the caller.

        Returns what the user should know. Raises InputRefused with everything that the format cannot express, and
        leaves nothing to clean up but what is in `path`.
        """


def writer_of(target: str) -> AdapterWriter:
    """The writer of a format that the options name. Its module is imported then."""
    return cast(AdapterWriter, importlib.import_module(f"{__name__}.{target}"))


def holds_pipelines(target: str) -> bool:
    """Whether a format has adapters for several models of a pipeline: those of one file for image models."""
    return getattr(writer_of(target), "OF_PIPELINES", False)


@functools.cache
def known_formats() -> Mapping[str, AdapterFormat]:
    """The formats by name. Their modules are imported when they are first used."""
    modules = {one.name: importlib.import_module(f"{__name__}.{one.name}") for one in pkgutil.iter_modules(__path__)}
    return {name: cast(AdapterFormat, module) for name, module in modules.items() if hasattr(module, "recognises")}


SAVED_BY_PEFT = frozenset({"adapter_config.json", "adapter_model.safetensors"})
TEXT_SUFFIXES = (".json", ".md", ".jinja")  # of files beside them that are no adapter in another format


def possible_formats(path: Path) -> Mapping[str, AdapterFormat]:
    """The formats that an adapter may be in: PEFT's for its files without others beside them, else all of them.

    Most adapters are such a folder, for which the modules of the other formats are not imported: none may recognise it.
    """
    if path.is_dir():
        names = {each.name for each in path.iterdir()}
        if names >= SAVED_BY_PEFT and all(name.endswith(TEXT_SUFFIXES) for name in names - SAVED_BY_PEFT):
            peft = cast(AdapterFormat, importlib.import_module(f"{__name__}.peft"))
            if peft.recognises(path):
                return {"peft": peft}
    return known_formats()


def recognised(path: Path) -> bool:
    """Whether an adapter in a known format is at `path`. Reads no tensors."""
    return any(adapter_format.recognises(path) for adapter_format in possible_formats(path).values())


def is_model(path: Path) -> bool:
    """Whether a folder has a model's config and weights, and no adapter."""
    if not path.is_dir() or recognised(path):
        return False
    has_weights = any(OF_A_MODEL.match(each.name) for each in path.iterdir())
    return (path / "model_index.json").is_file() or ((path / "config.json").is_file() and has_weights)


def is_only_adapter(path: Path) -> bool:
    """Whether a file or folder is an adapter, and has no weights of a model beside it."""
    if path.is_file():
        return claimed_kind(path) is ArtifactKind.ADAPTER or recognised(path)
    if not path.exists() or not recognised(path):
        return False
    return all(each.name.startswith("adapter") for each in path.iterdir() if is_tensor_file(each))


def located(path: Path) -> Path:
    """The path; or the only adapter in a folder inside of it, where it is a folder and has no tensors itself.

    PEFT saves an adapter with a name into a folder of this name, trainers save one with every checkpoint. Raises
    InputRefused where several are inside.
    """
    if not path.is_dir() or recognised(path) or any(map(is_tensor_file, path.iterdir())):
        return path
    inside = [each for each in sorted(path.iterdir()) if each.is_dir() and recognised(each)]
    if len(inside) > 1:
        names = ", ".join(each.name for each in inside)
        raise InputRefused(f"{path} is no adapter, and has {len(inside)} of them inside: {names}. Name one of these")
    return inside[0] if inside else path


def load(
    path: str | Path, *, name: str | None = None, options: ReadOptions = DEFAULTS, activated: bool = False
) -> Adapter:
    """Read an adapter in any known format, from its folder or file, as `located` finds it. Runs no code of its own.

    `name` is the adapter's name in reports and graphs (default: the folder's name, or the file's without its suffix,
    where that is no name like `adapter_model`). `options` state what its files do not record, and choose a format where
    several recognise the adapter. `activated` states that the caller can have one that acts on some tokens only. Raises
    InputRefused for an adapter that is missing, damaged, unknown or not supported.
    """
    outer, path = place(path), located(place(path))
    input_files.must_exist(path, "adapter")
    candidates = known_formats() if options.format else possible_formats(path)
    if options.format:
        if options.format not in candidates:
            raise InputRefused(f"unknown adapter format {options.format!r}; known: {', '.join(candidates)}")
        candidates = {options.format: candidates[options.format]}
    matching = {key: module for key, module in candidates.items() if module.recognises(path)}
    if not matching:
        refuse_shards(path)
        _refuse_foreign_keys(path)
        if options.format:
            raise InputRefused(
                f"{path} is not in the format {options.format}: {candidates[options.format].DESCRIPTION}"
            )
        if is_model(path):
            raise InputRefused(f"{path} is a model, and no adapter: it has a config.json, and no adapter's file")
        known = [f"{key}: {module.DESCRIPTION}" for key, module in candidates.items()]
        raise InputRefused(f"{path} is not an adapter in a known format:", listed(known, len(known)))
    if len(matching) > 1:
        first = named("format", next(iter(matching)))
        raise InputRefused(f"{path} may be in several formats: {', '.join(matching)}. Choose one: {first}")
    (module,) = matching.values()
    adapter = module.read(path, name or default_name(outer), options)
    refuse_activated([] if activated else [adapter])
    inside = (f"{outer}: the adapter is in its folder {path.name}.",) if path != outer else ()
    return replace(adapter, notes=(*inside, *adapter.notes), hub=hub_source(path))


def refuse_activated(adapters: Iterable[Adapter]) -> None:
    """Raise InputRefused for an adapter that acts on some tokens only: elsewhere it would act on all of them."""
    for adapter in adapters:
        if adapter.invocation_tokens:
            raise InputRefused(
                f"{adapter.name} is an activated LoRA (alora_invocation_tokens): it acts from its invocation tokens "
                f"on, which no weights and no other format do. Only `{command('onnx', lora='nodes')}` takes it, and "
                f"`{command('verify')}` with {named('model')}"
            )


def _refuse_foreign_keys(path: Path) -> None:
    """Raise InputRefused for a file of which most keys are in one format, and some are not."""
    for name, module in known_formats().items():
        foreign: list[str] = getattr(module, "foreign_keys", lambda _: [])(path)
        if foreign:
            raise InputRefused(
                f"{path} is in the format {name}, but for {len(foreign)} of its keys:", listed(foreign, SHOWN_KEYS)
            )


def default_name(path: Path) -> str:
    """The name of an adapter by its path: that of its folder, or of its file without the suffix."""
    resolved = path.resolve()
    if resolved.is_dir():
        return resolved.name
    shard = SHARD.fullmatch(resolved.name)
    stem = shard["stem"] if shard else resolved.name.partition(".")[0]
    return resolved.parent.name if stem in SAME_FOR_ALL else stem


# --- Folders of DeepSpeed's ZeRO, whose shards are pickles of its classes: recognised, and refused with the way out ---

_SHARD = "*zero_pp_rank_*_states.pt"
_SCRIPT = "zero_to_fp32.py"  # DeepSpeed puts it into each of its checkpoints


def refuse_shards(path: Path) -> None:
    """Raise InputRefused for a folder with shards of ZeRO, or of a checkpoint that has such a folder inside."""
    if not path.is_dir() or not any((*path.glob(_SHARD), *path.glob(f"*/{_SHARD}"))):
        return
    folder = path if any(path.glob(f"*/{_SHARD}")) else path.parent
    raise InputRefused(
        f"{path} has shards of DeepSpeed's ZeRO, which only DeepSpeed reads. Gather them with the script that it saved "
        f"there: python {folder / _SCRIPT} {folder} OUT (with its flags safe_serialization and "
        "exclude_frozen_parameters). Then put adapter_config.json beside OUT/model.safetensors, and name OUT"
    )
