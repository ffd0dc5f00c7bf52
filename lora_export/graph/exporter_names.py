"""What exporters record in a graph: the names of weights, and notes on their machine, which are removed.

Exporters fold, transpose and merge weights. The name of a parameter survives in one of four records, tried in this
order: the initializer's own name, the name that it was folded from, the module in which the node was traced, and the
node's name.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from lora_export.graph.site import NameSource, Site
from lora_export.graph.values import stored_dtype
from lora_export.lora import expert_name
from lora_export.plan import FLOATS, Layout

FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"  # on a value; onnxscript's key
NAME_SCOPES = "pkg.torch.onnx.name_scopes"  # on a node; this and the next are PyTorch's keys
INPUT_KIND = "pkg.torch.export.graph_signature.InputSpec.kind"  # on an initializer
PROMOTED_FROM = "lora_export.promoted_from"  # on floats in place of a quantised weight: the name of its integers
NAME_KEYS = frozenset({FOLDED_FROM, INPUT_KIND, NAME_SCOPES})  # the next adapter needs these
EXPORTER_KEYS = re.compile(r"pkg\.(torch|onnxscript|transformers)\b|namespace$")
PLAIN_LIST = re.compile(r"\['[\w./@:-]*'(?:, '[\w./@:-]*')*\]")
STACK_TRACE_MARK = 'File "'  # every Python stack trace contains it


def remove_exporter_notes(model: ir.Model) -> None:
    """Remove stack traces, source lines and paths of the exporter's machine. Keep the names of modules and weights."""
    for element in elements(model):
        for key, text in list(element.metadata_props.items()):
            if key not in NAME_KEYS and (EXPORTER_KEYS.match(key) or STACK_TRACE_MARK in text):
                del element.metadata_props[key]
        if element.doc_string and STACK_TRACE_MARK in element.doc_string:
            element.doc_string = None


def elements(model: ir.Model) -> Iterator[Any]:
    """All graphs, functions, nodes and values. Each has a name, a doc string and metadata properties."""
    graphs: list[ir.Graph | ir.Function] = [*model.graphs(), *model.functions.values()]
    for graph in graphs:
        yield from (graph, *graph.inputs)
        yield from graph.initializers.values() if isinstance(graph, ir.Graph) else ()
        for node in graph:
            yield from (node, *node.outputs)


def texts(model: ir.Model) -> Iterator[Any]:
    """All texts in a model: names, operators, doc strings and properties."""
    yield from (model.producer_name, model.producer_version, model.domain, model.doc_string, *model.opset_imports)
    for identifier in model.functions:
        yield from identifier
    for element in [model, *elements(model)]:
        yield from (element.doc_string, *element.metadata_props, *element.metadata_props.values())
        if not isinstance(element, ir.Model):
            yield element.name
        if isinstance(element, ir.Node):
            yield from (*element.op_identifier(), *element.attributes)


# What quantisers append to the name of a weight.
QUANTISER_SUFFIX = re.compile(r"_(?:DQ_)?Q\d(?:G\d+)?$|_Bnb4$|_quant(?:ized)?$|(?<=\.)q(?=weight$)")
BUILDER_NAME = re.compile(r"(.+\.)?\w+\.MatMul\.weight")  # invented by onnxruntime-genai's model builder

Named = dict[str, list[Site]]


def name_sites(sites: Iterable[Site]) -> tuple[Named, list[Site]]:
    """Name sites from the exporter's records. Returns the named sites by parameter, and those without a name.

    Reads tensor data only where two initializers have one name: they must be equal, or both lose it.
    """
    named: Named = {}
    unnamed: list[Site] = []
    for parameter, readers in _by_parameter(sites).items():
        for site in _distinguish_readers(parameter, readers) if parameter else map(_name_by_node, readers):
            if site.name:
                named.setdefault(site.name, []).append(site)
            else:
                unnamed.append(site)
    remove_contradictory_names(named, unnamed)
    return named, unnamed


def remove_contradictory_names(named: Named, unnamed: list[Site]) -> None:
    """Move sites from `named` to `unnamed` where the sites of one name do not hold one weight."""
    for name in [name for name, sites in named.items() if not _hold_one_weight(sites)]:
        unnamed += [replace(site, name="", named_by=NameSource.NONE) for site in named.pop(name)]


def parameter_of(value: ir.Value) -> tuple[str, NameSource]:
    """The parameter's name according to the initializer. Empty where the initializer has lost it."""
    name = name_before_quantisation(value)
    if BUILDER_NAME.fullmatch(name):
        return "", NameSource.NONE
    if INPUT_KIND in value.metadata_props or looks_like_parameter(name):
        return name, NameSource.INITIALIZER
    origins = folded_from(value)
    if len(origins) == 1 and looks_like_parameter(origins[0]):
        return origins[0], NameSource.FOLDED_FROM
    return "", NameSource.NONE


def folded_from(value: ir.Value) -> list[str]:
    """The initializers from which an exporter's constant folding made this one."""
    return _parse_strings(value.metadata_props.get(FOLDED_FROM, ""))


def name_before_quantisation(value: ir.Value) -> str:
    """The name of an initializer, without the suffix of a quantiser."""
    name = value.name or ""
    return name if stored_dtype(value) in FLOATS else QUANTISER_SUFFIX.sub("", name)


def looks_like_parameter(name: str) -> bool:
    """`encoder.layer.0.weight` does; `val_49`, `onnx::MatMul_812` and `/encoder/Constant_output_0` do not."""
    return re.fullmatch(r"\w[\w-]*(\.[\w-]+)+|(in_proj_)?(weight|bias)", name) is not None


def module_of_node(node: ir.Node) -> tuple[str | None, NameSource]:
    """The innermost module in which a node was traced. None where no record contains it."""
    scopes = _parse_strings(node.metadata_props.get(NAME_SCOPES, ""))
    if len(scopes) > 1 and not scopes[-2].startswith("_empty_nn_module_stack"):
        # torch.export calls a module's second call `name@1`. The last scope is the operator.
        return re.sub(r"@\d+", "", scopes[-2]), NameSource.NAME_SCOPE
    path = re.fullmatch(r"/(?:(.+)/)?[A-Z]\w*", node.name or "")
    return (path[1] or "").replace("/", ".") if path else None, NameSource.NODE_NAME


def is_stored_transposed(site: Site) -> bool:
    """Whether an exporter transposed the model's parameter before it stored it.

    A Linear's (out, in) weight that is stored (in, out) was folded through a Transpose. transformers' Conv1D has an
    (in, out) parameter, whose initializer keeps its own name and has no record of folding.
    """
    if site.transposed is not None:
        return site.transposed
    if site.layout is not Layout.IN_OUT:
        return False
    return FOLDED_FROM in site.value.metadata_props or parameter_of(site.value)[1] is NameSource.NONE


def naming_attempts(site: Site) -> Iterator[str]:
    """The records that were tried for a site without a name, and their contents. For messages."""
    yield f"its initializer `{site.value.name}`"
    yield f"folded from {site.value.metadata_props.get(FOLDED_FROM, 'nothing')}"
    yield f"its module {module_of_node(site.node)[0] or 'unknown'}"
    if site.equal_tensors:
        yield f"its content, which equals {' and '.join(site.equal_tensors)}"


def _by_parameter(sites: Iterable[Site]) -> Named:
    """Sites by the parameter name of their initializer, or that of one expert. The empty name holds those without."""
    groups: Named = {}
    for site in sites:
        name, source = parameter_of(site.value)
        name = expert_name(name, site.expert) if name and site.expert is not None else name
        groups.setdefault(name, []).append(replace(site, named_by=source))
    return groups


def _parse_strings(text: str) -> list[str]:
    """A Python list of strings that an exporter saved as text. Empty for any other text."""
    if PLAIN_LIST.fullmatch(text):  # all that is known; Python's parser takes ten times as long
        return text[2:-2].split("', '")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else []


def _distinguish_readers(parameter: str, sites: list[Site]) -> list[Site]:
    """Name the readers of one initializer. Usually all of them are in the parameter's own module.

    Readers in several modules mean that tied or equal tensors became one initializer. Each site is then named after
    its own module: `layers.0.norm.weight` read in `layers.1.norm` is `layers.1.norm.weight`. All sites stay unnamed
    where no reader is in the parameter's own module, where a reader's module is unknown, or where one node reads the
    tensor twice (as weight and as bias).
    """
    if len({site.node for site in sites}) < len(sites):
        return [replace(site, named_by=NameSource.NONE) for site in sites]
    modules = [module_of_node(site.node)[0] for site in sites]
    if len(set(modules)) == 1 and (modules[0] is not None or len(sites) == 1):
        return [replace(site, name=parameter) for site in sites]
    owners = [module for module in modules if module is not None and parameter.startswith(f"{module}.")]
    if None in modules or not owners:
        return [replace(site, named_by=NameSource.NONE) for site in sites]
    name_in_module = parameter.removeprefix(max(owners, key=len))  # ".weight"
    return [
        replace(site, name=parameter)
        if not module or module in owners
        else replace(site, name=f"{module}{name_in_module}", named_by=NameSource.NAME_SCOPE)
        for site, module in zip(sites, modules, strict=True)
    ]


def _name_by_node(site: Site) -> Site:
    """Name a linear layer whose initializer has lost its name after the module in which its node was traced."""
    module, source = module_of_node(site.node)
    # A module of experts has several stacked weights: its name does not tell which one is read.
    if (
        not module
        or not site.is_linear
        or site.expert is not None
        or BUILDER_NAME.fullmatch(name_before_quantisation(site.value))
    ):
        return site
    return replace(site, name=f"{module}.weight", named_by=source)


def _hold_one_weight(sites: list[Site]) -> bool:
    """Whether all sites of one name hold equal weights, and each initializer has one layout."""
    layouts = {(site.value, site.block, site.layout) for site in sites if site.is_linear}
    values = {(site.value, site.block) for site in sites}
    if len(layouts) > len({(value, block) for value, block, _ in layouts}):
        return False
    if len(values) == 1 or all(site.named_by is NameSource.CONTENT for site in sites):
        return True
    first, *others = {
        (site.value, site.block): site for site in sorted(sites, key=lambda site: not site.is_linear)
    }.values()
    return all(np.array_equal(first.matrix, other.matrix) for other in others)
