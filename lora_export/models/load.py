"""The module and example inputs that the user named.

MODEL is a Hugging Face folder, `package.module:factory`, `file.py:factory` or a program of torch.export's (.pt2). A
factory is the user's own code and the only code that is run; nothing is downloaded.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from lora_export.errors import InputRefused
from lora_export.lora import Adapter
from lora_export.models.factory import find_factory, from_factory
from lora_export.models.huggingface import from_folder
from lora_export.models.model import Inputs, Model, Sizes
from lora_export.models.pt2 import program
from lora_export.models.pt2.example_inputs import Signature
from lora_export.storage import safetensors_file


def load_model(
    source: str,
    adapters: Sequence[Adapter] = (),
    *,
    labels: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Load the model; where the adapters bring a task head, with that head (its weights still fresh).

    With `labels`, a Hugging Face model gets a fresh head that sorts texts into them. In another `dtype` it is what
    transformers loads in that, or what a factory returns turned to it; its float inputs are in it too.

    Raises InputRefused for what cannot be found or understood, and EnvironmentLacking where
    transformers is needed and missing.
    """
    made = _load(source, adapters, labels, dtype)
    if dtype is torch.float32:
        return made

    def make(sizes: Sizes, generator: torch.Generator) -> Inputs:
        inputs = made.make(sizes, generator)
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}

    note = f"the model is taken in {str(dtype).removeprefix('torch.')}: its weights are rounded to it (--dtype)"
    return replace(made, make=make, notes=(*made.notes, note))


def _load(source: str, adapters: Sequence[Adapter], labels: Sequence[str], dtype: torch.dtype) -> Model:
    if Path(source).is_dir():
        return from_folder(Path(source), adapters, labels, dtype)
    if source.endswith(".pt2"):
        if dtype is not torch.float32:
            raise InputRefused(f"{source} is a program of one precision, which its graph names: it takes no --dtype")
        return _exported(Path(source))
    place, separator, name = source.rpartition(":")
    if not separator or not place or not name:
        raise InputRefused(
            f"{source!r} is no model: give a Hugging Face folder that exists, `package.module:factory`, "
            "`file.py:factory` or a .pt2 file"
        )
    made = from_factory(source, find_factory(place, name))
    return replace(made, module=made.module.to(dtype))


def with_weights(model: Model, path: Path) -> nn.Module:
    """A copy of the model's module with the weights of a .safetensors file, all of them and no others."""
    safetensors_file.open_file(path)
    module = copy.deepcopy(model.module)
    try:
        module.load_state_dict(load_file(path), strict=True)
    except RuntimeError as error:
        raise InputRefused(f"{path} does not fit {model.source}: {error}") from error
    return module


# --- Hugging Face -------------------------------------------------------------------------------


# --- a program of torch.export's ----------------------------------------------------------------


def _exported(path: Path) -> Model:
    """A .pt2 with its weights in fp32; where it was exported in another precision, its graph computes in fp32 too."""
    module = program.load(path)
    signature = Signature(module.source)
    notes = []
    if module.file_dtype not in (None, torch.float32):
        notes.append(f"the model's .pt2 keeps its weights in {str(module.file_dtype)[6:]}")
    fixed = [
        f"axis {axis} of {name} is {size}"
        for name, tensor in module.source.inputs.items()
        for axis, size in enumerate(tensor.sizes)
        if isinstance(size, int) and axis < 2
    ]
    if fixed and not any(signature.axes.values()):
        notes.append(f"the model was exported for one size of every axis ({', '.join(fixed)}): no other was tried")
    return Model(
        source=str(path),
        module=module.to(torch.float32),
        axes=signature.axes,
        make=signature.make,
        sizes=signature.traced,
        limits=signature.limits,
        notes=tuple(notes),
    )


# --- the user's own code ------------------------------------------------------------------------
