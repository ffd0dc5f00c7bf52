"""The user's own inputs as the example of a Hugging Face model whose inputs cannot be generated."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path

import torch

from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.models.factory import resampled, varying_axes
from lora_export.models.failures import named_failures
from lora_export.models.model import Model, in_dtype_of
from lora_export.storage.npz import read_arrays


def with_inputs_from(path: Path, model: Model) -> Model:
    """The model with generated inputs that are like those in an .npz file, where others cannot be had.

    That is so where the config determines no inputs, where the model fails on the generated ones, and where the file
    has more inputs. Otherwise the model itself is returned. Runs the model.
    Raises InputRefused for arrays that forward does not take, and RuntimeRefused where the model fails on the file's.
    """
    arrays = read_arrays(path)
    takes = list(inspect.signature(model.module.forward).parameters)
    unknown = [name for name in arrays if name not in takes]
    if model.axes and (unknown or set(arrays) <= set(model.axes)) and _runs(model):
        return model
    if unknown or not arrays:
        raise InputRefused(f"{path} contains {', '.join(arrays) or 'nothing'}; the model takes {', '.join(takes)}")
    example = in_dtype_of(model.module, {name: torch.from_numpy(arrays[name]) for name in takes if name in arrays})
    with named_failures(model.module, example, f"inputs in {path}"), torch.no_grad():
        model.module(**example)
    axes, sizes = varying_axes(str(path), model.module, example)
    note = f"the generated inputs are like those in {path}"
    return replace(
        model,
        axes=axes,
        make_inputs=lambda wanted, generator: resampled(example, axes, wanted, generator),
        traced_sizes=sizes,
        steps={},
        notes=(*model.notes, note),
        not_judged=(),
        derive=None,
        text_only=None,
    )


def _runs(model: Model) -> bool:
    """Whether the model computes something of its generated inputs."""
    inputs = model.example_inputs()
    try:
        with named_failures(model.module, inputs), torch.no_grad():
            model.module(**inputs)
    except RuntimeRefused:
        return False
    return True
