"""Small faults in a program: where they can be put, how some are chosen, and how they are found after code has moved.

A mutant is known by its statement, the function around it, the kind of the change and its place among the changes of
this kind in the statement. Its file, and the statements before and after it, only help to choose between equal ones.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import random
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

INSTEAD: dict[type[ast.AST], type[ast.AST]] = dict(
    [
        *((ast.Lt, ast.LtE), (ast.LtE, ast.Lt), (ast.Gt, ast.GtE), (ast.GtE, ast.Gt), (ast.Eq, ast.NotEq)),
        *((ast.NotEq, ast.Eq), (ast.Is, ast.IsNot), (ast.IsNot, ast.Is), (ast.In, ast.NotIn), (ast.NotIn, ast.In)),
        *((ast.And, ast.Or), (ast.Or, ast.And), (ast.Add, ast.Sub), (ast.Sub, ast.Add), (ast.Mult, ast.Add)),
        *((ast.Div, ast.Mult), (ast.FloorDiv, ast.Mult), (ast.Mod, ast.FloorDiv), (ast.Pow, ast.Mult)),
        *((ast.Break, ast.Continue), (ast.Continue, ast.Break)),
    ]
)
# Calls that only tell a user something.
TALK = re.compile(r"\b(logging|_?logger|warnings|echo|print|console|_?\w*notes?(_\w+)?|_?noted(_\w+)?)\b")
# Arguments without which a right program usually does the same.
QUIET = {"frozen", "slots", "strict", "help", "encoding", "newline", "stacklevel", "repr", "metavar", "daemon"}
STRINGS = re.compile(r"""(?:\b[rbfu]{1,2})?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""", re.IGNORECASE)
QUALIFIERS = re.compile(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])")
LEAST = 3  # mutants a folder
NEAR = 3  # statements before and after that help to know one
UNIQUE = 20  # letters of a statement that is known without its function


@dataclass(frozen=True)
class Mutant:
    file: str
    function: str
    statement: str
    kind: str
    position: int  # among the changes of this kind in the statement
    repeat: int  # among equal ones in the function
    around: tuple[str, ...]  # hashes of the statements before and after
    change: str = ""  # for readers alone

    @property
    def id(self) -> str:
        known_by = (self.file, self.function, self.statement, self.kind, self.position, self.repeat)
        return hashlib.sha256(repr(known_by).encode()).hexdigest()[:10]

    @property
    def folder(self) -> str:
        return str(PurePosixPath(self.file).parent)


@dataclass(frozen=True)
class Site:
    """A place in the present program where a mutant can be put."""

    mutant: Mutant
    old: ast.AST = field(compare=False)
    new: ast.AST = field(compare=False)
    lines: range
    at_import: bool  # the statement runs when its module is imported, before any test

    @property
    def change(self) -> str:
        return f"{_short(self.old)} -> {_short(self.new)}"


def _short(node: ast.AST) -> str:
    return re.sub(r"\s+", " ", ast.unparse(node))[:100]


# --- where ---


def sites(source: str, file: str) -> list[Site]:
    return _sites(ast.parse(source), file)


def _sites(tree: ast.Module, file: str) -> list[Site]:
    found: list[tuple[int, str, bool, str, int, ast.AST, ast.AST]] = []
    texts: list[str] = []
    for statement, function, at_import in _statements(tree.body, "", True):
        text = _header(statement)
        seen: Counter[str] = Counter()
        for kind, old, new in (change for node in _nodes(statement) for change in _changes(node)):
            found.append((len(texts), function, at_import, kind, seen[kind], old, new))
            seen[kind] += 1
        texts.append(text)
    hashes = [f"{zlib.crc32(_loose(text).encode()):08x}" for text in texts]
    repeats: Counter[Any] = Counter()
    made = []
    for number, function, at_import, kind, position, old, new in found:
        key = (function, texts[number], kind, position)
        near = (*hashes[max(0, number - NEAR) : number], *hashes[number + 1 : number + 1 + NEAR])
        mutant = Mutant(file, function, texts[number], kind, position, repeats[key], near)
        repeats[key] += 1
        made.append(Site(mutant, old, new, range(old.lineno, old.end_lineno + 1), at_import))
    return made


def _statements(body: Iterable[ast.AST], function: str, at_import: bool) -> Iterator[tuple[ast.AST, str, bool]]:
    """Every statement, with the name of the function or class around it. A `case` counts as a statement."""
    for node in body:
        if isinstance(node, ast.stmt | ast.match_case):
            if _is_not_run(node):
                yield from _statements(getattr(node, "orelse", []), function, at_import)
                continue
            yield node, function, at_import
        inner, later = function, at_import
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if TALK.fullmatch(node.name):
                continue
            inner, later = node.name, at_import and isinstance(node, ast.ClassDef)
        below = (part for part in ast.iter_child_nodes(node) if _is_block(part))
        yield from _statements(below, inner, later)


def _is_block(node: ast.AST) -> bool:
    return isinstance(node, ast.stmt | ast.match_case | ast.excepthandler)


def _is_not_run(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test) or "__name__" in ast.unparse(node.test)
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"


def _header(statement: ast.AST) -> str:
    """The text of a statement without those inside it."""
    alone = copy.copy(statement)
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        if hasattr(alone, name):
            setattr(alone, name, [])
    if isinstance(alone, ast.Try):
        return "try:"
    return ast.unparse(alone)


def _nodes(statement: ast.AST) -> Iterator[ast.AST]:
    """What belongs to a statement itself, but for annotations, texts, and what only tells a user something."""
    yield statement
    if isinstance(statement, ast.Raise):
        return
    waiting = [statement]
    while waiting:
        node = waiting.pop()
        if node is not statement:
            yield node
        for name, value in reversed(list(ast.iter_fields(node))):
            parts = value if isinstance(value, list) else [value]
            waiting += [part for part in reversed(parts) if isinstance(part, ast.AST) and _is_read(node, name, part)]


def _is_read(parent: ast.AST, name: str, node: ast.AST) -> bool:
    if _is_block(node) or name in ("annotation", "returns", "pattern"):
        return False
    match node:
        case ast.JoinedStr():
            return False
        case ast.Call():
            return not TALK.search(ast.unparse(node.func))
        case ast.keyword():
            return node.arg not in QUIET
        case ast.Subscript():
            return ast.unparse(node.value).split(".")[-1] not in ("Literal", "Annotated", "Callable")
    return not (isinstance(parent, ast.Slice) and isinstance(node, ast.Constant))


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    """The changes of one node: their kind, the node that goes, and what takes its place."""
    match node:
        case ast.Compare():
            for place, operator in enumerate(node.ops):
                changed = [*node.ops[:place], INSTEAD[type(operator)](), *node.ops[place + 1 :]]
                yield "comparison", node, _with(node, ops=changed)
        case ast.BoolOp():
            yield "and, or", node, _with(node, op=INSTEAD[type(node.op)]())
        case ast.BinOp() | ast.AugAssign() if type(node.op) in INSTEAD:
            operands = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.value]
            if not any(map(_is_text, operands)):
                yield "arithmetic", node, _with(node, op=INSTEAD[type(node.op)]())
        case ast.Constant(value=bool(value)):
            yield "constant", node, ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield "constant", node, ast.Constant(value + 1 if isinstance(value, int) else 2 * value or 1.0)
        case ast.UnaryOp(op=ast.Not()):
            yield "not", node, node.operand
        case ast.Return(value=ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            yield "return", node, ast.Return(ast.Constant(None))
        case ast.If():
            for last in node.body[-1:]:
                if isinstance(last, ast.Raise):
                    yield "raise", last, ast.Pass()
        case ast.Call():
            for dropped in node.keywords:
                if dropped.arg and dropped.arg not in QUIET:
                    yield "keyword", node, _with(node, keywords=[each for each in node.keywords if each is not dropped])
        case ast.Slice():
            for bound, operator in ((node.lower, ast.Add()), (node.upper, ast.Sub())):
                if bound and not _is_text(bound):
                    yield "slice", bound, ast.BinOp(bound, operator, ast.Constant(1))
        case ast.Break() | ast.Continue():
            yield "jump", node, INSTEAD[type(node)]()


def _is_text(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return _is_text(node.left) or _is_text(node.right)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str | bytes))


def _with(node: ast.AST, **fields: Any) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def mutated(source: str, site: Site) -> str:
    """The source with the one change. The rest keeps its text."""
    new = ast.unparse(site.new)
    if isinstance(site.old, ast.expr):
        new = f"({new})"
    lines = source.encode().split(b"\n")  # columns count bytes
    first, last = site.old.lineno - 1, site.old.end_lineno - 1
    before, after = lines[first][: site.old.col_offset], lines[last][site.old.end_col_offset :]
    return b"\n".join([*lines[:first], before + new.encode() + after, *lines[last + 1 :]]).decode()


class _Probes(ast.NodeTransformer):
    def __init__(self, wanted: Iterable[Site]) -> None:
        self._at: defaultdict[ast.AST, list[str]] = defaultdict(list)
        self._at_import: list[str] = []  # no test runs their statements: those that enter the module are taken
        for site in wanted:
            self._at[site.old].append(site.mutant.id)
            if site.at_import:
                self._at_import.append(site.mutant.id)

    def visit(self, node: ast.AST) -> Any:
        names = self._at.get(node, [])
        self.generic_visit(node)
        if isinstance(node, ast.FunctionDef):
            node.body[:0] = map(_hit, self._at_import)
        if isinstance(node, ast.stmt):
            return [*map(_hit, names), node]
        for name in names:
            node = ast.Subscript(ast.Tuple([_hit(name).value, node], ast.Load()), ast.Constant(1), ast.Load())
        return node


def _hit(name: str) -> ast.Expr:
    statement = ast.parse(f"__import__('lora_export.mutants_hit').mutants_hit.hit({name!r})").body[0]
    assert isinstance(statement, ast.Expr)
    return statement


def probed(source: str, file: str, wanted: Set[str]) -> str:
    """The source with a call of `hit` at each of these mutants."""
    tree = ast.parse(source)
    probes = _Probes(site for site in _sites(tree, file) if site.mutant.id in wanted)
    return ast.unparse(ast.fix_missing_locations(probes.visit(tree)))


def all_sites(root: Path) -> list[Site]:
    files = sorted((root / "lora_export").rglob("*.py"))
    return [site for path in files for site in sites(path.read_text("utf-8"), path.relative_to(root).as_posix())]


# --- which ---


def choose(found: Sequence[Site], count: int, seed: int) -> list[Mutant]:
    """Some mutants of every folder, more where there is more code; kinds of change that are rare are as likely."""
    folders: defaultdict[str, list[Site]] = defaultdict(list)
    for site in found:
        folders[site.mutant.folder].append(site)
    spare = max(count - LEAST * len(folders), 0)
    shares = {folder: spare * len(those) / len(found) for folder, those in folders.items()}
    wanted = {folder: LEAST + int(share) for folder, share in shares.items()}
    for folder in sorted(shares, key=lambda folder: int(shares[folder]) - shares[folder])[
        : count - sum(wanted.values())
    ]:
        wanted[folder] += 1
    return [
        mutant for folder in sorted(folders) for mutant in draw(folders[folder], wanted[folder], f"{seed} {folder}")
    ]


def draw(found: Iterable[Site], count: int, seed: str) -> list[Mutant]:
    kinds: defaultdict[str, list[Site]] = defaultdict(list)
    for site in found:
        kinds[site.mutant.kind].append(site)
    chance = random.Random(seed)
    drawn: list[Mutant] = []
    while kinds and len(drawn) < count:
        kind = chance.choice(sorted(kinds))
        site = kinds[kind].pop(chance.randrange(len(kinds[kind])))
        drawn.append(replace(site.mutant, change=site.change))
        kinds = defaultdict(list, {kind: those for kind, those in kinds.items() if those})
    return drawn


# --- found again ---


class Finder:
    """Finds mutants in a program that may have changed since they were chosen."""

    def __init__(self, found: Iterable[Site]) -> None:
        self._alike: defaultdict[tuple[str, str, int], list[Site]] = defaultdict(list)
        for site in found:
            self._alike[_loose(site.mutant.statement), site.mutant.kind, site.mutant.position].append(site)

    def find(self, mutant: Mutant) -> Site | None:
        alike = self._alike[_loose(mutant.statement), mutant.kind, mutant.position]
        best = max(alike, key=lambda site: _likeness(mutant, site.mutant), default=None)
        if best is None:
            return None
        function, around, *_ = _likeness(mutant, best.mutant)
        if function:
            known = len(alike) == 1 or around > 0 or best.mutant.file == mutant.file
        else:
            known = around >= NEAR or (len(alike) == 1 and len(mutant.statement) >= UNIQUE)
        return best if known else None


def _likeness(one: Mutant, other: Mutant) -> tuple[int, ...]:
    around = sum((Counter(one.around) & Counter(other.around)).values())
    pairs = [(one.file, other.file), (one.repeat, other.repeat), (one.statement, other.statement)]
    return (one.function == other.function, around, *(mine == its for mine, its in pairs))


def _loose(statement: str) -> str:
    """Without texts, and without the modules that names are taken from: both change when code moves."""
    return QUALIFIERS.sub("", STRINGS.sub("''", statement))
