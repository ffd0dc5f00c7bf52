"""Load the PyTorch model that the user named, with example inputs.

MODEL is a Hugging Face folder, `package.module:factory`, `file.py:factory` or a program of torch.export (.pt2). A
factory is the user's own code and the only code that is run. Nothing is downloaded. Where a config determines no
inputs, the user's own are the example.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_export.artifacts.kind import artifact_kind, refuse_no_model
from lora_export.errors import InputRefused, listed
from lora_export.layers.module_tensors import dtype_name
from lora_export.layers.torch_internals import uncompiled
from lora_export.lora import Adapter
from lora_export.models import sentence_transformer
from lora_export.models.diffusion import from_diffusers, is_diffusion_model
from lora_export.models.four_bit_base import TrainedBase
from lora_export.models.huggingface import from_folder
from lora_export.models.model import Axes, Model, ModelInputs, Sizes, in_dtype, in_dtype_of
from lora_export.models.outputs import with_dictionaries
from lora_export.models.pt2.program import from_program
from lora_export.models.refusals import failure_on, line_of_model, named_failures
from lora_export.models.stored_parameter import is_streamed, weights_in
from lora_export.models.tracing import REGISTRIES, same_state
from lora_export.options.spelling import named
from lora_export.storage import safetensors_file
from lora_export.storage.artifact_kinds import ArtifactKind
from lora_export.storage.npz import read_arrays
from lora_export.user_code import failures_of_user_code, find_function
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
    if not all(isinstance(adapter, Adapter) for adapter in adapters):
        raise InputRefused("a model is loaded for adapters in memory: give it load_adapter(PATH) in place of a path")
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
        refuse_no_model(source, "a .pt2 file")
        location, _, name = source.rpartition(":")
        made = from_factory(source, find_function(location, name))
        loaded = replace(made, module=_in_precision(dtype, made.module))
    return loaded if dtype is torch.float32 else _with_inputs_in(dtype, loaded)


def _with_inputs_in(dtype: torch.dtype, model: Model) -> Model:
    note = f"the model runs in {dtype_name(dtype)}, and its weights are rounded to it ({named('dtype')})"
    made = model.make_inputs
    return replace(model, make_inputs=lambda *wanted: in_dtype(dtype, made(*wanted)), notes=(*model.notes, note))


def module_with_weights(model: Model, path: Path) -> nn.Module:
    """A copy of the model's module with the weights of a .safetensors file.

    Of a sentence-transformers model, this is the file of the transformer. A tensor that is tied in the module may have
    one of its names in the file, or other values under each. Raises InputRefused unless the file has all of the
    module's weights and no others.
    """
    file = safetensors_file.open_file(path)  # refuses a damaged file
    state = sentence_transformer.whole_state(model.module, weights_in(file, model.module))
    module = copy.deepcopy(model.module)
    # In place where that is possible: a forward may have a parameter that is no attribute, in a list of its own.
    is_assigned = is_streamed(module) or _has_other_values(module, state)
    try:
        module.load_state_dict(state, strict=True, assign=is_assigned)
    except RuntimeError as error:
        raise InputRefused(f"{path} does not fit {model.source}:", listed(str(error).splitlines())) from error
    return module


def _has_other_values(module: nn.Module, state: Mapping[str, torch.Tensor]) -> bool:
    """Whether a state has other values under each name of a tensor that is tied in the module."""
    first: dict[int, torch.Tensor] = {}
    own = module.state_dict(keep_vars=True)
    return not all(
        torch.equal(first.setdefault(id(tensor), state[name]), state[name])
        for name, tensor in own.items()
        if name in state and isinstance(tensor, torch.Tensor)
    )


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


# --- A model that a function of the user returns: `package.module:factory` or `file.py:factory` ---


def from_module(module: nn.Module, example_inputs: Any) -> Model:
    """A model of a copy of `module`, as if a factory had returned (module, example_inputs)."""
    name = type(module).__name__
    return from_factory(name, lambda: (_copied(name, module, {}), example_inputs))


def from_factory(source: str, factory: Callable[[], Any]) -> Model:
    """Call a factory that returns (module, example_inputs). The module is put in eval mode and converted to fp32.

    So are float inputs. What `torch.compile`, DataParallel and PEFT wrap around a module is left out: it computes the
    same, and its forward does not name the inputs.
    Raises InputRefused where the factory fails, where it returns something else, where the example inputs do not fit
    the module, where the model has no weights in memory, and where it fails at another batch size.
    """
    with failures_of_user_code(source):
        result = factory()
    module, example_inputs = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(module, nn.Module):
        raise InputRefused(
            f"{source} returned {type(module).__name__}; a factory returns a module, or (module, example_inputs)"
        )
    if example_inputs is None:
        raise InputRefused(f"{source} returned a module without example inputs; return (module, example_inputs)")
    module = _unwrapped(source, module)
    _copied(source, module, {id(each): each for each in itertools.chain(module.parameters(), module.buffers())})
    module = _in_precision(torch.float32, module.eval())
    named = in_dtype(torch.float32, _named(source, module, example_inputs))
    module = with_dictionaries(module, named)
    axes, sizes = varying_axes(source, module, named)
    return Model(source, module, axes, functools.partial(resampled, named, axes), sizes)


def _in_precision(dtype: torch.dtype, module: nn.Module) -> nn.Module:
    """The module, its floats converted in place. Complex numbers, such as of rotary positions, are pairs of fp32."""
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if tensor.is_floating_point() or tensor.is_complex():  # `nn.Module.to` would drop the imaginary part
            tensor.data = tensor.data.to(torch.complex64 if tensor.is_complex() else dtype)
    return module


def _copied(source: str, module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy. Exports and proofs make some: InputRefused, with the attribute, where a module cannot be copied."""
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:  # of any code
        attributes = [f"{path}.{name}".lstrip(".") for path, part in module.named_modules() for name in _uncopied(part)]
        which = f"its attribute {attributes[0]}: " if attributes else ""
        raise InputRefused(
            f"{source} cannot be copied, which an export and its proof need ({which}{error})",
            "Make such a thing where it is used, or give its class a __deepcopy__.",
        ) from error


def _uncopied(part: nn.Module) -> Iterator[str]:
    for name, value in vars(part).items():
        try:
            copy.deepcopy(None if name in REGISTRIES else value)
        except Exception:  # noqa: BLE001  of any code
            yield name


def _unwrapped(source: str, module: nn.Module) -> nn.Module:
    """The module without what is around it. Raises InputRefused for what no exporter can run."""
    outer: nn.Module | None = None
    while outer is not module:
        outer = module
        if isinstance(module, torch.jit.ScriptModule):
            raise InputRefused(f"{source} is a module of TorchScript: give the module that it was made from")
        inner: Any = uncompiled(module)
        if isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = inner.module
        if type(inner).__module__ == "peft.peft_model" and not inner.active_peft_config.is_prompt_learning:
            inner = inner.get_base_model()
        module = inner
    if any(tensor.is_meta for tensor in itertools.chain(module.parameters(), module.buffers())):
        raise InputRefused(f"{source} has weights on the device meta, which have no values: load them first")
    return module


# --- Example inputs ---


def _named(source: str, module: nn.Module, example_inputs: Any) -> ModelInputs:
    """The example inputs by the names of forward's parameters."""
    parameters = list(inspect.signature(module.forward).parameters)
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    by_name = isinstance(example_inputs, Mapping)
    named = dict(example_inputs) if by_name else dict(zip(parameters, example_inputs, strict=False))
    unknown = [name for name in named if name not in parameters]
    if unknown or (not by_name and len(example_inputs) > len(parameters)):
        raise InputRefused(f"{source}: the example inputs do not fit forward({', '.join(parameters)})")
    if not named or not all(isinstance(value, torch.Tensor) for value in named.values()):
        raise InputRefused(f"{source}: example inputs are tensors, as one tensor, a tuple, or a dict by name")
    if any(value.is_meta for value in named.values()):
        raise InputRefused(f"{source}: the example inputs are on the device meta, and have no values")
    return {name: named[name].detach() for name in parameters if name in named}


def varying_axes(source: str, module: nn.Module, example_inputs: ModelInputs) -> tuple[Axes, Sizes]:
    """The axes that may vary, found by running the module at other sizes, and the sizes of the example inputs.

    Axes of equal size are taken to vary together.
    """
    every = _named_axes(source, example_inputs)
    sizes = {symbol: example_inputs[name].shape[axis] for name, axes in every.items() for axis, symbol in axes.items()}
    generator = torch.Generator().manual_seed(0)
    varying = set()
    for symbol, size in sizes.items():
        trial = resampled(example_inputs, every, {**sizes, symbol: size + 1}, generator)
        try:
            with torch.no_grad():
                module(**trial)
        except Exception as error:  # any exception of the user's model means that this size is fixed
            if symbol == "batch":
                if cause := failure_on(module, example_inputs):
                    raise InputRefused(f"{source}: {cause}{line_of_model(module, error)}") from error
                why = f"{size + 1}: {error}{line_of_model(module, error)}"
                raise InputRefused(f"{source}: the model fails at another batch size, {why}") from error
        else:
            varying.add(symbol)
    axes = {name: {axis: each for axis, each in own.items() if each in varying} for name, own in every.items()}
    return axes, {symbol: sizes[symbol] for symbol in varying}


def _named_axes(source: str, example_inputs: ModelInputs) -> Axes:
    """A symbol for each axis of each input. The first axis is `batch`; others are named after the first of their size.

    Raises InputRefused unless all inputs have numbers, and one batch size of at least 2.
    """
    if empty := [f"{name} {list(value.shape)}" for name, value in example_inputs.items() if not value.numel()]:
        raise InputRefused(f"{source}: example inputs have no numbers: {', '.join(empty)}. Inputs are made like these")
    batches = {value.shape[0] for value in example_inputs.values() if value.ndim}
    if len(batches) != 1 or batches == {1}:
        raise InputRefused(
            f"{source}: the example inputs' first axis is the batch, the same in all of them and at least 2 "
            f"(a single row is taken for a constant when a model is traced); here it is {sorted(batches)}"
        )
    by_size: dict[int, str] = {}
    return {
        name: {
            axis: by_size.setdefault(size, f"{name}_axis{axis}") if axis else "batch"
            for axis, size in enumerate(value.shape)
        }
        for name, value in example_inputs.items()
    }


def resampled(example_inputs: ModelInputs, axes: Axes, sizes: Sizes, generator: torch.Generator) -> ModelInputs:
    """New inputs like the example ones: floats of the same mean and deviation, integers and masks from its rows."""
    resampled = {}
    for name, example in example_inputs.items():
        shape = [sizes.get(axes[name].get(axis, ""), size) for axis, size in enumerate(example.shape)]
        if (found := _mean_and_deviation(example)) is not None:
            mean, deviation = found
            noise = torch.randn(shape, generator=generator, dtype=torch.float32)
            resampled[name] = (mean + deviation * noise).to(example.dtype)
        else:
            # Rows of the example, cut or repeated: ids stay in range and no mask hides a whole row.
            rows = example[torch.randint(0, example.shape[0], (shape[0],), generator=generator)] if shape else example
            for axis, size in itertools.islice(enumerate(shape), 1, None):
                rows = rows.index_select(axis, torch.arange(size) % example.shape[axis])
            resampled[name] = rows
    return resampled


def _mean_and_deviation(example: torch.Tensor) -> tuple[float, float] | None:
    """Those of floats; None for integers, infinite floats, and masks: floats of two values whose rows differ."""
    if not example.is_floating_point():
        return None
    if 2 == len(example.unique()) < example.numel() and bool((example != example[0]).any()):
        return None
    mean, deviation = float(example.mean()), float(example.std()) if example.numel() > 1 else 0.0
    return (mean, deviation or 1.0) if math.isfinite(mean) and math.isfinite(deviation) else None
