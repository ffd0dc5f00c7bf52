"""The stacked parameters of the classes of experts in the installed transformers, read from their source."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import transformers.models

STACKED = 3  # dimensions


class ExpertsClass(NamedTuple):
    """A class of experts."""

    package: str  # of `transformers.models`
    name: str
    parameters: tuple[str, ...]  # of three dimensions, in the order in which they are registered
    is_transposed: bool  # by its decorator


@functools.cache
def classes_of_experts() -> list[ExpertsClass]:
    """Every class whose name ends with Experts and that has parameters of three dimensions."""
    found = []
    for file in sorted(Path(next(iter(transformers.models.__path__))).glob("*/modeling_*.py")):
        source = file.read_text(encoding="utf-8")
        for node in ast.parse(source).body if "Experts" in source else ():
            if isinstance(node, ast.ClassDef) and node.name.endswith("Experts"):
                parameters = tuple(_stacked(node))
                found += [ExpertsClass(file.parent.name, node.name, parameters, _is_transposed(node))] * bool(
                    parameters
                )
    return found


def _stacked(cls: ast.ClassDef) -> Iterator[str]:
    """The names X of `self.X = nn.Parameter(torch.empty(experts, out, in))`."""
    for node in ast.walk(cls):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            call = node.value
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("Parameter") and call.args:
                made = call.args[0]
                if isinstance(made, ast.Call) and len(_sizes(made)) == STACKED:
                    yield node.targets[0].attr


def _sizes(made: ast.Call) -> list[ast.expr]:
    first = made.args[0] if made.args else None
    return first.elts if isinstance(first, ast.Tuple) else made.args


def _is_transposed(cls: ast.ClassDef) -> bool:
    keywords = [keyword for one in cls.decorator_list if isinstance(one, ast.Call) for keyword in one.keywords]
    return any(word.arg == "is_transposed" and ast.unparse(word.value) == "True" for word in keywords)
