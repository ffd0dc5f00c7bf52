"""Load the PyTorch model that the user named, with example inputs.

MODEL is a Hugging Face folder, `package.module:factory`, `file.py:factory` or a program of torch.export (.pt2). A
factory is the user's own code and the only code that is run. Nothing is downloaded.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from lora_export.errors import InputRefused, listed
from lora_export.lora import Adapter
from lora_export.models import sentence_transformer
from lora_export.models.diffusion import from_diffusers, is_diffusion_model
from lora_export.models.factory import find_factory, from_factory
from lora_export.models.four_bit_base import TrainedBase
from lora_export.models.huggingface import from_folder
from lora_export.models.model import Model, ModelInputs, Sizes
from lora_export.models.model_names import refuse_no_model
from lora_export.models.pt2.program_model import from_program
from lora_export.models.streamed_folder import is_streamed, load_streamed
from lora_export.options.spelling import named
from lora_export.storage import safetensors_file
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
    loaded = _load(source, adapters, head, dtype, may_add=may_add, streamed=streamed, base=base)
    return loaded if dtype is torch.float32 else _with_inputs_in(dtype, loaded)


def _with_inputs_in(dtype: torch.dtype, model: Model) -> Model:
    def make_inputs(sizes: Sizes, generator: torch.Generator) -> ModelInputs:
        inputs = model.make_inputs(sizes, generator)
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}

    note = (
        f"the model runs in {str(dtype).removeprefix('torch.')}, and its weights are rounded to it ({named('dtype')})"
    )
    return replace(model, make_inputs=make_inputs, notes=(*model.notes, note))


def _load(
    source: str,
    adapters: Sequence[Adapter],
    head: TaskHead | None,
    dtype: torch.dtype,
    *,
    may_add: bool,
    streamed: bool,
    base: TrainedBase | None,
) -> Model:
    is_diffusion = Path(source).is_dir() and is_diffusion_model(Path(source))
    if base and base.quantization and (is_diffusion or not Path(source).is_dir()):
        raise InputRefused(
            f"{named('quantize_base')} is for Hugging Face folders of transformers, and {source} is none. A "
            "factory may return a module with layers of bitsandbytes.nn.Linear4bit"
        )
    if is_diffusion:
        return from_diffusers(Path(source), dtype)
    if Path(source).is_dir():
        return from_folder(Path(source), adapters, head, dtype, may_add=may_add, streamed=streamed, base=base)
    if source.endswith(".pt2"):
        if dtype is not torch.float32:
            raise InputRefused(f"{source} has one precision, which its graph names: leave out {named('dtype')}")
        return from_program(Path(source))
    refuse_no_model(source)
    location, _, name = source.rpartition(":")
    loaded = from_factory(source, find_factory(location, name))
    return replace(loaded, module=loaded.module.to(dtype))


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
