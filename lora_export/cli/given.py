"""A graph that was made elsewhere. Needs no PyTorch."""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lora_export import provenance
from lora_export.cli.weaving import Order, Say
from lora_export.errors import InputRefused
from lora_export.graph.insert.inserter import module_of
from lora_export.graph.merge import write_merged
from lora_export.graph.onnx_file import EXTERNAL_FROM, initializers, open_graph
from lora_export.graph.sites import Sites, is_output_head, place
from lora_export.plan import Plan
from lora_export.storage import input_files
from lora_export.storage.hashes import file_hash
from lora_export.weights.checkpoint import open_checkpoint

HASHING = "xxh3_128"
SHOWN = 10  # layers that an error lists


class FromGraph:
    """An `.onnx` as the source of a graph. See `weaving.Source`."""

    def __init__(self, path: Path, order: Order, base: Path | None):
        input_files.must_exist(path, "model")
        self.order, self.graph = order, open_graph(path)
        self.checkpoint = None if base is None else open_checkpoint(base)
        self._hashes: dict[str, dict[str, str]] = {}  # of its files, where they were read from end to end

    def check(self) -> None:
        """Raise InputRefused for a graph that takes adapters already."""
        if self.graph.takes_adapters:
            raise InputRefused(
                f"{self.graph.path} takes adapters while it runs already: start from the graph that it was made from"
            )

    def program(self, stage: Say) -> ir.Model:
        """A copy that may be changed; its large weights stay in their files."""
        stage("reading the graph")
        model = self.graph.model.clone()
        model.metadata_props.pop(provenance.KEY, None)  # its adapters are in the new record
        return model

    def targets(self, sites: Sites) -> list[str]:
        """The weights beside which adapters to come may stand: those of --target."""
        target = self.order.target
        if target is None:
            return []
        linear = {site.name: site for site in sites.linear if len(site.shape) == 2}
        if target == "all-linear":
            unknown = [place(site) for site in sites.unnamed if not site.equals and not is_output_head(site)]
            if unknown:
                more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
                raise InputRefused(
                    f"{len(unknown)} linear layers have no certain name ({', '.join(unknown[:SHOWN])}{more}): "
                    "--base CHECKPOINT, which the graph was made of, names them by content"
                )
            return [name for name, site in linear.items() if not is_output_head(site)]
        names = [name for name in target.split(",") if name]
        matched = {name: [weight for weight in linear if _matches(weight, name)] for name in names}
        if lost := [name for name, weights in matched.items() if not weights]:
            endings = sorted({module_of(weight).rpartition(".")[2] for weight in linear})
            near = [difflib.get_close_matches(name, endings, n=3, cutoff=0.5) or endings[:3] for name in lost]
            raise InputRefused(
                "; ".join(
                    f"`{name}` matches no linear layer; the nearest: {', '.join(found) or 'none'}"
                    for name, found in zip(lost, near, strict=True)
                )
            )
        return [weight for weight in linear if any(weight in weights for weights in matched.values())]

    def check_plan(self, steps: Plan) -> None:
        """Raise InputRefused where one of the adapters is in the graph already."""
        provenance.refuse_second_merge(steps, self.graph.path, self.graph.history)

    def merge(self, program: ir.Model, sites: Sites, steps: Plan, folder: Path, file_name: str) -> list[str]:
        """Carry its files over in blocks, W + ΔW in place of W; returns what lies beside the graph, as it did before.

        Raises as `merge_graph` does, of which this is the work.
        """
        for value in initializers(program):
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes < EXTERNAL_FROM:
                # Where onnxruntime infers shapes of it, it reads no other file.
                value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)
        graph = replace(self.graph, model=program)
        self._hashes = write_merged(steps, graph, sites, folder, file_name=file_name, hashing=HASHING).sources
        return [path.name for path in folder.iterdir() if path.name != file_name]

    def record(self) -> dict[str, Any]:
        """Where the graph comes from: the hashes of its files. Raises InputRefused where one has changed meanwhile."""
        base = {
            path.name: self._hashes.get(path.name) or {HASHING: file_hash(path, HASHING)} for path in self.graph.sources
        }
        for path in self.graph.changed():
            raise InputRefused(f"{path} changed while it was being read. Nothing was written.")
        order = self.order
        return provenance.record(order.adapters, order.strengths, base, self.graph.history, {"lora": order.mode})


def _matches(weight: str, name: str) -> bool:
    return f".{module_of(weight)}".endswith(f".{name}")
