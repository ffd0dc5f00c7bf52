"""Models and adapters of the Hugging Face Hub by names or addresses, in the local cache, or downloaded into it.

`owner/name[@revision]` is looked up by huggingface_hub itself, which follows HF_HOME and HF_HUB_CACHE. The address
`hf://owner/name[@revision][/path]` is that of the Hub: what the cache lacks of it is downloaded. A slash in the name of
a branch is `%2F` there, as in huggingface_hub; those of `refs/pr/1` may stay.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import sys
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from lora_export.errors import EnvironmentLacking, InputRefused, LoraExportError, OutputFailed, one_line
from lora_export.options.spelling import named
from lora_export.storage import json_files
from lora_export.storage.artifact_kinds import FILE_SUFFIXES, ArtifactKind
from lora_export.storage.atomic_output import LONGEST_NAME
from lora_export.storage.store_path import is_hub_address, newly_opened

# The files that are downloaded, without which a snapshot is not complete. Pickles and Python files can run code, and
# are not among them. Ignored are the same weights again, in another layout or at another step of the training.
PATTERNS: dict[str, Any] = {
    "allow_patterns": ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"],
    "ignore_patterns": ["consolidated*.safetensors", "original/*", "checkpoint-*", "onnx/*", "openvino/*"],
}
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)  # owner/name
WITH_REVISION = re.compile(rf"(?P<name>{HUB_NAME.pattern})(@(?P<revision>[\w./-]+))?", re.ASCII)
HUB_ADDRESS = re.compile(
    rf"hf://(?P<name>{HUB_NAME.pattern})(@(?P<revision>refs/[\w-]+/[\w.-]+|(?:[\w.-]|%2F)+))?(/(?P<path>.*))?", re.ASCII
)
# A name that ends so is that of a file, and none of the Hub's; there, names of repositories end in .gguf, for example.
FILES = {*FILE_SUFFIXES, ".py"}.difference(ArtifactKind.GGUF.suffixes, ArtifactKind.OPENVINO.suffixes)
WEIGHT_SUFFIXES = FILE_SUFFIXES - {".json", ".npz"}
OFFLINE = "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set. To download it, unset the variable"
CACHED = "models--"  # a model's folder in the cache: models--owner--name
SNAPSHOTS = "snapshots"  # the folder in it that has one for each commit


def download_snapshot(
    name: str, revision: str | None, on_message: Callable[[str], None], patterns: Mapping[str, Any] = PATTERNS
) -> Path:
    """Download what the cache lacks of a repository, and return the folder of the snapshot.

    `on_message` receives a line with the address. Raises InputRefused for a repository or revision that is missing or
    not open to this user; EnvironmentLacking without huggingface_hub or a
    connection; OutputFailed where the cache cannot be written.
    """
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError as error:
        raise EnvironmentLacking(
            f"{one_line(name)} needs huggingface_hub ({error}): pip install huggingface_hub"
        ) from error
    shown = _shown(name, revision)
    if constants.HF_HUB_OFFLINE:
        if (cached := _snapshot(name, revision, patterns)) is not None:
            return cached
        raise EnvironmentLacking(f"{shown} is not in the Hugging Face cache, and {OFFLINE}")
    endpoint = _without_credentials(constants.ENDPOINT)
    on_message(f"{shown}: downloading from {endpoint}")
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, tqdm_class=_bars(), **patterns))
    except Exception as error:  # the HTTP client's exceptions depend on the version of huggingface_hub
        raise _failure(name, shown, endpoint, error) from error


def _with_weights(folder: Path, name: str, revision: str | None) -> Path:
    """The folder. Raises InputRefused for one without a .safetensors file."""
    if not any(folder.rglob("*.safetensors")):
        raise InputRefused(
            f"{_shown(name, revision)} has no .safetensors file, and {named('download', True)} gets no other weights: "
            f"a pickle can run code. To get every file: {full_download(name, revision)}"
        )
    return folder


def _shown(name: str, revision: str | None) -> str:
    return one_line(name if revision is None else f"{name}@{revision}")


def _without_credentials(text: str) -> str:
    """A text without the user and password that addresses in it have."""
    return re.sub(r"//[^/@\s]+@", "//", text)


def full_download(name: str, revision: str | None) -> str:
    """The command of huggingface_hub that downloads every file."""
    return f"hf download {name}" + (f" --revision {revision}" if revision else "")


def _bars() -> type[Any] | None:
    """The class of the progress bars: huggingface_hub's own, and none where stderr is no terminal."""
    from huggingface_hub.utils.tqdm import tqdm

    class NoBar(tqdm):
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **{**options, "disable": True})  # type: ignore[no-untyped-call]

    return None if sys.stderr.isatty() else NoBar


def _failure(name: str, shown: str, endpoint: str, error: Exception) -> LoraExportError:
    """The error that describes why a download failed."""
    from huggingface_hub import errors

    match error:
        case errors.GatedRepoError():
            return InputRefused(
                f"{shown} is gated: accept its conditions at {endpoint}/{name}, and log in: hf auth login"
            )
        case errors.RepositoryNotFoundError():
            return InputRefused(
                f"{endpoint} has no repository {name}, or it is private. Check the name, or log in: hf auth login"
            )
        case errors.RevisionNotFoundError():
            return InputRefused(
                f"the repository {name} at {endpoint} has no revision {shown.partition('@')[2]}. In an hf:// address, "
                "%2F is a slash in its name"
            )
        case errors.HFValidationError():
            return InputRefused(f"{shown} is no name of a repository: {error}")
    known = isinstance(error, errors.HfHubHTTPError | errors.LocalEntryNotFoundError)
    if isinstance(error, OSError) and error.errno is not None and not known and not isinstance(error, ConnectionError):
        return OutputFailed(f"{shown} cannot be written into the Hugging Face cache: {error}")
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    reason = _without_credentials(str(cause).strip().partition("\n")[0])
    return EnvironmentLacking(
        f"the download of {shown} from {endpoint} failed ({type(cause).__name__}: {reason}). Check the connection. "
        "The same command downloads the files that are missing"
    )


def locate(source: str | Path, on_message: Callable[[str], None], download: bool = False) -> Path:
    """The path itself; or, where nothing is there and it is a name of the Hub, its snapshot in the cache.

    `on_message` receives a line that names the snapshot. With `download`, and for an address of the Hub, what the cache
    lacks is downloaded into it (see `download_snapshot`). Else InputRefused is raised, with the command that does it.
    """
    text = str(source)
    if is_hub_address(source):
        return _at_address(text, on_message)
    if Path(text).is_dir() and not os.access(text, os.R_OK | os.X_OK):
        raise InputRefused(f"{one_line(text)}: Permission denied")
    path = newly_opened(source)
    match = WITH_REVISION.fullmatch(text)
    if match is None or os.path.lexists(text) or Path(text).suffix in FILES:
        return path
    name, revision = match["name"], match["revision"]
    snapshot = _snapshot(name, revision)
    if download and (snapshot is None or _is_part(snapshot)):
        try:
            snapshot = _with_weights(download_snapshot(name, revision, on_message), name, revision)
        except (InputRefused, EnvironmentLacking):  # what is there may be all that the caller needs
            if snapshot is None:
                raise
    if snapshot is not None:
        on_message(f"{text}: the snapshot {snapshot.name} in the Hugging Face cache")
        return snapshot
    raise InputRefused(
        f"there is no file or folder {one_line(text)}, and the Hugging Face cache has no snapshot of that name. "
        f"To download it, add {named('download', True)}, or use: {full_download(name, revision)}"
    )


def _at_address(text: str, on_message: Callable[[str], None]) -> Path:
    """What an address names, in its snapshot: at the commit that the Hub has now; offline, that of the cache.

    Raises InputRefused where there is no such file or folder, and as `download_snapshot`.
    """
    match = HUB_ADDRESS.fullmatch(text)
    if match is None or not {".", ".."}.isdisjoint(text.split("/")):
        raise InputRefused(f"{one_line(text)} is no address of a model: hf://OWNER/NAME[@REVISION][/PATH]")
    name, below = match["name"], (match["path"] or "").strip("/")
    revision = None if match["revision"] is None else urllib.parse.unquote(match["revision"])
    patterns = PATTERNS
    if below:
        itself = glob.escape(below)  # it is no pattern
        patterns = {kind: [f"{itself}/{each}" for each in each_kind] for kind, each_kind in PATTERNS.items()}
        patterns["allow_patterns"].append(itself)
    snapshot = download_snapshot(name, revision, on_message, patterns)
    found = snapshot / below
    _refuse_part(found, _shown(name, revision), below)
    if not below:
        _with_weights(snapshot, name, revision)
    if not found.exists():
        raise InputRefused(f"the repository {_shown(name, revision)} has no {one_line(below)}")
    on_message(f"{text}: the snapshot {snapshot.name} in the Hugging Face cache")
    return found


def _refuse_part(found: Path, shown: str, below: str) -> None:
    """Raise EnvironmentLacking for what the cache has a part of, where the rest may not be downloaded.

    Raises InputRefused for an index that names other files than those below its folder.
    """
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        return
    lacking = sorted(one_line(path.relative_to(found).as_posix()) for path in _missing_shards(found))
    if not found.exists():
        lacking = [one_line(below)]
    elif not below and not lacking and not any(found.rglob("*.safetensors")):
        lacking = ["a .safetensors file"]
    if lacking:
        raise EnvironmentLacking(
            f"the Hugging Face cache has a part of {shown}, without {' and '.join(lacking)}, and {OFFLINE}"
        )


def _is_part(snapshot: Path) -> bool:
    """Whether a snapshot lacks shards, or has no weights at all, as where only a tokenizer was loaded."""
    has_weights = any(path.suffix in WEIGHT_SUFFIXES for path in snapshot.rglob("*"))
    return not has_weights or bool(_missing_shards(snapshot))


def _missing_shards(folder: Path) -> set[Path]:
    """The shards that indexes in a folder name, and that are not there."""
    indexes = [path for path in folder.rglob("*.safetensors.index.json") if path.is_file()]
    named = {index.parent / name for index in indexes for name in _shards_of(index)}
    return {path for path in named if not path.is_file()}


def _shards_of(index: Path) -> Iterable[str]:
    weight_map = json_files.read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    strange = [name for name in names if not isinstance(name, str) or not _is_below(name)]
    if strange:
        raise InputRefused(f"{index} may only name files below its folder, and names {ascii(strange[0])[:80]}")
    return names


def _is_below(name: str) -> bool:
    """Whether a name in an index is a relative path that a file can have."""
    parts = PurePosixPath(name).parts
    with contextlib.suppress(UnicodeEncodeError):
        fits = len(os.fsencode(name)) <= LONGEST_NAME and "\0" not in name
        return fits and bool(parts) and parts[0] != "/" and ".." not in parts
    return False


def hub_name(path: Path) -> str | None:
    """The name on the Hub of what is stored in a cache; None for every other path."""
    folders = path.absolute().parts
    names = (part.removeprefix(CACHED).replace("--", "/", 1) for part in folders if part.startswith(CACHED))
    return next(names, None)


def hub_source(path: Path) -> dict[str, str]:
    """Repository and commit of what is stored in a snapshot of a cache; empty for every other path."""
    folders = path.absolute().parts
    for number, folder in enumerate(folders[:-2]):
        if folder.startswith(CACHED) and folders[number + 1] == SNAPSHOTS:
            return {"repository": folder.removeprefix(CACHED).replace("--", "/", 1), "revision": folders[number + 2]}
    return {}


def _snapshot(name: str, revision: str | None, patterns: Mapping[str, Any] = PATTERNS) -> Path | None:
    """The folder of a snapshot; None where there is none, or no huggingface_hub, which makes the cache."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError:
        return None
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True, **patterns))
    except (LocalEntryNotFoundError, ValueError):  # ValueError: no name of the Hub
        return None
