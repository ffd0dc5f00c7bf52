"""Merge LoRA adapters or keep them as graph nodes, export, and prove that nothing was lost.

The public names below are imported when they are first used: `import lora_export` loads nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lora_export.checkpoint import open_checkpoint
    from lora_export.formats import load as load_adapter
    from lora_export.layers import attach, detach, fresh_adapter, trainable
    from lora_export.layers import fold as fold_module
    from lora_export.layers import specs as module_specs
    from lora_export.lora import Adapter, LoraPair
    from lora_export.merge import merge_checkpoint
    from lora_export.model import load as load_model
    from lora_export.plan import Plan, TensorSpec
    from lora_export.plan import make as make_plan
    from lora_export.proof import prove
    from lora_export.runtime import ModuleRunner, OnnxRunner, ScriptRunner
    from lora_export.session import Session
    from lora_export.staging import stage_file, stage_folder

# public name -> where it lives
_HOMES = {
    "Adapter": "lora:Adapter",
    "LoraPair": "lora:LoraPair",
    "ModuleRunner": "runtime:ModuleRunner",
    "OnnxRunner": "runtime:OnnxRunner",
    "Plan": "plan:Plan",
    "ScriptRunner": "runtime:ScriptRunner",
    "Session": "session:Session",
    "TensorSpec": "plan:TensorSpec",
    "attach": "layers:attach",
    "detach": "layers:detach",
    "fold_module": "layers:fold",
    "fresh_adapter": "layers:fresh_adapter",
    "load_adapter": "formats:load",
    "load_model": "model:load",
    "make_plan": "plan:make",
    "merge_checkpoint": "merge:merge_checkpoint",
    "module_specs": "layers:specs",
    "open_checkpoint": "checkpoint:open_checkpoint",
    "prove": "proof:prove",
    "stage_file": "staging:stage_file",
    "stage_folder": "staging:stage_folder",
    "trainable": "layers:trainable",
}

__all__ = [
    "Adapter",
    "LoraPair",
    "ModuleRunner",
    "OnnxRunner",
    "Plan",
    "ScriptRunner",
    "Session",
    "TensorSpec",
    "attach",
    "detach",
    "fold_module",
    "fresh_adapter",
    "load_adapter",
    "load_model",
    "make_plan",
    "merge_checkpoint",
    "module_specs",
    "open_checkpoint",
    "prove",
    "stage_file",
    "stage_folder",
    "trainable",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
