"""What `lora-export inspect` found, as lines and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from lora_export.errors import count, first_of
from lora_export.formats.contract import ADAPTER_STRENGTHS
from lora_export.pairs.open_shape import OpenPair, known_shape
from lora_export.report.json_document import as_dict, plain
from lora_export.report.screens import NO_EFFECT, adapter_facts, by_kind, contents_of, kind_of_pair, shape_text, title
from lora_export.storage.artifact_kinds import ArtifactKind
from lora_export.storage.hashes import SHORT_HASH

if TYPE_CHECKING:
    from lora_export.api.inspect import Inspection
    from lora_export.artifacts.executorch_file import PlannedTensor, ProgramMethod
    from lora_export.formats.onnx_adapter import OnnxAdapter
    from lora_export.graph.find_sites import Sites
    from lora_export.graph.interface import Port
    from lora_export.graph.site import Site
    from lora_export.lora import Adapter
    from lora_export.weights.checkpoint import Checkpoint

PORTS = 6  # kinds of inputs or outputs that are listed
MODES = {
    "merged": "merged into the weights",
    "nodes": "as nodes beside the weights",
    "inputs": "as inputs (a file each)",
    "rows": "chosen by the input adapter_ids",
    "slots": "as inputs in slots, chosen by the input adapter_ids (a file .onnx_adapter each)",
}
_Item = TypeVar("_Item")


def inspection_lines(found: Inspection, *, every: bool) -> Iterator[str]:
    """What a path contains, in lines: one for each kind of layer, or with `every` one for each weight."""
    if found.adapter is not None:
        yield from _adapter_lines(found.adapter, found.adapter_bytes)
    elif found.onnx_adapter is not None:
        yield from _lines_of_onnx_adapter(found.onnx_adapter, every=every)
    elif found.graph is not None:
        yield from _interface_lines(found, found.graph)
        yield from _site_lines(found.graph) if every else _layer_lines(found, found.graph)
    elif found.methods is not None:
        yield from _program_lines(found, found.methods)
    elif found.checkpoint is not None:
        yield from _lines_of_checkpoint(found, found.checkpoint, every=every)


def inspection_document(found: Inspection) -> dict[str, Any]:
    """Everything that was found, as JSON."""
    if found.adapter is not None:
        return as_dict(found.adapter) | {
            "bytes": found.adapter_bytes,
            "parameters": found.adapter.parameters,
            "facts": [list(fact) for fact in adapter_facts(found.adapter)],
        }
    if (adapter := found.onnx_adapter) is not None:
        versions = {"model_version": adapter.model_version, "adapter_version": adapter.adapter_version}
        return {"format": "onnx_adapter", **versions, "has_hash": adapter.has_hash, "parameters": _parameters(adapter)}
    made = {
        "mode": found.mode,
        "adapters": plain(found.adapters),
        "base": plain(found.record.base),
        "verdict": plain(found.verdict),
        "record": plain(found.record.content),
    }
    if found.graph is not None:
        assert found.interface is not None
        ports = {"inputs": found.interface.inputs, "outputs": found.interface.outputs}
        interface = {
            name: [asdict(port) | {"dynamic_axes": list(port.dynamic_axes)} for port in of]
            for name, of in ports.items()
        }
        layers = {"linear_layers": len(found.linear)}
        return made | interface | {"opsets": dict(found.interface.opsets)} | layers | _graph_as_document(found.graph)
    if found.methods is not None:
        program = {"format": ArtifactKind.EXECUTORCH, "methods": [asdict(method) for method in found.methods]}
        return program | {"has_damaged_record": found.has_damaged_record} | made
    assert found.checkpoint is not None
    schemes = {name: {"stored_as": tensor.scheme} for name, tensor in found.checkpoint.quantised.items()}
    return made | {"tensors": [as_dict(spec) | schemes.get(spec.stored_name, {}) for spec in found.checkpoint.specs]}


def _grouped(
    items: Iterable[_Item], name: Callable[[_Item], str], same: Callable[[_Item], Hashable], *, every: bool = False
) -> Iterator[tuple[str, list[_Item], str]]:
    """The items of each kind, or with `every` each by itself: their title, the items, and `3 of them`."""
    for group in [[item] for item in items] if every else by_kind(items, name, same):
        yield title([name(item) for item in group]), group, f"{len(group)} of them" if len(group) > 1 else ""


def _joined(*facts: str) -> str:
    return ", ".join(filter(None, facts))


# --- Checkpoints and adapters ---


def _lines_of_checkpoint(found: Inspection, checkpoint: Checkpoint, *, every: bool) -> Iterator[str]:
    from lora_export.plan.layouts import LayoutEvidence

    stored = [spec for spec in checkpoint.specs if spec.region is None]  # a stack of experts is one tensor
    types = {spec.name: spec.dtype for spec in stored}
    types |= {name: tensor.scheme for name, tensor in checkpoint.quantised.items()}
    yield f"{count(len(stored), 'tensor')}, {checkpoint.nbytes:,} bytes"
    yield from _record_lines(found)
    groups = _grouped(
        stored,
        lambda spec: spec.name,
        lambda spec: (spec.shape, types[spec.name], spec.layout, spec.aliases),
        every=every,
    )
    for name, (spec, *_), several in groups:
        facts = ["stored (in, out)" if spec.layout == "in_out" else "", *(f"also {alias}" for alias in spec.aliases)]
        yield _joined(f"  {name}  {shape_text(spec.shape)} {types[spec.name]}", *facts, several)
    evidence = LayoutEvidence({spec.name: spec for spec in checkpoint.specs}, {})
    squares = (spec.name for spec in checkpoint.specs if spec.layout == "unknown" and len(set(spec.shape)) == 1)
    if tasks := checkpoint.own_adapters:
        yield f"its weights hold adapters for {', '.join(tasks)}: --stored-adapter NAME reads one"
    unknown = sum(len(evidence.of(name)) != 1 for name in squares)
    if unknown:
        yield (
            f"the layout of {unknown} square matrices is unknown: a merge needs --layout, or an adapter that records it"
        )


def _parameters(adapter: OnnxAdapter) -> dict[str, dict[str, Any]]:
    return {name: {"shape": value.shape(), "type": value.data_type()} for name, value in sorted(adapter.values.items())}


def _lines_of_onnx_adapter(adapter: OnnxAdapter, *, every: bool) -> Iterator[str]:
    parameters = {name: f"{shape_text(one['shape'])} {one['type']}" for name, one in _parameters(adapter).items()}
    yield (
        f"{len(parameters)} parameters for the base {adapter.model_version}, from the adapter {adapter.adapter_version}"
    )
    for name, names, several in _grouped(parameters, str, parameters.__getitem__, every=every):
        yield _joined(f"  {name}  {parameters[names[0]]}", several)
    if not adapter.has_hash:
        yield "note: the file has no hash of its contents, so it is not known whether they are those that were written"


def _adapter_lines(adapter: Adapter, nbytes: int) -> Iterator[str]:
    """An adapter: a line for each kind of module. ‖ΔW‖ is the Frobenius norm of s·BA at weight 1."""
    contents = f"{contents_of(adapter)}, {count(adapter.parameters, 'parameter')}, {nbytes:,} bytes"
    yield f"{adapter.name}: {adapter.format}, {contents}"
    looks = {name: (one.rank, one.scale, known_shape(one), kind_of_pair(one)) for name, one in adapter.pairs.items()}
    for name, modules, several in _grouped(adapter.pairs, str, looks.__getitem__):
        pair, norms = adapter.pairs[modules[0]], [adapter.pairs[module].norm for module in modules]
        low, high = (f"{norm:.4g}" for norm in (min(norms), max(norms)))
        facts = [f"rank {pair.rank}", f"scale {pair.scale:g}", f"‖ΔW‖ {low if low == high else f'{low} to {high}'}"]
        if isinstance(pair, OpenPair):
            yield _joined(f"  {name}", "shape: the base's", f"scale {pair.scale:g}", several)
        else:
            facts = facts[:2] if pair.needs_weight else facts
            yield _joined(f"  {name}  {shape_text(pair.shape)}", *facts, kind_of_pair(pair), several)
    whole = [*adapter.replaced, *adapter.token_rows, *(f"{module}.bias" for module in adapter.biases)]
    if whole:
        yield f"  changed without a low-rank pair: {first_of(whole, PORTS)}"
    for what, value in adapter_facts(adapter):
        yield f"  {what}: {value}"
    if adapter.is_identity:
        yield NO_EFFECT
    for note in adapter.notes:
        yield f"note: {note}"


# --- Graphs ---


def _site_lines(found: Sites) -> Iterator[str]:
    """A graph's weights: what could not be named, and each place where a parameter is read."""
    yield from str(found).split("\n")
    specs = {spec.name: spec for spec in found.specs}
    for name, sites in found.by_name.items():
        yield f"  {name}  {shape_text(specs[name].shape)} {specs[name].dtype}"
        for site in sites:
            facts = [site.location, f"stored {site.layout}" if site.is_linear else "", f"named by {site.named_by}"]
            facts += [f"{site.quantised.kind}, computes in {site.dtype}" if site.quantised is not None else ""]
            facts += [f"[{site.block.start}:{site.block.stop}] of {site.value.name}" if site.block is not None else ""]
            yield f"    {_joined(*facts)}"


def _layer_lines(found: Inspection, graph: Sites) -> Iterator[str]:
    """The linear layers of a graph that have a name: a line for each kind."""
    specs = {spec.name: spec for spec in graph.specs}
    kinds = {site: site.quantised.kind if site.quantised is not None else "" for site in found.linear if site.name}
    looks = {site: (site.shape, site.dtype, site.layout, kind) for site, kind in kinds.items()}
    groups = _grouped(kinds, lambda site: site.name, looks.__getitem__)
    for name, (site, *_), several in groups:
        yield _joined(f"layer {name}  {shape_text(specs[site.name].shape)} {site.dtype}", kinds[site], several)
    for note in graph.notes:
        yield f"note: {note}"


def _graph_as_document(found: Sites) -> dict[str, Any]:
    from lora_export.graph.exporter_names import naming_attempts

    return {
        "tensors": [as_dict(spec) for spec in found.specs],
        "sites": [_site(site) for sites in found.by_name.values() for site in sites],
        "unnamed": [
            _site(site) | {"tried": list(naming_attempts(site)), "equals": list(site.equal_tensors)}
            for site in found.unnamed
        ],
        "notes": list(found.notes),
    }


def _site(site: Site) -> dict[str, Any]:
    return {
        "name": site.name,
        "how": site.named_by,
        "operator": site.node.op_type,
        "node": site.node.name,
        "input": site.index,
        "initializer": site.value.name,
        "layout": site.layout,
        "shape": list(site.shape),
        "dtype": site.dtype,
        "stored_as": site.tensor.dtype.name.lower(),
        "block": None if site.block is None else [site.block.start, site.block.stop],
        "quantised": None if site.quantised is None else site.quantised.kind,
        "obstacle": site.obstacle,
    }


def _interface_lines(found: Inspection, graph: Sites) -> Iterator[str]:
    """What it takes to use a graph."""
    interface = found.interface
    assert interface is not None
    opsets = ", ".join(f"{domain or 'opset'} {version}" for domain, version in interface.opsets.items())
    unnamed = f"{len(graph.unnamed)} of them without a certain name (--base CHECKPOINT finds them, --all lists them)"
    layers = _joined(count(len(found.linear), "linear layer"), unnamed if graph.unnamed else "")
    yield f"{found.path.name}: ONNX, {opsets}, {layers}"
    yield from _record_lines(found)
    yield from _port_lines("input", [port for port in interface.inputs if not port.optional])
    strengths = [port for port in interface.inputs if port.optional and port.name == ADAPTER_STRENGTHS]
    yield from (f"{line}, by default 1" for line in _port_lines("input", strengths))
    if optional := [port for port in interface.inputs if port.optional and port not in strengths]:
        yield f"  and {count(len(optional), 'optional input')}, as {optional[0].name} (--json lists them)"
        yield "  onnxruntime warns of each of them. SessionOptions.log_severity_level = 3 leaves the warnings out"
    yield from _port_lines("output", interface.outputs)
    if past := next((port for port in interface.inputs if any(map(_is_past, port.shape or ()))), None):
        first = ", ".join("0" if _is_past(size) else str(size) for size in past.shape or ())
        yield f"first run: {past.name} and the like are empty, [{first}]; later ones take what the last one returned"


def _is_past(size: int | str | None) -> bool:
    """Whether a size of a shape is the length of the cache alone, as exporters name it."""
    return isinstance(size, str) and size.startswith("past") and "+" not in size


def _program_lines(found: Inspection, methods: Sequence[ProgramMethod]) -> Iterator[str]:
    """What it takes to run a program. The names of its inputs are those of the record."""
    yield f"{found.path.name}: {ArtifactKind.EXECUTORCH}, {count(len(methods), 'method')}"
    yield from _record_lines(found)
    if found.has_damaged_record:
        yield "note: the record behind the program is damaged, so it is not known how the file was made"
    recorded = found.record.content.get("inputs")
    names = [str(name) for name in recorded] if isinstance(recorded, list) else []
    for method in methods:
        by = f"computed by {', '.join(method.backends)}" if method.backends else ""
        yield _joined(f"method {method.name}", by, f"{method.planned_bytes:,} bytes of memory planned")
        named = names if len(names) >= len(method.inputs) else []
        for what, tensors in (("input", method.inputs), ("output", method.outputs)):
            has_names = what == "input" and bool(named)
            ports = list(zip(named if has_names else map(str, range(len(tensors))), tensors, strict=False))
            groups = list(_grouped(ports, lambda port: port[0], lambda port: port[1], every=not has_names))
            for name, ((_, tensor), *_), several in groups[:PORTS]:
                yield _joined(f"  {what} {name}  {_planned_text(tensor)}", several)
            if len(groups) > PORTS:
                yield f"  {what}s: {len(groups) - PORTS} more (--json lists them)"


def _planned_text(tensor: PlannedTensor) -> str:
    if not tensor.dtype:
        return "no tensor"
    if tensor.sizes is None:
        return f"{tensor.dtype} of any shape"
    return f"{tensor.dtype} {'of up to ' if tensor.varies else ''}{list(tensor.sizes)}"


def _port_lines(what: str, ports: Iterable[Port]) -> Iterator[str]:
    groups = list(_grouped(ports, lambda port: port.name, lambda port: (port.dtype, port.shape)))
    for name, (port, *_), several in groups[:PORTS]:
        sizes = None if port.shape is None else ", ".join("?" if size is None else str(size) for size in port.shape)
        yield _joined(f"{what} {name}  {port.dtype} {'of any shape' if sizes is None else f'[{sizes}]'}", several)
    if len(groups) > PORTS:
        yield f"{what}s: {len(groups) - PORTS} kinds more (--json lists them)"


def _record_lines(found: Inspection) -> Iterator[str]:
    """How a file was made: its adapters and their ids, its base, its verdict."""
    adapters = [
        f"{adapter.name}{'' if adapter.id is None else f' (id {adapter.id})'}"
        f"{'' if adapter.weight in (None, 1) else f' × {adapter.weight:g}'} {adapter.sha256[:SHORT_HASH]}…"
        for adapter in found.adapters
    ]
    base = "; id 0 is the base" if found.mode == "rows" else ""
    if adapters:
        yield f"adapters {MODES.get(found.mode, found.mode)}: {first_of(adapters, PORTS)}{base}"
    hashes = [f"{name} {_short_hash(value)}" for name, value in found.record.base.items()]
    if hashes:
        yield f"made from: {first_of(hashes, PORTS)}"
    if verdict := found.verdict:
        error = verdict.get("error_relative_to_effect")
        facts = [str(verdict.get("outcome")), str(verdict.get("why", "")), str(verdict.get("against", ""))]
        facts += [f"error {100 * error:.2g} % of the adapter's effect"] if isinstance(error, float) else []
        facts += [f"on {verdict['provider']}"] if "provider" in verdict else []
        yield f"published with the verdict: {_joined(*facts)}"


def _short_hash(value: Any) -> str:
    hashes = value if isinstance(value, dict) else {"": value}
    return ", ".join(f"{algorithm} {str(digest)[:SHORT_HASH]}…".strip() for algorithm, digest in hashes.items())
