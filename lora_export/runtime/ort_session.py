"""Open an onnxruntime session on the requested provider and on no other. Needs neither PyTorch nor onnx."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from numpy.typing import NDArray

from lora_export.errors import EnvironmentLacking, InputRefused, RuntimeRefused
from lora_export.formats.onnx_adapter import import_onnxruntime
from lora_export.graph.onnx_file.protobuf_wire import refuse_no_message
from lora_export.options.spelling import command, named
from lora_export.runtime.environment_probes import PROVIDERS

LOG_ERRORS, LOG_FATAL = 3, 4  # onnxruntime's log severity levels
NOT_IN_BFLOAT16 = "Type 'tensor(bfloat16)' of input"  # ONNX has an operator, such as TopK, for other types alone
NO_OPTIONS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class InMemoryGraph:
    """A graph that is not a file. Its large tensors are beside its message, in memory or in files."""

    name: str  # what errors call it
    message: bytes  # a serialised ModelProto
    tensors: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # onnxruntime reads them without a copy
    folder: Path | None = None  # of the files that the message's external data names


def open_session(
    graph: Path | InMemoryGraph, provider: str, options: Any, provider_options: Mapping[str, str] = NO_OPTIONS
) -> Any:
    """An onnxruntime InferenceSession on `provider` (`cpu` or `cuda`).

    `options` are onnxruntime's SessionOptions; the tensors of an in-memory graph are added to them, and must live as
    long as the session. Raises InputRefused for an unknown provider and for what is no file, EnvironmentLacking where
    the provider is missing or does not load, and RuntimeRefused where onnxruntime refuses the graph.
    """
    ort, full_name = import_onnxruntime(), _available(provider)
    if isinstance(graph, Path):
        refuse_no_message(graph)
    if provider == "cuda" and hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find
            ort.preload_dlls()  # finds the CUDA and cuDNN libraries of torch's wheels
    name = graph.name if isinstance(graph, InMemoryGraph) else graph
    with raising_refusals(name), contextlib.redirect_stdout(sys.stderr):
        source = _with_tensors(graph, options) if isinstance(graph, InMemoryGraph) else _beside_its_data(graph)
        session = ort.InferenceSession(source, options, providers=[(full_name, dict(provider_options))])
    if full_name not in session.get_providers():
        raise EnvironmentLacking(
            f"{full_name} was requested and could not be loaded; onnxruntime would have used "
            f"{', '.join(session.get_providers())}. `{command('doctor', provider=provider)}` reports what is missing"
        )
    return session


class HeldSession:
    """A session that can be closed. It is opened at once, and again when it is needed."""

    def __init__(self, open_it: Callable[[], Any]):
        self._open_it = open_it
        self._session = open_it()

    def opened(self) -> Any:
        """The session. Raises as `open_session` does."""
        if self._session is None:
            self._session = self._open_it()
        return self._session

    def close(self) -> None:
        """Drop the session; its memory is free where no caller keeps it."""
        self._session = None


@contextlib.contextmanager
def raising_refusals(graph: Path | str) -> Iterator[None]:
    """Raise RuntimeRefused, with the graph's name, for whatever onnxruntime raises while active."""
    try:
        yield
    except Exception as error:  # onnxruntime's exceptions share no base class but this one
        message = str(error).strip()
        remedy = [f"Export the model in float16 ({named('dtype', 'float16')})"] if NOT_IN_BFLOAT16 in message else []
        raise RuntimeRefused(f"onnxruntime refused {graph}: {message}", *remedy) from error


def _available(provider: str) -> str:
    """The provider's full name. Raises where it is unknown, or this onnxruntime was built without it."""
    if provider not in PROVIDERS:
        raise InputRefused(f"unknown provider {provider!r}; known: {', '.join(PROVIDERS)}")
    ort, full_name = import_onnxruntime(), PROVIDERS[provider]
    if full_name not in ort.get_available_providers():
        raise EnvironmentLacking(
            f"this onnxruntime ({ort.__version__}) has no {full_name}: pip install onnxruntime-gpu "
            "(and uninstall onnxruntime, which would shadow it)"
        )
    return full_name


def _beside_its_data(graph: Path) -> str:
    """The path of a graph, or of the graph that a link leads to: there is its data.

    In a Hugging Face cache a link leads to a blob, whose name is a hash, and the data has a link beside this one.
    """
    target = graph.resolve()
    return str(target if target.suffix == graph.suffix else graph.absolute())


def _with_tensors(graph: InMemoryGraph, options: Any) -> bytes:
    """The graph's message; its tensors are made known to the options."""
    if graph.folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.folder))
    if graph.tensors:
        values = [import_onnxruntime().OrtValue.ortvalue_from_numpy(array) for array in graph.tensors.values()]
        options.add_external_initializers(list(graph.tensors), values)
    return graph.message
