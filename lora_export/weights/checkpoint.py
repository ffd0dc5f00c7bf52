"""A checkpoint on disk: its headers, config and index. No weights are read here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from lora_export import provenance
from lora_export.errors import InputRefused, brief, count, listed, refuse_unprintable
from lora_export.formats.task_adapters import (
    STACKED_ADAPTER,
    plain_name,
    refuse_other_parametrizations,
    task_names,
    tasks_of,
)
from lora_export.names.architecture import ArchitectureRules, rules_of
from lora_export.names.table import CONV1D_MODULES, KNOWN_MODEL_TYPES, LINEAR_MODULES
from lora_export.options.spelling import named
from lora_export.plan import FLOATS, Layout, TensorSpec
from lora_export.provenance import History
from lora_export.storage import input_files, json_files, safetensors_file
from lora_export.storage.manifest import OF_THE_OUTPUT, read_manifest
from lora_export.storage.safetensors_file import Entry, TensorFile
from lora_export.storage.store_path import place
from lora_export.weights.quantised import (
    QUANTIZATION,
    QUANTIZATION_FILES,
    SCHEMES,
    method_of,
    remedy_for,
    stated_beside,
)
from lora_export.weights.quantised.comfyui_files import COMFYUI, file_dtype, stated_by_file
from lora_export.weights.sentence_modules import module_folders
from lora_export.weights.weight_files import is_index, weight_files

if TYPE_CHECKING:
    from lora_export.weights.quantised.new_grid import NewGrid
    from lora_export.weights.quantised.stored_parts import QuantisedTensor

CONFIG = "config.json"
BLOBS = "blobs"  # the folder of a Hugging Face cache to which its snapshots link
# Weights in other formats in the folder of a model. They are not copied: they would contradict the merged weights.
OTHER_WEIGHTS = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".data",
    ".gguf",
    ".tflite",
    ".ot",
)

AUTO_MAP = "auto_map"
LABELS = ("id2label", "label2id")  # tables of a config with arbitrary keys
CODE = (
    AUTO_MAP,
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
)

MODEL_TYPE = "model_type"
OF_DIFFUSERS = "_diffusers_version"  # in a config of diffusers, none of whose models stores a matrix transposed
OWN_METADATA = ("format", provenance.KEY)  # entries of a file's header that are no aliases
READ_AS_STORED = frozenset(np.dtype(kind) for kind in (np.float32, np.float16, ml_dtypes.bfloat16))


@dataclass(frozen=True, eq=False, repr=False)
class Checkpoint:
    """The headers of a Hugging Face folder or of one safetensors file."""

    path: Path
    shards: Mapping[str, TensorFile]  # file name -> header
    specs: tuple[TensorSpec, ...]
    config: Mapping[str, Any] = field(default_factory=dict)  # empty for a bare file
    index: str = ""  # the index's file name, where the weights are in several files
    history: History = ()  # the adapters of earlier merges
    quantised: Mapping[str, QuantisedTensor] = field(default_factory=dict)  # weights that are read as floats
    own_adapters: tuple[str, ...] = ()  # the tasks for which its weights hold adapters; it is read without these
    # Quantised weights that are read as they are stored, by the name of their packed numbers
    kept: Mapping[str, QuantisedTensor] = field(default_factory=dict)
    grids: Mapping[str, NewGrid] = field(default_factory=dict)  # of kept weights, where it is another than the base's
    takes_more: bool = True  # whether a merge can add tensors to it: not to a GGUF file

    def __repr__(self) -> str:
        return brief(self, repr(str(self.path)), count(len(self.specs), "tensor"), f"{self.nbytes:,} bytes")

    def entries(self, shard: str) -> dict[str, Entry]:
        """The tensors of a file, in the order of their bytes. A quantised weight is one tensor of floats."""
        return _logical_entries(self.shards[shard], self.quantised)

    @property
    def is_folder(self) -> bool:
        return self.path.is_dir()

    @functools.cached_property
    def rules(self) -> ArchitectureRules | None:
        """How transformers renames these weights while it loads them; None where the config names no model of it."""
        return rules_of(self.config)

    @property
    def nbytes(self) -> int:
        """The size of all weight files."""
        return sum(shard.size for shard in self.shards.values())

    @property
    def word_count(self) -> int | None:
        """The size of the vocabulary, as the config states it."""
        parts = [self.config, self.config.get("text_config")]
        return next((part["vocab_size"] for part in parts if isinstance(part, dict) and "vocab_size" in part), None)

    def refuse_changed_files(self, doing: str) -> None:
        """Raise InputRefused where a file of weights changed since it was opened."""
        for shard in self.shards.values():
            if not shard.unchanged():
                raise InputRefused(f"{shard.path} changed while it was being {doing}")

    def other_files(self) -> Iterator[Path]:
        """The other files of the folder (config, tokenizer, licence), without weights in other formats.

        The weights of the modules of a sentence-transformers folder are among them.

        Raises InputRefused for a link out of the folder: its target would be published with the model.
        """
        if not self.is_folder:
            return
        home = self.path.resolve()
        ours = {*self.shards, self.index, *OF_THE_OUTPUT}
        modules = module_folders(self.path)
        for path in input_files.shown_files(self.path):
            relative = path.relative_to(self.path)
            if path.parent not in modules and (self._is_weights(path) or is_index(path.name)):
                continue
            if relative.as_posix() in ours:
                continue
            if self.quantised and not self.kept and relative.as_posix() in QUANTIZATION_FILES:
                continue
            refuse_link_outside(path, home)
            yield relative

    def unmerged_weights(self) -> list[str]:
        """Weights in other formats in the same folder, which a merge does not copy."""
        if not self.is_folder:
            return []
        modules = module_folders(self.path)
        found = [path for path in input_files.regular_files(self.path) if path.parent not in modules]
        names = [path.relative_to(self.path).as_posix() for path in found if self._is_weights(path)]
        return [name for name in names if name not in self.shards]

    @staticmethod
    def _is_weights(path: Path) -> bool:
        return path.name.endswith((".safetensors", *OTHER_WEIGHTS))


def refuse_link_outside(path: Path, home: Path) -> None:
    """Raise InputRefused for a link out of a model's resolved folder, except into a Hugging Face cache."""
    target = path.resolve()
    if not target.is_relative_to(home) and target.parent.name != BLOBS:
        raise InputRefused(f"{path} is a link to {target}, outside the model. Replace the link with a copy of the file")


def open_checkpoint(
    path: str | Path, *, dequantise: bool = False, variant: str | None = None, what: str = "base model"
) -> Checkpoint:
    """Read the headers, config and index of a base. Reads no weights.

    With `dequantise`, the weights of a quantised folder are read as floats (`Checkpoint.quantised`). `variant` chooses
    one of several sets of weights in a folder: its name, or "none" for that without a name. Messages call the base
    `what`. Raises InputRefused for missing or damaged shards, an index that disagrees with them, two sets of weights,
    pickled weights, and quantised weights that are not to be dequantised, or whose scheme is not known.
    """
    path = place(path)
    input_files.must_exist(path, what)
    if path.is_dir():
        return _open_folder(path, dequantise, variant)
    if variant is not None:
        raise InputRefused(f"{path} is one file, which has no variants. Leave {named('variant')} out")
    if not safetensors_file.is_safetensors(path):
        from lora_export.storage.gguf_file import is_gguf  # a base of safetensors does not need it

        if is_gguf(path):
            raise InputRefused(
                f"{path} is a GGUF file, which is not taken here. Give the Hugging Face folder or the .safetensors "
                "file that it was made from"
            )
        raise InputRefused(
            f"{path} is no checkpoint: give a Hugging Face folder or a .safetensors file, or, where the command takes "
            "them, a .gguf or .onnx file"
        )
    shards, tasks = without_adapters({path.name: safetensors_file.open_file(path)}, {})
    history = _history(path, {}, shards[path.name])
    quantised = _read_quantised(path, shards, {}, stated_by_file(shards), dequantise)
    specs = tuple(_specs(shards.values(), {}, quantised))
    return Checkpoint(path, shards, specs, history=history, quantised=quantised, own_adapters=tasks)


def checkpoint_of_headers(path: Path, shards: Mapping[str, TensorFile], config: Mapping[str, Any]) -> Checkpoint:
    """A checkpoint of which only headers and config are known: names, shapes and layouts, for a plan."""
    return Checkpoint(path, shards, tuple(_specs(shards.values(), config)), config)


def custom_code(config: Mapping[str, Any]) -> str:
    """The entry of a model's config that names code to load, as `key: value`; empty where there is none.

    A merge copies such a config and runs no code. A function that builds the model must refuse it.
    """
    for key in CODE:
        for value in _values(config, key):
            # An attention of transformers has a plain name; one from the Hub has an owner before a slash.
            if key == AUTO_MAP or "/" in str(value):
                return f"{key}: {value!r}"
    return ""


def _logical_entries(shard: TensorFile, quantised: Mapping[str, QuantisedTensor]) -> dict[str, Entry]:
    parts = {part for tensor in quantised.values() for part in tensor.parts}
    packed = {tensor.packed: tensor for tensor in quantised.values()}
    tensors = [
        packed[name].entry(entry) if name in packed else entry
        for name, entry in shard.entries.items()
        if name not in parts
    ]
    return {entry.name: entry for entry in tensors}


def _open_folder(folder: Path, dequantise: bool, variant: str | None) -> Checkpoint:
    config = json_files.read_model_config(folder / CONFIG) if (folder / CONFIG).exists() else {}
    quantization = next(filter(None, _values(config, QUANTIZATION)), None)
    if quantization and not dequantise:
        raise _not_silently(folder, quantization)
    index, names = weight_files(folder, variant)
    shards = {name: safetensors_file.open_file(folder / name) for name in names}
    if index:
        _check_index(folder / index, shards)
    shards, tasks = without_adapters(shards, config)
    quantization = quantization or _quantization_beside(folder, shards) or stated_by_file(shards)
    quantised = _read_quantised(folder, shards, config, quantization, dequantise)
    specs = tuple(_specs(shards.values(), config, quantised))
    first = next(iter(shards.values()))
    history = _history(folder, read_manifest(folder), first)
    return Checkpoint(folder, shards, specs, config, index, history, quantised, tasks)


def _read_quantised(
    path: Path, shards: Mapping[str, TensorFile], config: Mapping[str, Any], quantization: Any, dequantise: bool
) -> dict[str, QuantisedTensor]:
    """The quantised weights, by name. Raises InputRefused where there are some, and they are not to be read."""
    if not quantization:
        return {}
    if not dequantise:
        raise _not_silently(path, quantization)
    known = quantization if isinstance(quantization, dict) else {"quant_method": str(quantization)}
    dtype = _float_dtype(config, file_dtype(entry for shard in shards.values() for entry in shard.entries.values()))
    from lora_export.weights.quantised.reading import find_quantised  # few bases are quantised

    return find_quantised(shards, known, dtype, _conv1d_weights(config))


def _not_silently(folder: Path, quantization: Any) -> InputRefused:
    method = method_of(quantization)
    shown = "in a form for ComfyUI" if method == COMFYUI else method
    kept = f". {named('keep_quantised', True)} merges and keeps it quantised" if method in SCHEMES else ""
    return InputRefused(
        f"{folder} is quantised ({shown}): its weights are never merged or quantised again silently. "
        f"Merge into the original float model, or {remedy_for(quantization)}{kept}"
    )


def _quantization_beside(folder: Path, shards: Mapping[str, TensorFile]) -> dict[str, Any] | None:
    """What a quantiser states in a file of its own, where the config states nothing and tensors are stored so."""
    tensors = [name for shard in shards.values() for name in shard.entries]
    for name in QUANTIZATION_FILES:
        if (folder / name).is_file():
            found = stated_beside(name, json_files.read_json(folder / name), tensors)
            if found is not None:
                return found
    return None


def _conv1d_weights(config: Mapping[str, Any]) -> Callable[[str], bool | None]:
    """Whether a weight of a model with this config belongs to a Conv1D; None where two parts of it disagree."""
    model_types = _known_model_types(config)

    def is_conv1d(name: str) -> bool | None:
        layout = _layout(name, 2, model_types) if model_types else Layout.MATRIX
        return None if layout is Layout.UNKNOWN else layout is Layout.IN_OUT

    return is_conv1d


def _float_dtype(config: Mapping[str, Any], default: str) -> str:
    """The dtype of the model, as its config names it."""
    named = next((str(config[key]) for key in ("dtype", "torch_dtype") if config.get(key)), default)
    return named if named in FLOATS else "bfloat16"


def _check_index(index: Path, shards: Mapping[str, TensorFile]) -> None:
    table: dict[str, str] = json_files.read_json(index)["weight_map"]
    problems = [
        f"{name}: not in {file}, where the index expects it"
        for name, file in table.items()
        if name not in shards[file].entries
    ]
    for file, shard in shards.items():
        problems += [
            f"{name}: in {file}, the index {f'expects it in {table[name]}' if name in table else 'does not list it'}"
            for name in shard.entries
            if table.get(name) != file
        ]
    if problems:
        raise InputRefused(f"{index} disagrees with the shards:", listed(problems, len(problems)))


def tensor_aliases(shards: Iterable[TensorFile]) -> dict[str, str]:
    """Names without a tensor of their own -> the stored tensor, as safetensors' `save_model` records tied parameters.

    The metadata of a header has such an entry for each name that was left out.
    """
    shards = list(shards)
    stored = {name for shard in shards for name in shard.entries}
    return {
        alias: name
        for shard in shards
        for alias, name in shard.metadata.items()
        if name in stored and alias not in stored and alias not in OWN_METADATA
    }


def _specs(
    shards: Collection[TensorFile], config: Mapping[str, Any], quantised: Mapping[str, QuantisedTensor] | None = None
) -> Iterator[TensorSpec]:
    model_types = _known_model_types(config)
    aliases: dict[str, list[str]] = {}
    for alias, name in tensor_aliases(shards).items():
        aliases.setdefault(name, []).append(alias)
        refuse_unprintable([alias], "the header's metadata")
    for shard in shards:
        refuse_unprintable(shard.entries, f"the header of {shard.path}")
        for entry in _logical_entries(shard, quantised or {}).values():
            yield TensorSpec(
                name=entry.name,
                shape=entry.shape,
                dtype=str(entry.dtype),
                layout=_layout(entry.name, len(entry.shape), model_types),
                file=shard.path.name,
                nbytes=entry.nbytes,
                aliases=tuple(sorted(aliases.get(entry.name, ()))),
            )


def _layout(name: str, dimensions: int, model_types: Collection[str]) -> Layout:
    """The layout of a tensor of a model of these types; of a matrix UNKNOWN where there are none."""
    if dimensions != 2:
        return Layout.OTHER if dimensions < 2 else Layout.OUT_IN  # a convolution, or a bare parameter
    if not model_types:
        return Layout.UNKNOWN
    if OF_DIFFUSERS in model_types:
        return Layout.MATRIX
    module = name.removesuffix(".weight").rpartition(".")[2]
    if all(module not in CONV1D_MODULES.get(model_type, ()) for model_type in model_types):
        return Layout.MATRIX
    # A composite model, one part of which has a Conv1D of this name, and another an nn.Linear.
    is_ambiguous = any(module in LINEAR_MODULES.get(model_type, ()) for model_type in model_types)
    return Layout.UNKNOWN if is_ambiguous else Layout.IN_OUT


def _known_model_types(config: Mapping[str, Any]) -> frozenset[str]:
    """The model types of a config and of its parts; empty unless all of them are types of transformers."""
    if OF_DIFFUSERS in config:
        return frozenset({OF_DIFFUSERS})
    model_types = frozenset(str(value) for value in _values(config, MODEL_TYPE) if value)
    return model_types if config.get(MODEL_TYPE) and model_types <= KNOWN_MODEL_TYPES else frozenset()


def _values(config: Mapping[str, Any], key: str) -> Iterator[Any]:
    """The values of a key in a config, in its nested parts too."""
    parts = [config]  # not recursive: a hostile config may be nested deeper than Python's stack
    while parts:
        part = parts.pop()
        if key in part:
            yield part[key]
        parts += [value for name, value in part.items() if isinstance(value, dict) and name not in LABELS]


def _history(path: Path, manifest: Mapping[str, Any], shard: TensorFile) -> History:
    text = shard.metadata.get(provenance.KEY)
    return provenance.history(manifest, path) if manifest or text is None else provenance.read_history(text, path)


def is_streamable(checkpoint: Checkpoint) -> bool:
    """Whether every tensor is a float of at most 32 bits, and transformers neither stacks nor splits any."""
    converters = checkpoint.rules.converters if checkpoint.rules else ()
    kinds = {entry.dtype for shard in checkpoint.shards.values() for entry in shard.entries.values()}
    return not checkpoint.quantised and not converters and kinds <= READ_AS_STORED


def without_adapters(
    shards: Mapping[str, TensorFile], config: Mapping[str, Any]
) -> tuple[dict[str, TensorFile], tuple[str, ...]]:
    """The shards without the adapters of their own, under plain names, and the tasks of these. Most have none.

    Raises InputRefused where a weight is stored with and without them, and for other parametrizations.
    """
    entries = (entry for shard in shards.values() for entry in shard.entries.values())
    stacked = [entry for entry in entries if STACKED_ADAPTER.fullmatch(entry.name)]
    if not stacked:
        return dict(shards), ()
    plain: dict[str, TensorFile] = {}
    for name, shard in shards.items():
        refuse_other_parametrizations(shard.entries, shard.path)
        kept = {each: new for each in shard.entries if (new := plain_name(each)) is not None}
        if len(set(kept.values())) < len(kept):
            raise InputRefused(f"{shard.path} contains a weight as itself, and as that of a parametrization")
        plain[name] = replace(shard, entries={new: replace(shard.entries[old], name=new) for old, new in kept.items()})
    return plain, task_names(config, tasks_of(stacked[0].shape))
