"""What `lora-export inspect` found, as lines and as JSON."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lora_export.errors import count
from lora_export.graph.interface import Port
from lora_export.plan import TensorSpec
from lora_export.report.adapter_screen import adapter_facts, by_kind, contents_of, kind_of_pair, title
from lora_export.report.json_document import as_dict, plain
from lora_export.storage.hashes import SHORT_HASH

if TYPE_CHECKING:
    from lora_export.api.inspect import Inspection
    from lora_export.formats.onnx_adapter import OnnxAdapter
    from lora_export.graph.find_sites import Sites
    from lora_export.graph.site import Site
    from lora_export.lora import Adapter, LoraPair
    from lora_export.weights.checkpoint import Checkpoint

PORTS = 6  # kinds of inputs or outputs that are listed


def inspection_lines(found: Inspection, *, every: bool) -> Iterator[str]:
    """What a path contains, in lines: one for each kind of layer, or with `every` one for each weight."""
    if found.adapter is not None:
        yield from adapter_lines(found.adapter, found.adapter_bytes)
    elif found.onnx_adapter is not None:
        yield from _lines_of_onnx_adapter(found.onnx_adapter, every=every)
    elif found.graph is not None:
        yield from graph_lines(found)
        yield from _lines_of_graph(found.graph) if every else layer_lines(found)
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
    if found.onnx_adapter is not None:
        return _onnx_adapter_as_document(found.onnx_adapter)
    made = {
        "mode": found.mode,
        "adapters": [asdict(adapter) for adapter in found.adapters],
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
    assert found.checkpoint is not None
    return made | {"tensors": [as_dict(spec) for spec in found.checkpoint.specs]}


def _lines_of_checkpoint(found: Inspection, checkpoint: Checkpoint, *, every: bool) -> Iterator[str]:
    yield f"{len(checkpoint.specs)} tensors, {checkpoint.nbytes:,} bytes"
    yield from record_lines(found)
    groups = [[spec] for spec in checkpoint.specs] if every else by_kind(checkpoint.specs, _name, _look)
    for specs in groups:
        spec, several = specs[0], f"{len(specs)} of them" if len(specs) > 1 else ""
        facts = ["stored (in, out)" if spec.layout == "in_out" else "", *(f"also {name}" for name in spec.aliases)]
        text = f"  {title([spec.name for spec in specs])}  {' x '.join(map(str, spec.shape))} {spec.dtype}"
        yield ", ".join(filter(None, (text, *facts, several)))
    unknown = sum(spec.layout == "unknown" and len(set(spec.shape)) == 1 for spec in checkpoint.specs)
    if unknown:
        yield (
            f"the layout of {unknown} square matrices is unknown: a merge needs --layout, or an adapter that records it"
        )


def _name(spec: TensorSpec) -> str:
    return spec.name


def _look(spec: TensorSpec) -> Hashable:
    return spec.shape, spec.dtype, spec.layout, spec.aliases


def _parameters(adapter: OnnxAdapter) -> dict[str, dict[str, Any]]:
    return {name: {"shape": value.shape(), "type": value.data_type()} for name, value in sorted(adapter.values.items())}


def _onnx_adapter_as_document(adapter: OnnxAdapter) -> dict[str, Any]:
    versions = {"model_version": adapter.model_version, "adapter_version": adapter.adapter_version}
    return {"format": "onnx_adapter", **versions, "has_hash": adapter.has_hash, "parameters": _parameters(adapter)}


def _lines_of_onnx_adapter(adapter: OnnxAdapter, *, every: bool) -> Iterator[str]:
    parameters = _parameters(adapter)
    yield (
        f"{len(parameters)} parameters for the base {adapter.model_version}, from the adapter {adapter.adapter_version}"
    )

    def look(name: str) -> Hashable:
        return tuple(parameters[name]["shape"]), parameters[name]["type"]

    for names in [[name] for name in parameters] if every else by_kind(parameters, str, look):
        one, several = parameters[names[0]], f", {len(names)} of them" if len(names) > 1 else ""
        yield f"  {title(names)}  {' x '.join(map(str, one['shape']))} {one['type']}{several}"
    if not adapter.has_hash:
        yield "note: the file has no hash of its contents, so it is not known whether they are those that were written"


def _lines_of_graph(found: Sites) -> Iterator[str]:
    """A graph's weights: what could not be named, and each place where a parameter is read."""

    yield from str(found).split("\n")
    specs = {spec.name: spec for spec in found.specs}
    for name, sites in found.by_name.items():
        yield f"  {name}  {' x '.join(map(str, specs[name].shape))} {specs[name].dtype}"
        for site in sites:
            facts = [site.location, f"stored {site.layout}" if site.is_linear else "", f"named by {site.named_by}"]
            facts += [f"{site.quantised.kind}, computes in {site.dtype}" if site.quantised is not None else ""]
            facts += [f"[{site.block.start}:{site.block.stop}] of {site.value.name}" if site.block is not None else ""]
            yield f"    {', '.join(filter(None, facts))}"


def _graph_as_document(found: Sites) -> dict[str, Any]:
    from lora_export.graph.names.exporter_names import naming_attempts
    from lora_export.report.json_document import as_dict

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


# --- An adapter ---


def adapter_lines(adapter: Adapter, nbytes: int) -> Iterator[str]:
    """An adapter: a line for each kind of module. ‖ΔW‖ is the Frobenius norm of s·BA at weight 1."""
    contents = f"{contents_of(adapter)}, {adapter.parameters:,} parameters, {nbytes:,} bytes"
    yield f"{adapter.name}: {adapter.format}, {contents}"
    for modules in by_kind(adapter.pairs, str, lambda module: _look_of_pair(adapter.pairs[module])):
        pair, norms = adapter.pairs[modules[0]], [adapter.pairs[module].norm for module in modules]
        low, high = (f"{norm:.4g}" for norm in (min(norms), max(norms)))
        shape = " x ".join(map(str, pair.shape))
        facts = [f"rank {pair.rank}", f"scale {pair.scale:g}", f"‖ΔW‖ {low if low == high else f'{low} to {high}'}"]
        facts += [kind_of_pair(pair), f"{len(modules)} of them" if len(modules) > 1 else ""]
        yield f"  {title(modules)}  {shape}, {', '.join(filter(None, facts))}"
    whole = [*adapter.replaced, *adapter.token_rows, *(f"{module}.bias" for module in adapter.biases)]
    if whole:
        yield f"  changed without a low-rank pair: {', '.join(whole[:PORTS])}{_more(len(whole) - PORTS)}"
    for what, value in adapter_facts(adapter):
        yield f"  {what}: {value}"
    if adapter.is_identity:
        yield "this adapter changes nothing: every B, A or scale is zero, as in a new adapter"
    for note in adapter.notes:
        yield f"note: {note}"


def _look_of_pair(pair: LoraPair) -> Hashable:
    return pair.rank, pair.scale, pair.shape, kind_of_pair(pair)


# --- A graph ---


def graph_lines(found: Inspection) -> Iterator[str]:
    """What it takes to use a graph."""
    interface = found.interface
    assert interface is not None
    opsets = ", ".join(f"{domain or 'opset'} {version}" for domain, version in interface.opsets.items())
    yield f"{found.path.name}: ONNX, {opsets}, {count(len(found.linear), 'linear layer')}{_unnamed(found)}"
    yield from record_lines(found)
    yield from _port_lines("input", [port for port in interface.inputs if not port.optional])
    if optional := [port for port in interface.inputs if port.optional]:
        yield f"  and {len(optional)} optional inputs, as {optional[0].name} (--json lists them)"
    yield from _port_lines("output", interface.outputs)


def _unnamed(found: Inspection) -> str:
    number = len(found.graph.unnamed) if found.graph else 0
    return (
        f", {number} of them without a certain name (--base CHECKPOINT finds them, --all lists them)" if number else ""
    )


def record_lines(found: Inspection) -> Iterator[str]:
    """How a file was made: its adapters and their ids, its base, its verdict."""
    if not found.record:
        return
    adapters = [
        f"{adapter.name}{'' if adapter.id is None else f' (id {adapter.id})'}"
        f"{'' if adapter.weight in (None, 1) else f' × {adapter.weight:g}'} {adapter.sha256[:SHORT_HASH]}…"
        for adapter in found.adapters
    ]
    base = "; id 0 is the base" if found.mode == "rows" else ""
    if adapters:
        more = _more(len(adapters) - PORTS)
        yield f"adapters {_HOW.get(found.mode, found.mode)}: {', '.join(adapters[:PORTS])}{more}{base}"
    hashes = [f"{name} {_short_hash(value)}" for name, value in found.record.base.items()]
    if hashes:
        yield f"made from: {', '.join(hashes[:PORTS])}{_more(len(hashes) - PORTS)}"
    if found.verdict:
        yield f"published with the verdict: {_verdict(found.verdict)}"


_HOW = {
    "merged": "merged into the weights",
    "nodes": "as nodes beside the weights",
    "inputs": "as inputs (a file .onnx_adapter each)",
    "rows": "chosen by the input adapter_ids",
}


def _short_hash(value: Any) -> str:
    hashes = value if isinstance(value, dict) else {"": value}
    return ", ".join(f"{algorithm} {str(digest)[:SHORT_HASH]}…".strip() for algorithm, digest in hashes.items())


def _verdict(verdict: Any) -> str:
    error = verdict.get("error_relative_to_effect")
    facts = [str(verdict.get("outcome")), str(verdict.get("why", "")), str(verdict.get("against", ""))]
    facts += [f"error {100 * error:.2g} % of the adapter's effect"] if isinstance(error, float) else []
    facts += [f"on {verdict['provider']}"] if "provider" in verdict else []
    return ", ".join(filter(None, facts))


def _port_lines(what: str, ports: Iterable[Port]) -> Iterator[str]:
    groups = by_kind(ports, lambda port: port.name, lambda port: (port.dtype, port.shape))
    for group in groups[:PORTS]:
        port, several = group[0], f", {len(group)} of them" if len(group) > 1 else ""
        sizes = (
            "of any shape" if port.shape is None else f"[{', '.join('?' if s is None else str(s) for s in port.shape)}]"
        )
        yield f"{what} {title([one.name for one in group])}  {port.dtype} {sizes}{several}"
    if len(groups) > PORTS:
        yield f"{what}s: {len(groups) - PORTS} kinds more (--json lists them)"


def layer_lines(found: Inspection) -> Iterator[str]:
    """The linear layers of a graph that have a name: a line for each kind."""
    assert found.graph is not None
    specs = {spec.name: spec for spec in found.graph.specs}
    named = [site for site in found.linear if site.name]
    for sites in by_kind(named, lambda site: site.name, _look_of_site):
        site, several = sites[0], f"{len(sites)} of them" if len(sites) > 1 else ""
        text = (
            f"layer {title([one.name for one in sites])}  {' x '.join(map(str, specs[site.name].shape))} {site.dtype}"
        )
        quantised = site.quantised.kind if site.quantised is not None else ""
        yield ", ".join(filter(None, (text, quantised, several)))
    for note in found.graph.notes:
        yield f"note: {note}"


def _look_of_site(site: Site) -> Hashable:
    return site.shape, site.dtype, site.layout, None if site.quantised is None else site.quantised.kind


def _more(number: int) -> str:
    return f" and {number} more" if number > 0 else ""
