"""One name, one definition: what a module defines at its top has a name of its own in the package."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator

from support import ROOT

MODULES = sorted((ROOT / "lora_export").rglob("*.py"))
# Used with the name of their module in front: `peft.read`, `onnx_adapter.write`, `page.of_proof`.
OF_EACH_MODULE = {
    *("read", "recognises", "foreign_keys", "write", "DESCRIPTION", "OF_PIPELINES"),
    "main",
    *("SUFFIX", "PURPOSE", "require", "of_proof", "of_error"),
    *("IS_TRACE", "RUNTIME", "writer", "runner_of_file"),
}


def definitions(tree: ast.Module) -> Iterator[str]:
    """The names of the classes, functions, constants and types that a module defines for others."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = (part for target in targets for part in ast.walk(target))
            yield from (name.id for name in names if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store))


def repeated(modules: dict[str, str]) -> dict[str, list[str]]:
    """Name -> the modules that define it, where there are several. Names for the module itself are left out."""
    homes = defaultdict(list)
    for module, source in modules.items():
        for name in {name for name in definitions(ast.parse(source)) if not name.startswith("_")}:
            homes[name].append(module)
    return {name: found for name, found in homes.items() if len(found) > 1 and name not in OF_EACH_MODULE}


def test_no_name_is_defined_twice() -> None:
    assert repeated({str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in MODULES}) == {}


def test_repeated_names_are_found() -> None:
    one = "class A: ...\nB = 1\ndef c(): ...\nD: int = 2\nE, F = 1, 2\n_private = 0\ndef read(): ..."
    for name, other in {"A": "A = int", "B": "B: int = 2", "c": "c = len", "D": "class D: ...", "F": "F = 1"}.items():
        assert repeated({"one": one, "other": other}) == {name: ["one", "other"]}
    assert repeated({"one": one, "other": "_private = 1\ndef read(): ...\ndef g():\n    B = 1"}) == {}
