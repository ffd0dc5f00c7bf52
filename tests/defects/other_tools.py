"""How other tools decide whether two sets of outputs are the same, with their default settings.

Each gets PyTorch's outputs and the candidate's, and returns whether it accepts the candidate.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]
Tool = Callable[[Arrays, Arrays], bool]


def polygraphy(expected: Arrays, candidate: Arrays) -> bool:
    """`Comparator.compare_accuracy`: every element within 1e-5 absolute or 1e-5 relative."""
    comparator = importlib.import_module("polygraphy.comparator")
    results = comparator.RunResults()
    for name, arrays in (("pytorch", expected), ("candidate", candidate)):
        results.add([comparator.IterationResult(outputs=dict(arrays), runner_name=name)], runner_name=name)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        try:
            return bool(comparator.Comparator.compare_accuracy(results))
        except importlib.import_module("polygraphy.exception").PolygraphyException:
            return False


def assert_close(expected: Arrays, candidate: Arrays) -> bool:
    """`torch.testing.assert_close` on all outputs: for fp32, 1e-5 + 1.3e-6 times the value."""
    as_tensors = [{name: torch.tensor(a) for name, a in outputs.items()} for outputs in (candidate, expected)]
    try:
        torch.testing.assert_close(*as_tensors)
    except AssertionError:
        return False
    return True


def optimum(expected: Arrays, candidate: Arrays) -> bool:
    """The rule of optimum-onnx's `validate_model_outputs`: for each output that the graph has, shape and `allclose`.

    Its function also runs the model and the graph, on one set of inputs. Its command line turns a failure into a
    warning: the export has succeeded.
    """
    atol = importlib.import_module("optimum.exporters.base").ExporterConfig.ATOL_FOR_VALIDATION
    return set(candidate) <= set(expected) and all(
        candidate[name].shape == expected[name].shape and np.allclose(expected[name], candidate[name], atol=atol)
        for name in candidate
    )


TOOLS: dict[str, tuple[str, Tool]] = {
    "Polygraphy": ("polygraphy", polygraphy),
    "assert_close": ("torch", assert_close),
    "optimum": ("optimum-onnx", optimum),
}


def present() -> Iterator[tuple[str, Tool]]:
    """The tools that are installed."""
    for name, (package, tool) in TOOLS.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(package)
            yield name, tool


def versions() -> str:
    return ", ".join(f"{TOOLS[name][0]} {importlib.metadata.version(TOOLS[name][0])}" for name, _ in present())
