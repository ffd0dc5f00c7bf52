"""What the readers of formats share: the files of an adapter, its keys by module, and all that is wrong with its pairs.

Tensors are in a safetensors file or in several, its shards, or in pickles of PyTorch where the user allows them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused, listed, refuse_unprintable
from lora_export.lora import LoraPair
from lora_export.names.row_orders import Heads
from lora_export.options.reading import ReadOptions
from lora_export.options.spelling import named
from lora_export.storage import input_files, json_files, safetensors_file
from lora_export.storage.safetensors_file import Entry, TensorFile, is_safetensors

if TYPE_CHECKING:
    from lora_export.storage.torch_pickle import PickledTensors

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".lora")  # ends of the names that trainers give to pickles
MODEL_CONFIG = "config.json"
LARGEST_NUMBER = 1e30  # in a config
# Modules that torch.compile, FSDP and activation checkpointing put around others. The base has none of them.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPER = re.compile(rf"(?<![^.])(?:{'|'.join(WRAPPERS)})\.")
_OUTER = re.compile(r"(?:(?:model|module|app|state_dict)\.)+(?=base_model\.model\.)")  # around the model that PEFT made

SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{1,9})-of-(?P<count>\d{1,9})\.safetensors")
MOST_SHARDS = 1000

Tensors = Mapping[str, NDArray[Any]]  # of one module: the side of a pair ("a", "b", ...) -> its tensor


@dataclass(frozen=True)
class ShardedTensors:
    """The tensors of several files, by their headers."""

    path: Path  # of the first
    entries: Mapping[str, Entry]
    files: Mapping[str, TensorFile]  # name of a tensor -> the file that has it
    metadata: Mapping[str, str]

    def read(self, name: str) -> NDArray[Any]:
        return self.files[name].read(name)

    def unchanged(self) -> bool:
        """Whether all files are still those of which the headers were read."""
        return all(file.unchanged() for file in self.files.values())


LEAST_LEFT_OUT = 1 << 16  # bytes: smaller tensors, such as alpha, decide what the others mean
_by_headers: ContextVar[bool] = ContextVar("by_headers", default=False)


@contextlib.contextmanager
def by_headers(*, alone: bool = True) -> Iterator[None]:
    """Read adapters without their large tensors meanwhile: those have the right shape, and every value is 1.

    For what names and shapes decide, such as a plan. Such an adapter has no hash. `alone=False` reads the values that
    decide too.
    """
    before = _by_headers.set(alone)
    try:
        yield
    finally:
        _by_headers.reset(before)


class HeaderAlone(TensorFile):
    """A file of which only small tensors are read, and those that are no floats."""

    def read(self, name: str) -> NDArray[Any]:
        """The tensor; a large one of floats takes no memory, and has the value 1 everywhere."""
        entry = self.entries[name]
        if entry.nbytes < LEAST_LEFT_OUT or entry.dtype.kind in "iub" or not _by_headers.get():
            return super().read(name)
        return np.broadcast_to(np.ones((), entry.dtype), entry.shape)


TensorSource: TypeAlias = "TensorFile | PickledTensors | ShardedTensors"


def is_pickle(path: Path) -> bool:
    """Whether a file of tensors is taken for a pickle."""
    return path.suffix in PICKLES


def is_tensor_file(path: Path) -> bool:
    """Whether a file is taken for one of tensors."""
    return path.is_file() and (is_safetensors(path) or is_pickle(path))


def weights_of(path: Path) -> Path | None:
    """The file of an adapter: the path itself, or the only one of tensors in a folder without a config."""
    if path.is_file():
        return path if is_tensor_file(path) else None
    if not path.is_dir() or (path / "adapter_config.json").exists() or (path / "config.json").exists():
        return None
    for is_wanted in (is_safetensors, is_pickle):
        found = sorted(each for each in path.iterdir() if is_wanted(each) and each.is_file())
        stems = {match["stem"] if (match := SHARD.fullmatch(each.name)) else each.name for each in found}
        if found:
            return found[0] if len(stems) == 1 else None
    return None


def open_tensors(path: Path, options: ReadOptions) -> TensorSource:
    """Open a file of tensors; of a shard, all of them.

    Raises InputRefused for a pickle that the user did not allow, for a shard that is missing, and for a damaged file.
    """
    if is_safetensors(path):
        return _open_safetensors(path)
    if not options.allow_pickle:
        raise InputRefused(
            f"{path} is a pickle, which can run code when it is opened. {named('allow_pickle', True)} reads it by "
            "torch.load with weights_only=True, which reads tensors alone"
        )
    from lora_export.storage import torch_pickle  # few adapters are pickles

    return torch_pickle.open_pickle(path)


def _open_safetensors(path: Path) -> TensorFile | ShardedTensors:
    match = SHARD.fullmatch(path.name)
    if match is None:
        return _open_file(path)
    count, (start, end) = int(match["count"]), match.span("number")
    if not 0 < count <= MOST_SHARDS:
        raise InputRefused(f"{path} is one of {count} shards, and an adapter has 1 to {MOST_SHARDS}")
    names = [f"{path.name[:start]}{number:0{end - start}}{path.name[end:]}" for number in range(1, count + 1)]
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        raise InputRefused(f"{path} is one of {count} shards, and {path.parent} lacks others:", listed(missing))
    shards = [_open_file(path.parent / name) for name in names]
    files: dict[str, TensorFile] = {}
    for shard in shards:
        if twice := sorted(files.keys() & shard.entries.keys()):
            raise InputRefused(f"{shard.path} has tensors that another shard has too:", listed(twice))
        files |= dict.fromkeys(shard.entries, shard)
    entries = {name: entry for shard in shards for name, entry in shard.entries.items()}
    metadata = {key: value for shard in shards for key, value in shard.metadata.items()}
    return ShardedTensors(shards[0].path, entries, files, metadata)


def _open_file(path: Path) -> TensorFile:
    try:
        file = safetensors_file.open_file(path)
    except OSError as error:
        raise InputRefused(f"{path}: {error.strerror}") from error
    return HeaderAlone(**vars(file)) if _by_headers.get() else file


def names_in(path: Path) -> frozenset[str]:
    """The names of a file's tensors, `unwrapped`; of a pickle other texts too. Reads headers alone, raises nothing."""
    if is_pickle(path):
        from lora_export.storage import torch_pickle

        return frozenset(map(unwrapped, torch_pickle.text_in_pickle(path)))
    file = _undamaged(path)
    return frozenset() if file is None else frozenset(map(unwrapped, file.entries))


def header_in(path: Path | None) -> Mapping[str, str]:
    """The metadata in the header of a `.safetensors` file; none of any other. Raises nothing."""
    file = None if path is None else _undamaged(path)
    return {} if file is None else file.metadata


def _undamaged(path: Path) -> TensorFile | ShardedTensors | None:
    try:
        return _open_safetensors(path) if is_safetensors(path) else None
    except (InputRefused, OSError):
        return None


def unwrapped(name: str) -> str:
    """A name without the modules that PyTorch wrapped around others, such as `_orig_mod`, and around PEFT's model."""
    plain = _WRAPPER.sub("", name)
    outer = _OUTER.match(plain)
    return plain[outer.end() :] if outer else plain


def hash_of_unchanged(file: TensorSource, *beside: Path) -> str:
    """The SHA-256 of an adapter, whose file of tensors has others `beside` it that change what it means.

    Of one file, it is that of the file. Of several, it is that of what `sha256sum` prints for them, in this order and
    the tensors last: a line `HASH  NAME` for each. Raises InputRefused where the tensors changed meanwhile.
    """
    if _by_headers.get():
        return ""
    shards = file.files.values() if isinstance(file, ShardedTensors) else ()
    tensors = list(dict.fromkeys(shard.path for shard in shards)) or [file.path]
    hashes = [(_sha256(path, _state_of(path)), path.name) for path in (*beside, *tensors)]
    if not file.unchanged():
        raise InputRefused(f"{file.path} changed while it was being read")
    if len(hashes) == 1:
        return hashes[0][0]
    lines = "".join(f"{value}  {name}\n" for value, name in hashes)
    return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()


def hash_of_tensors(file: TensorSource) -> str:
    """The SHA-256 of the file of tensors alone; empty where they are in several. `hash_of_unchanged` has read it."""
    return "" if isinstance(file, ShardedTensors) or _by_headers.get() else _sha256(file.path, _state_of(file.path))


def _state_of(path: Path) -> tuple[int, ...]:
    (state,) = input_files.file_states([path])
    return state


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, _state: tuple[int, ...]) -> str:
    with input_files.open_regular(path) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_floats(file: TensorSource, key: str) -> NDArray[Any]:
    """A tensor of a pair. Raises InputRefused for integers, which a quantised tensor has in the place of its values."""
    tensor = file.read(key)
    refuse_integers(key, tensor)
    return tensor


def refuse_integers(key: str, tensor: NDArray[Any]) -> None:
    """Raise InputRefused for integers, which a quantised tensor has in the place of its values."""
    if tensor.dtype.kind in "iub":
        raise InputRefused(f"{key} holds integers ({tensor.dtype}). If it is quantised, save the adapter in floats")


# --- Numbers ---


def base_config(folder: Path | None, options: ReadOptions) -> Mapping[str, Any] | None:
    """The config.json beside an adapter, else that of the base; None where there is neither.

    `folder` is that of the adapter, if any. `options.base_config` is a folder, a file in it, or a GGUF file, whose
    header has as much. Raises InputRefused for a damaged config.
    """
    places = [] if folder is None else [folder / MODEL_CONFIG]
    if (base := options.base_config) is not None:
        from lora_export.formats.gguf_architecture import config_of  # few formats need the base
        from lora_export.storage.gguf_file import is_gguf, open_gguf

        if is_gguf(base):
            return config_of(open_gguf(base))
        places.append((base.parent if base.is_file() else base) / MODEL_CONFIG)
    found = next((path for path in places if path.is_file()), None)
    return None if found is None else json_files.read_model_config(found)


def positive_size(source: object, name: str, value: Any) -> int:
    """A field that is a positive integer. Raises InputRefused, which names `source`, for another value."""
    if type(value) is not int or not 0 < value < 1 << 31:
        raise InputRefused(f"{source}: {name} is {value!r}; it must be a positive integer")
    return value


def positive_number(source: object, name: str, value: Any, most: float = LARGEST_NUMBER) -> float:
    """A field that is a positive number. Raises InputRefused, which names `source`, for another value."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
        raise InputRefused(f"{source}: {name} is {value!r}; it must be a positive number")
    return float(value)


def size_in_config(config: Mapping[str, Any], name: str) -> int | None:
    """A size in the base's config, where it has one. Raises InputRefused where that is no positive integer."""
    value = config.get(name)
    return None if value is None else positive_size("the base's config", name, value)


def language_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the language model, where the config is that of a model of images and texts."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def heads_in_config(config: Mapping[str, Any]) -> Heads:
    """The heads of the base's attention and their rows. Raises InputRefused for a config without their number."""
    queries, width = (
        positive_size("the base's config", key, config.get(key)) for key in ("num_attention_heads", "hidden_size")
    )
    keys = size_in_config(config, "num_key_value_heads") or queries
    return Heads(queries, keys, size_in_config(config, "head_dim") or max(1, width // queries))


def stated_rank_and_alpha(why: str, options: ReadOptions) -> tuple[int, float]:
    """What the user states of an adapter that records neither, for the reason `why`. Raises InputRefused without."""
    if options.lora_rank is None or options.lora_alpha is None:
        raise InputRefused(
            f"{why}, and B A is multiplied by alpha / rank. State both as in training: {named('lora_rank', 'R')} "
            f"{named('lora_alpha', 'ALPHA')}"
        )
    return options.lora_rank, options.lora_alpha


# --- Pairs ---


def read_pairs(
    file: TensorSource,
    build: Callable[[str, Tensors], Mapping[str, LoraPair]],
    *patterns: re.Pattern[str],
    others: re.Pattern[str] | None = None,
) -> tuple[dict[str, LoraPair], dict[str, str]]:
    """The pairs that `build` makes of each module's tensors, and the key of A for each pair's name.

    `patterns` match the keys of pairs; their groups are `module` and `side`. `others` matches those that are left to
    the caller. Raises InputRefused for a file without tensors, for names with control characters, and with everything
    that is wrong: a side that is missing or there twice, what `build` refuses, two pairs of one name, other keys.
    """
    modules, problems = _keys_by_module(file, patterns, others)
    pairs: dict[str, LoraPair] = {}
    spelling: dict[str, str] = {}
    for module, sides in modules.items():
        if missing := [side for side in ("a", "b") if side not in sides]:
            problems.append(f"{module}: {' and '.join(missing).upper()} is missing")
            continue
        try:
            built = build(module, {side: read_floats(file, key) for side, key in sides.items()})
        except InputRefused as error:
            problems.append(f"{module}: {error}")
            continue
        problems += [f"{module}: {spelling[name]} has the name {name} too" for name in built if name in pairs]
        pairs |= built
        spelling |= dict.fromkeys(built, sides["a"])
    refuse_problems(file, problems)
    return pairs, spelling


def _keys_by_module(
    file: TensorSource, patterns: tuple[re.Pattern[str], ...], others: re.Pattern[str] | None
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Module -> side -> key, and a line for each key of an unknown kind."""
    refuse_unprintable(file.entries, f"the names in {file.path}")
    modules: dict[str, dict[str, str]] = {}
    problems = []
    for key in file.entries:
        match = next(filter(None, (pattern.fullmatch(unwrapped(key)) for pattern in patterns)), None)
        if match is None:
            problems += [] if others is not None and others.fullmatch(key) else [f"{key}: unknown kind of tensor"]
            continue
        sides, side = modules.setdefault(match["module"], {}), match["side"].lower()
        if side in sides:
            raise InputRefused(f"{file.path} contains one tensor under two names: {sides[side]} and {key}")
        sides[side] = key
    if not file.entries:
        raise InputRefused(f"{file.path} contains no tensor")
    return modules, problems


def refuse_problems(file: TensorSource, problems: list[str]) -> None:
    """Raise InputRefused with everything that is wrong with a file, where anything is."""
    if problems:
        raise InputRefused(f"{file.path} is refused:", listed(sorted(problems), len(problems)))
