"""Where the weights live in a graph, and what they were called.

Exporters fold, transpose and merge weights, but the names survive in layers. They are asked in this
order, and each site records which one answered: the initializer's own name, the names that it was
folded from, the module that the node was traced in, the node's own name; and, where a base checkpoint
is at hand, the content, which also checks what the others said. What stays ambiguous is listed as
unnamed, and is nobody's weight.
"""

from __future__ import annotations

import ast
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from lora_export.errors import InputRefused
from lora_export.graph.match_by_content import Base, Match, View
from lora_export.graph.readers import How as How
from lora_export.graph.readers import Site as Site
from lora_export.graph.readers import flipped as flipped
from lora_export.graph.readers import readers as readers
from lora_export.graph.readers import stored_dtype, tensor_of
from lora_export.plan import FLOATS, Layout, TensorSpec
from lora_export.weights.checkpoint import Checkpoint

FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"  # on a value; onnxscript's key
NAME_SCOPES = "pkg.torch.onnx.name_scopes"  # on a node; this and the next are PyTorch's keys
KIND = "pkg.torch.export.graph_signature.InputSpec.kind"  # on an initializer
# At which input quantised weights are read; not all of them are understood.
UNREAD = {
    "MatMulNBits": 1,
    "MatMulBnb4": 1,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "QLinearMatMul": 3,
    "ConvInteger": 1,
    "QLinearConv": 3,
    "DequantizeLinear": 0,
    "GatherBlockQuantized": 0,
}
PRODUCTS = frozenset({"MatMul", "Gemm", "FusedMatMul", "FusedGemm"})
# What may stand between an output head and the graph's output.
PASSING = frozenset({"Add", "Cast", "Identity", "Mul", "Div", "Tanh", "Reshape", "Squeeze", "Unsqueeze", "Transpose"})
MARKS = re.compile(r"_(?:DQ_)?Q\d$|_Bnb4$|_quant(?:ized)?$|(?<=\.)q(?=weight$)")  # that quantisers add to a name
BUILDERS = re.compile(r"(.+\.)?\w+\.MatMul\.weight")  # a name that onnxruntime-genai's builder made up
SIDES = re.compile(r"(^|\.)lora_([AB]|zeros)\b")  # a name that says whose it is: an adapter's, beside a layer
SHOWN = 10  # contradictions that an error lists


@dataclass(frozen=True, eq=False)
class Sites:
    """Every place where a graph uses a weight. Outlived by any change of the graph: find them again then."""

    by_name: Mapping[str, tuple[Site, ...]]  # one parameter may be read in several places
    unnamed: tuple[Site, ...]  # linear layers whose weight nobody could name for certain
    notes: tuple[str, ...]  # what was not looked at
    unread: tuple[TensorSpec, ...] = ()  # weights that are quantised in ways that are not understood

    @property
    def specs(self) -> list[TensorSpec]:
        """One spec a parameter, as the model has it: an exporter's transposition is undone in shape and layout."""
        return [*(_spec(name, there) for name, there in self.by_name.items()), *self.unread]

    @property
    def linear(self) -> tuple[Site, ...]:
        return tuple(site for there in self.by_name.values() for site in there if site.is_linear)

    def name_of(self, site: Site) -> str:
        """The name of the site at the same place; empty where it has none."""
        return next(
            (name for name, there in self.by_name.items() if site.place in {other.place for other in there}), ""
        )

    def __str__(self) -> str:
        counts = Counter(site.how for site in self.linear)
        found = ", ".join(f"{count} named by {how.replace('_', ' ')}" for how, count in counts.items())
        lines = [f"{len(self.linear) + len(self.unnamed)} linear layers: {found or 'none with a name'}"]
        lines += [f"  {place(site)}: no certain name (tried {', '.join(tried(site))})" for site in self.unnamed]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def find(model: ir.Model, base: Checkpoint | None = None) -> Sites:
    """Find every place where a float or quantised weight is read, subgraphs included, and name it.

    Without a base, tensor data is read only where two initializers claim one name: they must be equal, or neither
    has it. With the checkpoint that the graph was made of, content names what has lost its name, block by block
    where several weights lie in one, and every other name is held against it; names are spelled as the base does.

    Raises InputRefused where a name stands for another tensor in the base.
    """
    named: dict[str, list[Site]] = {}
    nameless: list[Site] = []
    weights = list(_weights(model))
    for parameter, sites in _by_parameter(weights).items():
        for site in _told_apart(parameter, sites) if parameter else map(_named_by_node, sites):
            if site.name:
                named.setdefault(site.name, []).append(site)
            else:
                nameless.append(site)
    _refuse_disagreement(named, nameless)
    notes = list(_notes(model, weights))
    if base is not None:
        named, nameless, unknown = _by_content([*(site for there in named.values() for site in there), *nameless], base)
        _refuse_disagreement(named, nameless)
        notes += [f"{name} is not in {base.path.name}, under no name and with no such content" for name in unknown]
    return Sites(
        by_name={name: tuple(sites) for name, sites in named.items()},
        unnamed=tuple(site for site in nameless if site.is_linear),
        notes=tuple(notes),
        unread=tuple(spec for spec in _unread(model, weights) if spec.name not in named),
    )


def _weights(model: ir.Model) -> Iterator[Site]:
    """Every reader of a weight, in the order of the initializers; then those of weights in Constant nodes."""
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type == "Constant" and len(node.outputs) == 1:
            tensor = tensor_of(node.outputs[0])
            values += node.outputs if tensor is not None and len(tensor.shape) > 1 else ()
    for value in values:
        dtype = stored_dtype(value)
        for site in readers(value, model.functions) if dtype and dtype != "string" else ():
            scales = site.node.op_type in UNREAD and site.index > 0  # of the weight beside them
            if site.quantised is not None or (dtype in FLOATS and not scales):
                yield site


def is_output_head(site: Site) -> bool:
    """Whether what a linear layer computes is an output of the graph, but for what does not mix its features."""
    waiting, known = list(site.node.outputs), set(site.node.outputs)
    while waiting:
        at = waiting.pop()
        if at.is_graph_output():
            return True
        for node, _ in at.uses():
            fresh = [output for output in node.outputs if output not in known] if node.op_type in PASSING else []
            known.update(fresh)
            waiting += fresh
    return False


def value_names(model: ir.Model) -> set[str]:
    """Every name that a value has anywhere in the model's graph and subgraphs."""
    values = [value for graph in model.graphs() for value in (*graph.inputs, *graph.initializers.values())]
    values += [output for node in ir.traversal.RecursiveGraphIterator(model.graph) for output in node.outputs]
    return {value.name for value in values if value.name}


def unused(name: str, taken: set[str]) -> str:
    """The name, numbered where it is taken; it is taken afterwards."""
    number, free = 0, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    taken.add(free)
    return free


# --- names --------------------------------------------------------------------------------------


def _by_parameter(sites: Iterable[Site]) -> dict[str, list[Site]]:
    """Sites by what their initializer is called; under the empty name those whose initializer has lost its name."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        name, how = _parameter(site.value)
        groups.setdefault(name, []).append(replace(site, how=how))
    return groups


def _parameter(value: ir.Value) -> tuple[str, How]:
    name = _old_name(value)
    if BUILDERS.fullmatch(name):
        return "", How.NONE
    if KIND in value.metadata_props or _looks_like_parameter(name):
        return name, How.INITIALIZER
    origins = _strings(value.metadata_props.get(FOLDED_FROM, ""))
    if len(origins) == 1 and _looks_like_parameter(origins[0]):
        return origins[0], How.FOLDED_FROM
    return "", How.NONE


def _old_name(value: ir.Value) -> str:
    """What an initializer was called before it was quantised."""
    name = value.name or ""
    return name if stored_dtype(value) in FLOATS else MARKS.sub("", name)


def _looks_like_parameter(name: str) -> bool:
    """`encoder.layer.0.weight` does; `val_49`, `onnx::MatMul_812` and `/encoder/Constant_output_0` do not."""
    return re.fullmatch(r"\w[\w-]*(\.[\w-]+)+|(in_proj_)?(weight|bias)", name) is not None


def _strings(text: str) -> list[str]:
    """A Python list of strings that an exporter left as text; empty for anything else."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else []


def _told_apart(parameter: str, sites: list[Site]) -> list[Site]:
    """Name the readers of one parameter's initializer: usually its own module, wherever that is called.

    Readers in other modules mean that tied or equal tensors became one. Each is then called by its own
    module and by what the owner calls the tensor: `layers.0.norm.weight` read in `layers.1.norm` is
    `layers.1.norm.weight`. Without an owner among the readers, or where one of them does not tell its
    module or reads the tensor twice (as weight and as bias), all of them stay unnamed.
    """
    if len({site.node for site in sites}) < len(sites):
        return [replace(site, how=How.NONE) for site in sites]
    modules = [_module(site.node)[0] for site in sites]
    if len(set(modules)) == 1 and (modules[0] is not None or len(sites) == 1):
        return [replace(site, name=parameter) for site in sites]
    owned = [module for module in modules if module is not None and parameter.startswith(f"{module}.")]
    if None in modules or not owned:
        return [replace(site, how=How.NONE) for site in sites]
    own_name = parameter.removeprefix(max(owned, key=len))  # ".weight"
    return [
        replace(site, name=parameter)
        if not module or module in owned
        else replace(site, name=f"{module}{own_name}", how=How.NAME_SCOPE)
        for site, module in zip(sites, modules, strict=True)
    ]


def _named_by_node(site: Site) -> Site:
    """A linear layer whose initializer has lost its name: the module that its node was traced in has one weight."""
    module, how = _module(site.node)
    if not module or not site.is_linear or BUILDERS.fullmatch(_old_name(site.value)):
        return site
    return replace(site, name=f"{module}.weight", how=how)


def _module(node: ir.Node) -> tuple[str | None, How]:
    """The innermost module that a node was traced in; None where nothing tells."""
    scopes = _strings(node.metadata_props.get(NAME_SCOPES, ""))
    if len(scopes) > 1 and not scopes[-2].startswith("_empty_nn_module_stack"):
        # A module's second call is `name@1` to torch.export; the last scope is the operator.
        return re.sub(r"@\d+", "", scopes[-2]), How.NAME_SCOPE
    path = re.fullmatch(r"/(?:(.+)/)?[A-Z]\w*", node.name or "")
    return (path[1] or "").replace("/", ".") if path else None, How.NODE_NAME


def _refuse_disagreement(named: dict[str, list[Site]], nameless: list[Site]) -> None:
    """Take a name away from sites that do not hold one weight."""
    for name in [name for name, sites in named.items() if not _agree(sites)]:
        nameless += [replace(site, name="", how=How.NONE) for site in named.pop(name)]


def _agree(sites: list[Site]) -> bool:
    """Whether all sites of one name hold one weight, lying one way for each initializer."""
    layouts = {(site.value, site.block, site.layout) for site in sites if site.is_linear}
    values = {(site.value, site.block) for site in sites}
    if len(layouts) > len({(value, block) for value, block, _ in layouts}):
        return False
    if len(values) == 1 or all(site.how is How.CONTENT for site in sites):
        return True
    first, *others = {
        (site.value, site.block): site for site in sorted(sites, key=lambda site: not site.is_linear)
    }.values()
    return all(np.array_equal(first.matrix, other.matrix) for other in others)


def _spec(name: str, sites: tuple[Site, ...]) -> TensorSpec:
    site = min(sites, key=lambda site: not site.is_linear)
    shape, layout = site.shape, site.layout
    if is_stored_transposed(site):
        shape, layout = shape[::-1], flipped(layout)
    dtype = site.dtype if site.quantised is not None else stored_dtype(site.value)
    return TensorSpec(name, shape, dtype, layout, nbytes=math.prod(shape) * np.dtype(dtype).itemsize)


def is_stored_transposed(site: Site) -> bool:
    """Whether an exporter turned the model's parameter before it stored it.

    A Linear's (out, in) weight that lies (in, out) has been folded through a Transpose; transformers'
    Conv1D keeps (in, out) itself, and arrives under its own name without a mark.
    """
    if site.transposed is not None:
        return site.transposed
    if site.layout is not Layout.IN_OUT:
        return False
    return FOLDED_FROM in site.value.metadata_props or _parameter(site.value)[1] is How.NONE


# --- content ------------------------------------------------------------------------------------


class _Told(NamedTuple):
    """A site as the layers of names had it, and as the base knows it: the same object where it knows nothing of it."""

    was: Site
    now: Site

    @property
    def is_known(self) -> bool:
        return self.now is not self.was

    @property
    def is_held(self) -> bool:
        """Whether the base has this very tensor under the name that the site has, a prefix aside."""
        return self.is_known and bool(self.was.name) and self.now.how is self.was.how


def _by_content(sites: list[Site], checkpoint: Checkpoint) -> tuple[dict[str, list[Site]], list[Site], list[str]]:
    """Sites as the base knows them: named, nameless, and the names that it does not know."""
    base = Base(checkpoint)
    told = [_Told(site, there) for site in sites for there in _as_the_base_knows(site, base)]
    _refuse_contradictions(told, base)
    named: dict[str, list[Site]] = {}
    nameless: list[Site] = []
    for site in _spelled_alike(_untied(told), *_prefix(told)):
        if site.name:
            named.setdefault(site.name, []).append(site)
        else:
            nameless.append(site)
    return named, nameless, sorted({there.was.name for there in told if there.was.name and not there.is_known})


def _as_the_base_knows(site: Site, base: Base) -> Iterator[Site]:
    """A site as its name or content says: one weight, several side by side, or, where nothing answers, as before."""
    spelled = base.spelled(site.name)
    held = base.is_held(spelled, site) if spelled else None
    if held is not None:
        yield replace(site, name=spelled, transposed=_is_turned(site, held))
        return
    matches = list(base.matches(site))
    for match in matches:
        block = range(match.start, match.stop) if len(matches) > 1 else None
        views = _preferred(site, match, base)
        if len(views) == 1:
            (view,) = views
            turned = _is_turned(site, view)
            yield replace(site, name=view.name, how=How.CONTENT, block=block, transposed=turned)
        elif block is not None or (views and not site.name):
            equals = tuple(view.name for view in views)
            yield replace(site, name="", how=How.NONE, block=block, equals=equals)
        else:
            yield site


def _refuse_contradictions(told: Iterable[_Told], base: Base) -> None:
    wrong: dict[Site, list[str]] = {}
    for was, now in (there for there in told if there.was.name in base.matrices and not there.is_held):
        wrong.setdefault(was, []).extend(filter(None, (now.name if now is not was else "", *now.equals)))
    lines = [
        f"  {place(site)}: {site.name} by {site.how}, {' and '.join(others) or 'nothing there'} by content"
        for site, others in wrong.items()
    ]
    if lines:
        raise InputRefused(
            f"{base.path} is not what the graph was made of, or its weights were changed since. {len(lines)} of them "
            "are not what the base has under their names:\n"
            + "\n".join(lines[:SHOWN])
            + (f"\n  and {len(lines) - SHOWN} more" if len(lines) > SHOWN else "")
        )


def _untied(told: Sequence[_Told]) -> Iterator[_Told]:
    """A linear layer that reads what is an embedding to others is a tied head: it keeps the name that it has, or none.

    An adapter of the embedding changes what is looked up, and leaves the head alone.
    """
    embeddings = {now.name for _, now in told if now.layout is Layout.EMBEDDING and now.name}
    for was, now in told:
        if now.is_linear and now.how is How.CONTENT and now.name in embeddings:
            yield _Told(was, replace(was, equals=() if was.name else (now.name,)))
        else:
            yield _Told(was, now)


def _prefix(told: Iterable[_Told]) -> tuple[str, str]:
    """What every name that the base knows lost and gained in front to be spelled so; nothing where they differ."""
    prefixes = set()
    for was, now in (there for there in told if there.is_held):
        longer, shorter = sorted((was.name, now.name), key=len, reverse=True)
        more = longer.removesuffix(shorter)
        prefixes.add((more, "") if longer == was.name else ("", more))
    return prefixes.pop() if len(prefixes) == 1 else ("", "")


def _spelled_alike(told: Iterable[_Told], lost: str, gained: str) -> Iterator[Site]:
    """The sites as they are now, names that the base does not know with the prefix that all others have."""
    for was, now in told:
        kept = now.name and now.name == was.name and now.name.startswith(lost)
        yield replace(now, name=gained + now.name.removeprefix(lost)) if kept else now


def _is_turned(site: Site, view: View) -> bool | None:
    """Whether the base has the parameter the other way round than the graph; None where it cannot be otherwise."""
    return view.turned is (site.layout is not Layout.IN_OUT) if site.is_linear else None


def _preferred(site: Site, match: Match, base: Base) -> list[View]:
    """Of equal tensors the one that the layers of names speak of, where that is one."""
    if len(match.views) < 2:
        return list(match.views)
    module = _module(site.node)[0]
    spoken = {site.name, _parameter(site.value)[0], f"{module}.weight" if module else ""}
    spoken |= set(_strings(site.value.metadata_props.get(FOLDED_FROM, "")))
    names = {base.spelled(name) for name in spoken if name}
    chosen = [view for view in match.views if view.name in names]
    return chosen if len(chosen) == 1 else list(match.views)


# --- what is told -------------------------------------------------------------------------------


def _notes(model: ir.Model, sites: Iterable[Site]) -> Iterator[str]:
    """What holds weights and is not understood."""
    quantised = Counter(node.op_type for node, _ in _not_understood(model, sites))
    unread: Counter[str] = Counter()
    for site in sites:
        if site.layout is not Layout.OTHER or len(site.shape) != 2 or site.node.op_type in UNREAD:
            continue
        if SIDES.search(site.value.name or ""):
            continue
        called = site.inner is not None or site.node.op_identifier() in model.functions
        first = " as its first operand" if site.node.op_type in PRODUCTS and site.index == 0 else ""
        unread[f"the function {site.node.op_type}" if called else f"{site.node.op_type}{first}"] += 1
    for op_type, count in quantised.items():
        yield f"{count} {op_type} nodes hold quantised weights, which are not looked at"
    for reader, count in unread.items():
        yield f"{count} matrices are read by {reader}, where no linear layer is looked for"


def _not_understood(model: ir.Model, sites: Iterable[Site]) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Nodes that read a stored quantised weight which nothing here reads, and what they read."""
    understood = {site.quantised.node for site in sites if site.quantised is not None}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        index = UNREAD.get(node.op_type, len(node.inputs))
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None and node not in understood and _is_stored(value):
            yield node, value


def _unread(model: ir.Model, sites: Iterable[Site]) -> Iterator[TensorSpec]:
    """What such nodes read, by name: an adapter that was made for it is told why it finds no weight."""
    told = set()
    for node, value in _not_understood(model, sites):
        name, module = _old_name(value), _module(node)[0]
        name = name if _looks_like_parameter(name) else f"{module}.weight" if module else ""
        if name and name not in told:
            told.add(name)
            yield TensorSpec(name, (), f"{stored_dtype(value)} of {node.op_type}")


def _is_stored(value: ir.Value | None) -> bool:
    return value is not None and tensor_of(value) is not None


def tried(site: Site) -> Iterator[str]:
    """What was tried to name a site that has no certain name."""
    yield f"its initializer `{site.value.name}`"
    yield f"folded from {site.value.metadata_props.get(FOLDED_FROM, 'nothing')}"
    yield f"its module {_module(site.node)[0] or 'unknown'}"
    if site.equals:
        yield f"its content, which is that of {' and '.join(site.equals)}"


def place(site: Site) -> str:
    """Where a site is, in words."""
    block = f" [{site.block.start}:{site.block.stop}]" if site.block is not None else ""
    return f"{site.node.op_type} `{site.node.name}`{block}"
