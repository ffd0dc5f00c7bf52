"""A candidate compared with PyTorch module by module: within the memory there is, and without a failure of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from lora_export.errors import LoraExportError
from lora_export.models.pt2.program import Program
from lora_export.plan import Plan
from lora_export.runtime.memory import GIB, available_memory
from lora_export.runtime.runner import Arrays, Runner
from lora_export.runtime.torch_runners import Fp64Runner, ModuleRunner
from lora_export.verification import parity
from lora_export.verification.diagnose.diagnosis_case import DiagnosisCase
from lora_export.verification.diagnose.localize import diagnose
from lora_export.verification.module_copies import converted_copy, fp64_bytes, is_large, to_double
from lora_export.verification.references import Diagnosed
from lora_export.verification.references.attached_module import AttachedModule

# What ends a diagnosis without one: our errors, and those of PyTorch and NumPy for an unusual model.
CANNOT_FOLLOW = (LoraExportError, RuntimeError, ValueError, MemoryError)


def diagnose_module(
    candidate: Runner,
    attached: AttachedModule,
    deployed: Callable[[], ModuleRunner],
    base: nn.Module,
    changes: Plan | None,
    case: parity.Case,
    inputs: Arrays,
    *,
    every: bool,
) -> Diagnosed:
    """Compare the modules of a candidate with PyTorch's in one case. Returns notes, too; raises nothing.

    `base` is the module without adapters; `deployed` returns the runner of PyTorch as deployed.
    """
    watched = [base, *([candidate.module] if isinstance(candidate, ModuleRunner) else [])]
    unseen = [name for module in watched if isinstance(module, Program) for name in module.unobserved_weights]
    if unseen:
        return None, [
            f"modules were not compared: {unseen[0]} and {len(unseen) - 1} more weights of the .pt2 are multiplied "
            "by operators that belong to no layer"
        ]
    is_large_model = is_large(attached.module)
    copies = 0 if is_large_model else 2 if attached.rounding else 1
    needed = copies * fp64_bytes(attached.module)
    if (available := available_memory()) is not None and needed > available:
        gib = f"{needed / GIB:.1f} GiB of memory, and {available / GIB:.1f} GiB are available"
        return None, [f"modules were not compared: this needs {gib}"]
    try:
        peer, wide = deployed(), attached  # the weights of a large model are widened where they are used
        if not is_large_model:
            wide = replace(wide, module=converted_copy(wide.module, to_double))
        unrounded = Fp64Runner(wide.module)
        reference = Fp64Runner(wide.ready or wide.rounded_module()) if wide.rounding else unrounded
        keep_replaced = attached.has_pairs
        made = DiagnosisCase(
            candidate, reference, unrounded, peer, base, changes, inputs, case, keep_replaced=keep_replaced
        )
        return diagnose(made, every=every), []
    except CANNOT_FOLLOW as error:
        return None, [f"modules could not be compared: {(str(error) or repr(error)).splitlines()[0]}"]
