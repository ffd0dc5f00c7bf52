"""A .pt2 program as a Model: its module, the axes that vary, and inputs made for it."""

from __future__ import annotations

from pathlib import Path

import torch

from lora_export.models.model import Model
from lora_export.models.pt2 import program
from lora_export.models.pt2.example_inputs import ProgramInputs


def from_program(path: Path) -> Model:
    """Load a .pt2 with its weights in fp32. Where it was exported in another precision, its graph runs in fp32 too.

    Raises InputRefused for a file that cannot be read or run, and for inputs that cannot be made.
    """
    module = program.load_program(path)
    inputs = ProgramInputs(module.description)
    return Model(
        source=str(path),
        module=module.to(torch.float32),
        axes=inputs.axes,
        make_inputs=inputs.make,
        traced_sizes=inputs.traced_sizes,
        limits=inputs.limits,
        notes=_notes(module, inputs),
    )


def _notes(module: program.Program, inputs: ProgramInputs) -> tuple[str, ...]:
    notes = []
    if module.file_dtype not in (None, torch.float32):
        notes.append(f"the model's .pt2 stores its weights in {str(module.file_dtype).removeprefix('torch.')}")
    fixed = [
        f"axis {axis} of {name} is {size}"
        for name, tensor in module.description.inputs.items()
        for axis, size in enumerate(tensor.sizes)
        if isinstance(size, int) and axis < 2
    ]
    if fixed and not any(inputs.axes.values()):
        notes.append(f"the model was exported for one size of every axis ({', '.join(fixed)}): no other was tried")
    return tuple(notes)
