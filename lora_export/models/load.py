"""Load the PyTorch model that the user named, with example inputs.

MODEL is a Hugging Face folder, `package.module:factory`, `file.py:factory` or a program of torch.export (.pt2). A
factory is the user's own code and the only code that is run. Nothing is downloaded. Where a config determines no
inputs, the user's own are the example.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from lora_export.artifacts.artifact import ArtifactKind, artifact_kind, refuse_no_model
from lora_export.errors import InputRefused, listed
from lora_export.lora import Adapter
from lora_export.models import sentence_transformer
from lora_export.models.diffusion import from_diffusers, is_diffusion_model
from lora_export.models.factory import from_factory, resampled, varying_axes
from lora_export.models.four_bit_base import TrainedBase
from lora_export.models.huggingface import from_folder
from lora_export.models.model import Model, in_dtype, in_dtype_of
from lora_export.models.pt2.program_model import from_program
from lora_export.models.stored_parameter import is_streamed, load_streamed
from lora_export.models.tracing import failure_on, named_failures, same_state
from lora_export.options.spelling import named
from lora_export.storage import safetensors_file
from lora_export.storage.npz import read_arrays
from lora_export.user_code import find_function
from lora_export.weights.task_head import TaskHead


def load_model(
    source: str,
    adapters: Sequence[Adapter] = (),
    *,
    head: TaskHead | None = None,
    dtype: torch.dtype = torch.float32,
    may_add: bool = False,
    streamed: bool = False,
    base: TrainedBase | None = None,
) -> Model:
    """Load a model. Where the adapters bring a task head, the model gets that head, with new weights.

    With `head`, a Hugging Face model gets this head, with new weights where it has none. With `may_add`, weights that a
    folder lacks get random values, to be trained (`new_weights` of the model names them). In another `dtype`,
    transformers loads the model in it, or a factory's module is converted to it; so are the float inputs. With
    `streamed`, the weights of a large folder are read whenever something computes with them: to run it, not to change.
    With `base`, linear layers of a Hugging Face model may have frozen weights of 4 bits.

    Raises InputRefused for a model that cannot be found or understood, and EnvironmentLacking where
    transformers is needed and missing.
    """
    path = Path(source)
    is_diffusion = path.is_dir() and is_diffusion_model(path)
    if base and base.quantization and (is_diffusion or not path.is_dir()):
        raise InputRefused(
            f"{named('quantize_base')} is for Hugging Face folders of transformers, and {source} is none. A "
            "factory may return a module with layers of bitsandbytes.nn.Linear4bit"
        )
    if is_diffusion:
        loaded = from_diffusers(path, dtype)
    elif path.is_dir():
        loaded = from_folder(path, adapters, head, dtype, may_add=may_add, streamed=streamed, base=base)
    elif artifact_kind(path) is ArtifactKind.PROGRAM:
        if dtype is not torch.float32:
            raise InputRefused(f"{source} has one precision, which its graph names: leave out {named('dtype')}")
        loaded = from_program(path)
    else:
        refuse_no_model(source)
        location, _, name = source.rpartition(":")
        made = from_factory(source, find_function(location, name))
        loaded = replace(made, module=made.module.to(dtype))
    return loaded if dtype is torch.float32 else _with_inputs_in(dtype, loaded)


def _with_inputs_in(dtype: torch.dtype, model: Model) -> Model:
    name = str(dtype).removeprefix("torch.")
    note = f"the model runs in {name}, and its weights are rounded to it ({named('dtype')})"
    made = model.make_inputs
    return replace(model, make_inputs=lambda *wanted: in_dtype(dtype, made(*wanted)), notes=(*model.notes, note))


def module_with_weights(model: Model, path: Path) -> nn.Module:
    """A copy of the model's module with the weights of a .safetensors file.

    Of a sentence-transformers model, this is the file of the transformer. Raises InputRefused unless the file has all
    of the module's weights and no others.
    """
    file = safetensors_file.open_file(path)  # refuses a damaged file
    module = copy.deepcopy(model.module)
    try:
        if is_streamed(module):
            load_streamed(module, file)
        else:
            module.load_state_dict(sentence_transformer.whole_state(module, load_file(path)), strict=True)
    except RuntimeError as error:
        raise InputRefused(f"{path} does not fit {model.source}:", listed(str(error).splitlines())) from error
    return module


def with_inputs_from(path: Path, model: Model) -> Model:
    """The model with generated inputs that are like those in an .npz file, where others cannot be had.

    That is so where the config determines no inputs, where the model fails on the generated ones, and where the file
    has more inputs. Otherwise the model itself is returned. Runs the model.
    Raises InputRefused for arrays that forward does not take, and RuntimeRefused where the model fails on the file's.
    """
    arrays = read_arrays(path)
    takes = list(inspect.signature(model.module.forward).parameters)
    unknown = [name for name in arrays if name not in takes]
    may_stay = model.axes and (unknown or set(arrays) <= set(model.axes))
    if may_stay and not failure_on(model.module, model.example_inputs()):
        return model
    if unknown or not arrays:
        raise InputRefused(f"{path} contains {', '.join(arrays) or 'nothing'}; the model takes {', '.join(takes)}")
    example = in_dtype_of(model.module, {name: torch.from_numpy(arrays[name]) for name in takes if name in arrays})
    with named_failures(model.module, example, f"inputs in {path}"), torch.no_grad(), same_state(model.module):
        model.module(**example)
    axes, sizes = varying_axes(str(path), model.module, example)
    notes = (*model.notes, f"the generated inputs are like those in {path}")
    make = functools.partial(resampled, example, axes)
    others: dict[str, Any] = {"steps": {}, "not_judged": (), "derive": None, "text_only": None}
    return replace(model, axes=axes, make_inputs=make, traced_sizes=sizes, notes=notes, **others)
