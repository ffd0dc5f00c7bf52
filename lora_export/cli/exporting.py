"""A graph that is exported from a PyTorch model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from lora_export import layers, plan
from lora_export.cli import proving
from lora_export.cli.weaving import Order, Say
from lora_export.graph.fold import fold
from lora_export.graph.onnx_file import save
from lora_export.graph.sites import Sites
from lora_export.lora import Adapter
from lora_export.models import export
from lora_export.models.model import Model
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.weights.merge_report import MIN_RETENTION, refuse_below_rounding


class FromModel:
    """A PyTorch model as the source of a graph. See `weaving.Source`."""

    checkpoint = None

    def __init__(self, base: Model, order: Order, opset: int | None = None):
        self.base, self.order, self.opset = base, order, opset
        self.future = self._future_adapter()

    def _future_adapter(self) -> list[Adapter]:
        """An adapter without effect at the places that --target names; none where it was not given."""
        target = self.order.target
        if target is None:
            return []
        names: Any = target if target == "all-linear" else [name for name in target.split(",") if name]
        return [layers.create_adapter(self.base.module, targets=names, rank=1, alpha=1.0, seed=0, name="--target")]

    def check(self) -> None:
        """Raise InputRefused for what will not fit the graph because it does not fit the module."""
        specs = layers.specs(self.base.module)
        if self.order.adapters:
            layers.refuse_tied(self.base.module, self.order.planned(specs))
        if self.future:
            layers.refuse_tied(self.base.module, plan.make(self.future, specs, identity_ok=True))

    def program(self, stage: Say) -> ir.Model:
        """The base, exported."""
        stage("exporting the base")
        return export.to_onnx(self.base.module, self.base.example_inputs(), axes=self.base.axes, opset=self.opset)

    def targets(self, sites: Sites) -> list[str]:
        """The weights beside which adapters to come may stand."""
        if not self.future:
            return []
        return [step.weight for step in plan.make(self.future, sites.specs, identity_ok=True).steps]

    def check_plan(self, steps: plan.Plan) -> None:
        """A module that was loaded anew holds no adapter."""

    def merge(self, program: ir.Model, sites: Sites, steps: plan.Plan, folder: Path, file_name: str) -> list[str]:
        """Fold the adapters into the graph, which stands in memory, and write it; returns what lies beside it.

        Raises InputRefused where rounding leaves a weight less than half of its change.
        """
        refuse_below_rounding(fold(program, sites, steps), MIN_RETENTION)
        *beside, _ = save(program, folder, file_name)
        return [path.name for path in beside]

    def record(self) -> dict[str, Any]:
        """Where the graph comes from."""
        dtype = str(ModuleRunner(self.base.module).dtype).removeprefix("torch.")
        settings = {"lora": self.order.mode, "opset": self.opset, "dtype": dtype}
        return proving.provenance(self.base, self.order.adapters, self.order.weights, settings)
