"""The tests mirror the package, import no other test file, and have short names."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from support import ROOT, offenders

TESTS = ROOT / "tests"
PACKAGE = ROOT / "lora_export"
# Folders that test more than one folder of the package, or hold what tests share.
OF_THE_WHOLE = {"benchmarks", "defects", "fuzz", "hostile", "house", "matrix", "mutants", "support"}
MOST_WORDS = 12
FILES = sorted(TESTS.rglob("*.py"))
TEST_FILES = [path for path in FILES if path.name.startswith("test_")]


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def relative(path: Path) -> str:
    return path.relative_to(TESTS).as_posix()


def names_of_tests(tree: ast.AST) -> list[str]:
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return [function.name for function in functions if function.name.startswith("test_")]


def too_long(names: list[str]) -> list[str]:
    return [name for name in names if len(name.removeprefix("test_").split("_")) > MOST_WORDS]


def repeated(names: list[str]) -> list[str]:
    return [name for name, times in Counter(names).items() if times > 1]


def imported(tree: ast.AST) -> Iterator[str]:
    """Every part of the names of the modules that a file imports, and the names that it imports from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            for name in [*names, getattr(node, "module", None) or ""]:
                yield from name.split(".")


def test_names_are_short_and_no_test_file_is_imported() -> None:
    stems, faults = {file.stem for file in TEST_FILES}, {}
    for path in FILES:
        tree = tree_of(path)
        names = names_of_tests(tree) if path in TEST_FILES else []
        faults[relative(path)] = [*too_long(names), *repeated(names), *(stems & set(imported(tree)))]
    assert len(faults) > 300 and offenders(faults) == {}


def test_every_folder_of_tests_is_a_folder_of_the_package() -> None:
    folders = {path.parent.relative_to(TESTS) for path in TEST_FILES}
    assert {str(folder) for folder in folders if not (PACKAGE / folder).is_dir()} <= OF_THE_WHOLE


def test_long_and_repeated_names_and_imports_are_found() -> None:
    long = "test_" + "_".join("abcdefghijklm")
    assert names_of_tests(ast.parse(f"def {long}(): ...\ndef helper(): ...\nclass A:\n def test_b(self): ...")) == [
        long,
        "test_b",
    ]
    assert too_long([long, long[:-2]]) == [long] and repeated(["test_a", "test_b", "test_a"]) == ["test_a"]
    tree = ast.parse("from house.test_x import helper\nimport formats.test_peft\nfrom . import test_y")
    assert {"test_x", "test_peft", "test_y"} <= set(imported(tree))
