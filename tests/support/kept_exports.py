"""Equal models are exported once a run: what the exporters return is kept in a folder that all workers share.

The exporters are PyTorch's and transformers' own, and take most of the time of the tests that need a graph. The package
runs as always: it gives them the module and its inputs, and simplifies, names and checks what comes back. An export is
known by all that goes in: the module with its settings and code, the inputs, the options. It is not optimised: of the
parameters, it depends on shapes and kinds, not on numbers. A kept graph gets those of the module. Whatever cannot be
pickled is exported anew. A test that is about the exporters themselves is marked `exports`, and gets no kept graph.

What the package's `simplify` makes of a kept graph is kept beside it, and so are the sizes at which a module's code
branches: they depend on no weight's numbers either.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import io
import json
import pickle
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn

from lora_export.graph.exporter_names import FOLDED_FROM
from lora_export.models import export as package_export
from lora_export.models import traced_lengths

MOST_NUMBERS = 2_000_000  # of a model that is kept
LIBRARIES = ("site-packages", sys.base_prefix)
OF_LOADING = ("model_type", "_original_object_hash")  # in a config: from its class, and a number of this process
use = SimpleNamespace(folder=None, place=None)  # where graphs are kept; the first is None for a test that gets none


class NotKeptError(Exception):
    """Not all that goes into an export can be told."""


def of_library(obj: Any) -> bool:
    """Whether a class or function is the one that its module has under its name, and the module is installed."""
    module = sys.modules.get(obj.__module__)
    found = functools.reduce(lambda place, name: getattr(place, name, None), obj.__qualname__.split("."), module)
    file = getattr(module, "__file__", None) or LIBRARIES[0]
    return found is obj and any(place in file for place in LIBRARIES)


KEPT = "kept export"  # in the metadata of a graph: where it is kept, and the module whose weights it has
TOLD = repr  # stands before what is told of a class or function: nobody reads what is pickled


class Contents(pickle.Pickler):
    """Writes what objects contain: tensors by numbers and what they share, classes and functions by their code.

    Of the tensors in `weights`, the numbers are left out: only which tensors have equal numbers is written.
    """

    def __init__(self, file: io.BytesIO, weights: Iterable[Tensor] = ()) -> None:
        super().__init__(file, protocol=5)
        self.fast = True  # which objects are the same one differs between processes
        self.weights, self.equal = set(map(id, weights)), dict[str, int]()
        self.storages: dict[int, int] = {}
        self.told: dict[int, object] = {}

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, set | frozenset):
            return sorted(map(repr, obj))  # their order differs between processes
        if isinstance(obj, str) and obj.startswith("/"):
            return "a path"  # a config of transformers has the one that it was read from
        if not isinstance(obj, Tensor):
            return None
        if type(obj) not in (Tensor, nn.Parameter) or obj.layout != torch.strided or obj.is_meta:
            raise NotKeptError
        storage = self.storages.setdefault(obj.untyped_storage().data_ptr(), len(self.storages))
        numbers = obj.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        content = hashlib.sha256(numbers).hexdigest()
        told = self.equal.setdefault(content, len(self.equal)) if id(obj) in self.weights else content
        kind = (type(obj).__name__, str(obj.dtype), str(obj.device), tuple(obj.shape), obj.requires_grad)
        return (*kind, storage, obj.storage_offset(), obj.stride(), told)

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.export.ExportedProgram):  # one export inside another, which is kept
            raise NotKeptError
        if not isinstance(obj, FunctionType | type):
            is_config = hasattr(obj, "to_json_string")
            kept = {name: value for name, value in vars(obj).items() if name not in OF_LOADING} if is_config else {}
            return (TOLD, (type(obj), kept)) if is_config else NotImplemented
        name = obj.__module__, obj.__qualname__
        if id(obj) in self.told:  # a class is in the closures of its own methods
            return TOLD, name
        self.told[id(obj)] = obj
        if of_library(obj):
            return TOLD, (*name, code(getattr(obj, "forward", None)))
        if isinstance(obj, type):
            return TOLD, (*name, obj.__bases__, {key: each for key, each in vars(obj).items() if callable(each)})
        cells = [cell.cell_contents for cell in obj.__closure__ or ()]
        return TOLD, (*name, code(obj), source_of(obj), obj.__defaults__, obj.__kwdefaults__, cells)


def source_of(function: FunctionType) -> bytes:
    file = Path(function.__code__.co_filename)
    return hashlib.sha256(file.read_bytes()).digest() if file.is_file() else b""


def code(function: object) -> tuple[object, ...]:
    found = getattr(function, "__code__", function)
    if not isinstance(found, CodeType):
        return ()
    return found.co_code, found.co_names, [code(each) or repr_of(each) for each in found.co_consts]


def repr_of(value: object) -> object:
    return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)


def key(attribute: str, args: tuple[Any, ...], options: object) -> str | None:
    """What tells an export from all others, or None."""
    content = io.BytesIO()
    module = module_of(args)
    weights = () if module is None else module.parameters()
    modes = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled())
    try:
        Contents(content, weights).dump((attribute, args, options, modes))
    except Exception:  # noqa: BLE001  whatever objects raise that nobody meant to pickle
        return None
    return hashlib.sha256(content.getvalue()).hexdigest()


def module_of(args: tuple[Any, ...]) -> nn.Module | None:
    return next((each for each in args if isinstance(each, nn.Module)), None)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return dict((*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)))


def weight(value: ir.Value, tensor: Tensor) -> ir.TensorProtocol:
    """The module's tensor as a graph has it: `simplify` stores some transposed, and marks these."""
    own = ir.tensor(tensor.detach(), name=value.name)
    return ir.Tensor(own.numpy().T, dtype=own.dtype, name=own.name) if FOLDED_FROM in value.metadata_props else own


def save(graph: ir.Model, path: Path, module: nn.Module) -> None:
    """Keep a graph in which each weight is the module's tensor of its name: another module's can take its place."""
    tensors = tensors_of(module)
    for name, value in graph.graph.initializers.items():
        kept = value.const_value
        assert kept is not None
        assert name not in tensors or kept.tobytes() == weight(value, tensors[name]).tobytes(), name
    ir.save(graph, path.with_suffix(".part"), format="protobuf")
    path.with_suffix(".part").replace(path)


def load(path: Path, module: nn.Module) -> ir.Model:
    """A kept graph. Its weights are the module's own tensors, and its constants arrays, as in an export."""
    model, tensors = ir.load(path, format="protobuf"), tensors_of(module)
    model.meta[KEPT] = path, module
    for name, value in model.graph.initializers.items():
        kept = value.const_value
        assert kept is not None
        if name in tensors:
            value.const_value = weight(value, tensors[name])
        else:
            value.const_value = ir.Tensor(kept.numpy().copy(), dtype=kept.dtype, name=name)
    return model


def keeping(export: Callable[..., Any], attribute: str, arguments: int) -> Callable[..., Any]:
    """The exporter, which looks first among what was kept. `attribute` of what it returns is the graph.

    A call that has not this number of arguments without a name is none of the package's.
    """

    @functools.wraps(export)
    def exported(*args: Any, **options: Any) -> Any:
        module = module_of(args)
        name = None
        if use.folder is not None and module is not None and len(args) == arguments and "f" not in options:
            small = sum(each.numel() for each in module.parameters()) < MOST_NUMBERS
            name = key(attribute, args, options) if small else None
        if name is None:
            return export(*args, **options)
        assert isinstance(module, nn.Module)
        path = use.folder / f"{name}.onnx"
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                save(getattr(export(*args, **options), attribute), path, module)
        return SimpleNamespace(**{attribute: load(path, module)})

    return exported


def keeping_simplified(simplify: Callable[[ir.Model], None]) -> Callable[[ir.Model], None]:
    """`simplify`, which looks first among what was kept."""

    @functools.wraps(simplify)
    def simplified(model: ir.Model) -> None:
        if KEPT not in model.meta:
            return simplify(model)
        path, module = model.meta.pop(KEPT)
        place = path.with_suffix(".simplified")
        with FileLock(path.with_suffix(".lock")):
            if not place.exists():
                simplify(model)
                return save(model, place, module)
        model.graph = load(place, module).graph
        return model.functions.clear()

    return simplified


def keeping_sizes(sizes_of_branches: Callable[..., Any]) -> Callable[..., Any]:
    """`_sizes_of_branches`, which looks first among what was kept."""

    @functools.wraps(sizes_of_branches)
    def kept(model: Any, axes: Any) -> Any:
        name = None if use.folder is None else key("sizes", (model.module, model.example_inputs(), axes), None)
        if name is None:
            return sizes_of_branches(model, axes)
        place = use.folder / f"{name}.sizes"
        with FileLock(place.with_suffix(".lock")):
            if not place.exists():
                place.write_text(json.dumps(sizes_of_branches(model, axes)))
            return {symbol: tuple(bounds) for symbol, bounds in json.loads(place.read_text()).items()}

    return kept


@functools.cache
def folder(config: pytest.Config) -> Path:
    """The folder of this run, for all workers."""
    own: Path = config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
    place = (own.parent if hasattr(config, "workerinput") else own) / "kept-exports"
    place.mkdir(exist_ok=True)
    return place


@functools.cache
def install() -> None:
    """Exports of this process are kept from now on."""
    torch.onnx.export = keeping(torch.onnx.export, "model", 1)
    package_export.simplify = keeping_simplified(package_export.simplify)
    traced_lengths._sizes_of_branches = keeping_sizes(traced_lengths._sizes_of_branches)
    with contextlib.suppress(ImportError):
        transformers: Any = importlib.import_module("transformers.exporters.exporter_onnx")
        transformers.OnnxExporter.export = keeping(transformers.OnnxExporter.export, "program", 3)
