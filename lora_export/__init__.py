"""Merge LoRA adapters or keep them as graph nodes, export, and prove that nothing was lost.

The public names below are imported when they are first used: `import lora_export` loads nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lora_export.version import __version__ as __version__

if TYPE_CHECKING:
    from lora_export.api.adapters import combine, extract, resize
    from lora_export.api.check import check
    from lora_export.api.convert import convert
    from lora_export.api.generate import generate
    from lora_export.api.inspect import inspect
    from lora_export.api.merge import merge
    from lora_export.api.onnx import export_onnx
    from lora_export.api.torchscript import export_torchscript
    from lora_export.api.train import train
    from lora_export.api.unmerge import unmerge
    from lora_export.api.verify import verify
    from lora_export.fleet.command import run_fleet
    from lora_export.formats import load as load_adapter
    from lora_export.layers import attach, count_parameters, create_adapter, detach
    from lora_export.layers import fold as fold_module
    from lora_export.layers import specs as module_specs
    from lora_export.lora import Adapter, LoraPair
    from lora_export.models.load import load_model
    from lora_export.options.combining import Combination
    from lora_export.options.reading import ReadOptions
    from lora_export.options.verify import Expectations
    from lora_export.plan import Plan, TensorSpec
    from lora_export.plan import make as make_plan
    from lora_export.runtime.adapter_slots import AdapterSlots
    from lora_export.runtime.onnx_runner import OnnxRunner
    from lora_export.runtime.session import Session
    from lora_export.runtime.torch_runners import ModuleRunner
    from lora_export.runtime.torchscript.runner import ScriptRunner
    from lora_export.storage.atomic_output import stage_file, stage_folder
    from lora_export.verification.against_graph import GraphReferences
    from lora_export.verification.against_pytorch import PyTorchReferences
    from lora_export.verification.proof import prove
    from lora_export.verification.proof_session import ProofSession
    from lora_export.weights.checkpoint import open_checkpoint
    from lora_export.weights.merge import merge_checkpoint

# public name -> where it lives
_HOMES = {
    "Adapter": "lora:Adapter",
    "AdapterSlots": "runtime.adapter_slots:AdapterSlots",
    "Combination": "options.combining:Combination",
    "Expectations": "options.verify:Expectations",
    "GraphReferences": "verification.against_graph:GraphReferences",
    "LoraPair": "lora:LoraPair",
    "ModuleRunner": "runtime.torch_runners:ModuleRunner",
    "OnnxRunner": "runtime.onnx_runner:OnnxRunner",
    "Plan": "plan:Plan",
    "ProofSession": "verification.proof_session:ProofSession",
    "PyTorchReferences": "verification.against_pytorch:PyTorchReferences",
    "ReadOptions": "options.reading:ReadOptions",
    "ScriptRunner": "runtime.torchscript.runner:ScriptRunner",
    "Session": "runtime.session:Session",
    "TensorSpec": "plan:TensorSpec",
    "attach": "layers:attach",
    "check": "api.check:check",
    "combine": "api.adapters:combine",
    "convert": "api.convert:convert",
    "count_parameters": "layers:count_parameters",
    "create_adapter": "layers:create_adapter",
    "detach": "layers:detach",
    "export_onnx": "api.onnx:export_onnx",
    "export_torchscript": "api.torchscript:export_torchscript",
    "extract": "api.adapters:extract",
    "fold_module": "layers:fold",
    "generate": "api.generate:generate",
    "inspect": "api.inspect:inspect",
    "load_adapter": "formats:load",
    "load_model": "models.load:load_model",
    "make_plan": "plan:make",
    "merge": "api.merge:merge",
    "merge_checkpoint": "weights.merge:merge_checkpoint",
    "module_specs": "layers:specs",
    "open_checkpoint": "weights.checkpoint:open_checkpoint",
    "prove": "verification.proof:prove",
    "resize": "api.adapters:resize",
    "run_fleet": "fleet.command:run_fleet",
    "stage_file": "storage.atomic_output:stage_file",
    "stage_folder": "storage.atomic_output:stage_folder",
    "train": "api.train:train",
    "unmerge": "api.unmerge:unmerge",
    "verify": "api.verify:verify",
}

__all__ = [
    "Adapter",
    "AdapterSlots",
    "Combination",
    "Expectations",
    "GraphReferences",
    "LoraPair",
    "ModuleRunner",
    "OnnxRunner",
    "Plan",
    "ProofSession",
    "PyTorchReferences",
    "ReadOptions",
    "ScriptRunner",
    "Session",
    "TensorSpec",
    "attach",
    "check",
    "combine",
    "convert",
    "count_parameters",
    "create_adapter",
    "detach",
    "export_onnx",
    "export_torchscript",
    "extract",
    "fold_module",
    "generate",
    "inspect",
    "load_adapter",
    "load_model",
    "make_plan",
    "merge",
    "merge_checkpoint",
    "module_specs",
    "open_checkpoint",
    "prove",
    "resize",
    "run_fleet",
    "stage_file",
    "stage_folder",
    "train",
    "unmerge",
    "verify",
]


if not TYPE_CHECKING:  # with it, a type checker would accept every name

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, _, attribute = _HOMES[name].partition(":")
        return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
