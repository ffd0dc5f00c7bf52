"""Private names of PyTorch and transformers, each behind a function that states what it is needed for.

No public name does the same. A release may rename any of them: `tests/models/test_internals.py` then fails with the
name, and a user gets EnvironmentLacking with it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_map as tree_map

from lora_export.errors import EnvironmentLacking
from lora_export.layers.torch_internals import own_buffers as own_buffers
from lora_export.layers.torch_internals import own_parameters as own_parameters


def private(module: str, *names: str) -> Any:
    """An attribute of a module of another library. Raises EnvironmentLacking where this release has none."""
    found = importlib.import_module(module)
    for name in names:
        if not hasattr(found, name):
            library = module.partition(".")[0]
            version = importlib.import_module(library).__version__
            raise EnvironmentLacking(f"{library} {version} has no {'.'.join((module, *names))}, which is needed")
        found = getattr(found, name)
    return found


# --- PyTorch ---


def changes_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place: a program that changes its weights shows by it."""
    return int(tensor._version)


def schema_of(operator: Any) -> Any:
    """An operator's arguments and results, with which of them it writes into."""
    return operator._schema


def grouped_products() -> Callable[..., Tensor]:
    """What torch.nn.functional.grouped_mm calls: the products of experts, for which PyTorch has no fp64 kernel."""
    return private("torch", "_grouped_mm")  # type: ignore[no-any-return]


def script_archive(path: str) -> Any:
    """The reader of torch.jit.load: what checks a file must find the records that are loaded."""
    return private("torch", "_C", "PyTorchFileReader")(path)


def script_operators() -> set[str]:
    """The names of all operators that TorchScript can call in this PyTorch."""
    return {schema.name.partition("::")[2] for schema in private("torch", "_C", "_jit_get_all_schemas")()}


def compiler_errors() -> type[Exception]:
    """What torch.compile raises where it fails."""
    return private("torch._dynamo.exc", "TorchDynamoException")  # type: ignore[no-any-return]


def forget_kernels(operator: Any) -> None:
    """Let PyTorch look up again what computes an operator."""
    operator._dispatch_cache.clear()


# --- transformers ---


def is_stateful(module: object) -> bool:
    """Whether a model of transformers keeps a state, as Mamba and hybrids do. False for other modules."""
    return bool(getattr(module, "_is_stateful", False))


def fusions_for(provider: str) -> Iterator[tuple[Callable[[Any], Any], bool]]:
    """The rewrites into onnxruntime's operators for a provider, in order, and whether each makes GroupQueryAttention.

    transformers has one function for all of them, and takes a graph of one row alone for this operator.
    """
    module = "transformers.exporters.onnxruntime_fusions"
    attention = private(module, "_fuse_group_query_attention")
    for step, providers in private(module, "_STEPS"):
        if providers is None or provider in providers:
            yield step, getattr(step, "func", step) is attention
