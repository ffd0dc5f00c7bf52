"""Downloads from the Hugging Face Hub into the local cache, by huggingface_hub. Weights and their JSON, no code.

huggingface_hub reads HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE, shows the progress on a terminal, and asks again where a
connection breaks. The cache keeps the files that are complete.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_export.errors import EnvironmentLacking, InputRefused, LoraExportError, OutputFailed, one_line
from lora_export.options.spelling import named

# Pickles and Python files can run code. They are not in this list.
WANTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
# The same weights again, in another layout or at another step of the training.
UNWANTED = ("consolidated*.safetensors", "original/*", "checkpoint-*", "onnx/*", "openvino/*")


def download(name: str, revision: str | None, on_message: Callable[[str], None]) -> Path:
    """Download what the cache lacks of a repository, and return the folder of the snapshot.

    `on_message` receives a line with the address. Raises InputRefused for a repository or revision that is missing or
    not open to this user, and for one without a .safetensors file; EnvironmentLacking without huggingface_hub or a
    connection; OutputFailed where the cache cannot be written.
    """
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError as error:
        raise EnvironmentLacking(
            f"{named('download', True)} needs huggingface_hub ({error}): pip install huggingface_hub"
        ) from error
    shown = one_line(name if revision is None else f"{name}@{revision}")
    if constants.HF_HUB_OFFLINE:
        raise EnvironmentLacking(
            f"{shown} is not in the Hugging Face cache, and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set. To download "
            "it, unset the variable"
        )
    on_message(f"{shown}: downloading from {constants.ENDPOINT}")
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED), tqdm_class=_bars()
            )
        )
    except Exception as error:  # the HTTP client's exceptions depend on the version of huggingface_hub
        raise _failure(name, shown, constants.ENDPOINT, error) from error
    if not any(folder.rglob("*.safetensors")):
        raise InputRefused(
            f"{shown} has no .safetensors file, and {named('download', True)} gets no other weights: a pickle can "
            f"run code. To get every file: {full_download(name, revision)}"
        )
    return folder


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
            return InputRefused(f"the repository {name} at {endpoint} has no revision {shown.partition('@')[2]}")
        case errors.HFValidationError():
            return InputRefused(f"{shown} is no name of a repository: {error}")
    known = isinstance(error, errors.HfHubHTTPError | errors.LocalEntryNotFoundError)
    if isinstance(error, OSError) and error.errno is not None and not known and not isinstance(error, ConnectionError):
        return OutputFailed(f"{shown} cannot be written into the Hugging Face cache: {error}")
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    reason = str(cause).strip().partition("\n")[0]
    return EnvironmentLacking(
        f"the download of {shown} from {endpoint} failed ({type(cause).__name__}: {reason}). Check the connection. "
        "The same command downloads the files that are missing"
    )
