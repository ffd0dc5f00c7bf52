"""How others decide whether two sets of outputs are the same, as they ship: nothing is tuned, for or against them.

Each gets PyTorch's outputs, the candidate's, and answers whether it would let the candidate pass.
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
Rival = Callable[[Arrays, Arrays], bool]


def polygraphy(expected: Arrays, given: Arrays) -> bool:
    """`Comparator.compare_accuracy`, which compares element by element: 1e-5 absolute or 1e-5 relative will do."""
    comparator = importlib.import_module("polygraphy.comparator")
    results = comparator.RunResults()
    for name, arrays in (("pytorch", expected), ("candidate", given)):
        results.add([comparator.IterationResult(outputs=dict(arrays), runner_name=name)], runner_name=name)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        try:
            return bool(comparator.Comparator.compare_accuracy(results))
        except importlib.import_module("polygraphy.exception").PolygraphyException:
            return False


def assert_close(expected: Arrays, given: Arrays) -> bool:
    """`torch.testing.assert_close` on all outputs: for fp32, 1e-5 + 1.3e-6 times the value."""
    try:
        torch.testing.assert_close(*({name: torch.tensor(a) for name, a in side.items()} for side in (given, expected)))
    except AssertionError:
        return False
    return True


def optimum(expected: Arrays, given: Arrays) -> bool:
    """The rule of optimum-onnx's `validate_model_outputs`: for each output that the graph has, shape and `allclose`.

    Its function runs the model and the graph itself, on one set of inputs; this is what it does with the outputs.
    A failure is an exception there, and its command line makes a warning of it: the export has succeeded.
    """
    atol = importlib.import_module("optimum.exporters.base").ExporterConfig.ATOL_FOR_VALIDATION
    return set(given) <= set(expected) and all(
        given[name].shape == expected[name].shape and np.allclose(expected[name], given[name], atol=atol)
        for name in given
    )


RIVALS: dict[str, tuple[str, Rival]] = {
    "Polygraphy": ("polygraphy", polygraphy),
    "assert_close": ("torch", assert_close),
    "optimum": ("optimum-onnx", optimum),
}


def present() -> Iterator[tuple[str, Rival]]:
    """Those that are installed here."""
    for name, (package, rival) in RIVALS.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(package)
            yield name, rival


def versions() -> str:
    return ", ".join(f"{RIVALS[name][0]} {importlib.metadata.version(RIVALS[name][0])}" for name, _ in present())
