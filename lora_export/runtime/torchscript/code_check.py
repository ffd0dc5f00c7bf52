"""Check the code of a TorchScript file before it is loaded: loading runs it (`__setstate__`).

The code in a file is text in a language whose grammar is a part of Python's. It is read with Python's own parser.
Everything that Python and PyTorch could read differently (comments, continued lines, prefixed strings) is refused:
`torch.jit.save` writes none of it.

The operators that are run are a closed list (`models/programs.json`), since the file is not trusted. It has no
operator that opens files (`from_file`, `save`), prints, starts threads, calls other machines, or places a tensor on
another's memory, and none of other libraries.

`torch.jit.load` has no such check, and a script may open files (`aten::from_file`). Scanners of pickles do not read the
code of a TorchScript file. So this check, and the process around it, have no library to take their place.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Collection, Iterator, Mapping

from lora_export.errors import InputRefused, one_line
from lora_export.models.pt2.prepared_graph import OPERATOR_NAMES, OPERATORS

PRIMITIVES, BUILTINS = OPERATOR_NAMES["primitives_of_scripts"], OPERATOR_NAMES["builtins_of_scripts"]


ON_TENSORS, ON_VALUES = OPERATOR_NAMES["tensors_of_scripts"], OPERATOR_NAMES["values_of_scripts"]
_TENSORS = OPERATORS | ON_TENSORS
SCRIPT_OPERATORS = _TENSORS | {f"{name}_" for name in _TENSORS if not name.endswith("_")} | ON_VALUES


# --- the check ---

PLAIN_STRING = re.compile(r"""(?!'''|\"{3})("(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')""")
OWN = "__torch__"  # begins the names of the file's own classes and functions
CUSTOM_CLASSES = "torch.classes"  # C++ objects, which pickles name and which have their own code
STATEMENTS = (
    *(ast.Module, ast.ClassDef, ast.FunctionDef, ast.Return, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.If),
    *(ast.While, ast.For, ast.With, ast.withitem, ast.Pass, ast.Break, ast.Continue, ast.Expr, ast.Assert, ast.Raise),
)
EXPRESSIONS = (
    *(ast.Call, ast.Attribute, ast.Name, ast.Subscript, ast.List, ast.Tuple, ast.Dict, ast.Constant, ast.BinOp),
    *(ast.UnaryOp, ast.Compare, ast.BoolOp, ast.IfExp, ast.Slice, ast.Starred, ast.ListComp, ast.comprehension),
    *(ast.keyword, ast.arguments, ast.arg, ast.expr_context, ast.operator, ast.unaryop, ast.cmpop, ast.boolop),
)


def check_code(sources: Mapping[str, str], registered: Collection[str]) -> None:
    """Refuse code that calls anything but the listed operators and its own functions. Nothing is run.

    `sources` are the code records of an archive by name. `registered` are the names of all operators of this PyTorch:
    a method of the file that has the name of an operator outside the list would hide calls of that operator.

    Raises InputRefused with the record, the line and the name.
    """
    trees = {name: _parsed(name, source) for name, source in sources.items()}
    methods = {node.name for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    hidden = sorted((methods & set(registered)) - SCRIPT_OPERATORS)
    if hidden:
        raise InputRefused(f"its code defines {hidden[0]!r}, the name of an operator that is not run from a file")
    for name, tree in trees.items():
        for line, problem in _problems(tree, methods):
            raise InputRefused(f"{one_line(name)}, line {line}: {one_line(problem)}")


def check_pickle(name: str, content: bytes) -> None:
    """Refuse a pickle record that names custom C++ classes: PyTorch's reader runs nothing else from it."""
    if CUSTOM_CLASSES.encode() in content:
        raise InputRefused(
            f"{one_line(name)} contains custom C++ classes ({CUSTOM_CLASSES}), which are not run from a file"
        )


def _parsed(name: str, source: str) -> ast.Module:
    try:
        _check_spelling(source)
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, tokenize.TokenError) as error:
        raise InputRefused(
            f"{one_line(name)}: not the code that torch.jit.save writes: {one_line(str(error))}"
        ) from error


def _check_spelling(source: str) -> None:
    """Raise ValueError for what PyTorch's lexer could read differently."""
    if strange := sorted({character for character in source if ord(character) < 32} - {"\n"}):
        raise ValueError(f"a control character {strange[0]!r}")
    backslashes = source.count("\\")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        where = f"in line {token.start[0]}"
        if token.type == tokenize.COMMENT:
            raise ValueError(f"a comment {where}")
        if token.type == tokenize.OP and token.string == ";":
            raise ValueError(f"a semicolon {where}")
        if token.type == tokenize.STRING:
            if not PLAIN_STRING.fullmatch(token.string):
                raise ValueError(f"a string with a prefix or of several lines {where}")
            backslashes -= token.string.count("\\")
        elif not token.string.isascii():
            raise ValueError(f"a name that is not ASCII {where}")
    if backslashes:
        raise ValueError("a line that is continued by a backslash")


def _own_functions(tree: ast.Module) -> set[str]:
    """Names that stand for nothing but functions of the file: `_1 = __torch__.torch.nn.functional.relu`."""
    is_own: dict[str, bool] = {}
    for node in ast.walk(tree):
        own = isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute) and _dotted(node.value)[0] == OWN
        for name in _bound_names(node):
            is_own[name] = own and is_own.get(name, True)
    return {name for name, own in is_own.items() if own}


def _bound_names(node: ast.AST) -> Iterator[str]:
    """The names that a node itself binds, without those that statements inside it bind."""
    if isinstance(node, ast.arg):
        yield node.arg
    targets = [getattr(node, "target", None), getattr(node, "optional_vars", None), *getattr(node, "targets", ())]
    for target in filter(None, targets):
        yield from (name.id for name in ast.walk(target) if isinstance(name, ast.Name))


def _problems(tree: ast.Module, methods: Collection[str]) -> Iterator[tuple[int, str]]:
    line, functions = 0, BUILTINS | _own_functions(tree)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", line)
        if not isinstance(node, (*STATEMENTS, *EXPRESSIONS)):
            yield line, f"{type(node).__name__} is not part of the code that is run from a file"
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.decorator_list:
            yield line, f"{node.name} has a decorator"
        if isinstance(node, ast.Attribute):
            yield from ((line, problem) for problem in _problem_of_name(node))
        if isinstance(node, ast.Call):
            yield from ((line, problem) for problem in _problem_of_call(node.func, functions, methods))


def _problem_of_name(node: ast.Attribute) -> Iterator[str]:
    """A dotted name that begins with `torch` or `ops` is an operator, called or not."""
    root, *rest = _dotted(node)
    if root == OWN and CUSTOM_CLASSES in ".".join(rest):
        yield f"{'.'.join((root, *rest))} is a custom C++ class, which is not run from a file"
    if root == "torch" and not (len(rest) == 1 and rest[0] in SCRIPT_OPERATORS):
        yield _refusal("torch", *rest)
    if root == "ops" and len(rest) > 1 and not (rest[0] == "prim" and rest[1] in PRIMITIVES):
        yield _refusal("ops", *rest)


def _problem_of_call(function: ast.expr, functions: Collection[str], methods: Collection[str]) -> Iterator[str]:
    if isinstance(function, ast.Name):
        if function.id not in functions:
            yield _refusal(function.id)
    elif isinstance(function, ast.Attribute):
        root = _dotted(function)[0]
        if root not in ("torch", "ops", OWN) and function.attr not in methods and function.attr not in SCRIPT_OPERATORS:
            yield _refusal(function.attr)
    else:
        yield "it calls a value, not a name"


def _refusal(*name: str) -> str:
    return f"{'.'.join(name)!r} is not among the operators that lora-export runs from a TorchScript file"


def _dotted(node: ast.expr) -> list[str]:
    """The parts of a dotted name, from its root. An empty first part: the root is no name."""
    if isinstance(node, ast.Name):
        return [node.id]
    return [*_dotted(node.value), node.attr] if isinstance(node, ast.Attribute) else [""]
