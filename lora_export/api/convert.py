"""`lora_export.convert`: an adapter into another format."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lora_export import plan
from lora_export.api.callbacks import OnMessage, ignore
from lora_export.api.load import AdapterSource, adapter_paths, load_adapters, locate_adapters
from lora_export.api.shared_head import stored_in_graph, without_shared_head
from lora_export.errors import MatchError
from lora_export.formats import onnx_adapter
from lora_export.formats.read_options import DEFAULTS, ReadOptions
from lora_export.graph.find_sites import find_sites
from lora_export.graph.insert.check_contract import checked_contract, contract_dora_factors
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.unchanged_tables import without_unchanged_tables
from lora_export.storage import atomic_output, input_files


@dataclass(frozen=True)
class ConvertResult:
    """What was written."""

    output: Path
    weights: int  # weights of the graph that this adapter changes
    of: int  # weights of the graph that take an adapter
    base: str  # the fingerprint of the graph's base weights, which the file carries
    notes: tuple[str, ...]


def convert(
    adapter: AdapterSource,
    output: str | Path,
    *,
    graph: str | Path,
    weight: float = 1.0,
    reading: ReadOptions = DEFAULTS,
    ignore_head: bool = False,
    overwrite: bool = False,
    download: bool = False,
    on_message: OnMessage = ignore,
) -> ConvertResult:
    """Convert an adapter for an existing graph: next week's adapter, without another export.

    `graph` is an .onnx that was made with `--lora inputs`; `output` is an .onnx_adapter, onnxruntime's own format.
    `weight` multiplies the adapter's scale. `reading` is that of `merge`. `ignore_head` leaves out a task head
    that the adapter saves whole, where it is equal to the graph's own. Needs no PyTorch.

    With `download`, what the cache lacks of a name of the Hugging Face Hub is downloaded (`owner/name[@revision]`).
    Then EnvironmentLacking is raised without a connection.

    Raises InputRefused where a tensor of the adapter has no input of its shape and type in the graph, or where the
    graph has changed since it was made; OutputFailed where the file cannot be written. Nothing is left behind then.
    """
    output, graph = Path(output), Path(graph)
    (adapter,) = locate_adapters(adapter, on_message, download)
    (loaded,) = load_adapters(adapter, reading=reading)
    onnx_adapter.refuse_beyond_low_rank([replace(loaded, replaced={}) if ignore_head else loaded])
    input_files.must_exist(graph, "graph")
    model = load_graph(graph)
    if ignore_head:
        sites = find_sites(model)
        (loaded,) = without_shared_head([loaded], sites.specs, stored_in_graph(sites))
    contract = checked_contract(model, graph)
    try:
        steps = plan.make([loaded], [place.spec for place in contract.slots], strengths=[weight])
    except MatchError as error:
        raise error.with_remedy(
            f"{graph} takes adapters at {len(contract.slots)} layers. `lora-export onnx --lora inputs "
            "--target NAMES` makes a graph that takes them at others"
        ) from error
    if any(step.replace is not None for step in steps.low_rank):
        steps = without_unchanged_tables(steps, find_sites(model))
    onnx_adapter.refuse_new_tables(steps)
    notes = (*loaded.notes, *steps.notes)
    for note in notes:
        on_message(f"note: {note}")
    onnx_adapter.refuse_dora_without_factor(contract, steps)
    factors = contract_dora_factors(model, contract, steps, loaded.name)
    parameters = onnx_adapter.input_values(contract, steps, loaded.name, factors)
    inputs = [graph, *adapter_paths(adapter)]
    with atomic_output.stage_file(output, inputs=inputs, overwrite=overwrite, on_message=on_message) as folder:
        onnx_adapter.write(folder / output.name, parameters, contract, sha256=loaded.sha256)
    changed = {contract.inputs[name].weight for name in parameters}
    return ConvertResult(output, len(changed), len(contract.slots), contract.base, notes)
