"""The module and example inputs that the user named.

MODEL is a Hugging Face folder, `package.module:factory`, `file.py:factory` or a program of torch.export's (.pt2). A
factory is the user's own code and the only code that is run; nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from lora_export import files, tensorfile
from lora_export.checkpoint import CONFIG, code_of_its_own, open_checkpoint
from lora_export.errors import EnvironmentLacking, InputRefused
from lora_export.exported import program
from lora_export.exported.specimens import Limits, Signature, padding_mask
from lora_export.head import config_for_labels, config_with_heads
from lora_export.lora import Adapter

Inputs = dict[str, torch.Tensor]
Axes = dict[str, dict[int, str]]  # input -> axis -> the size's symbol
Sizes = dict[str, int]  # symbol -> size
Make = Callable[[Sizes, torch.Generator], Inputs]

# Sizes to trace with: two rows and more, since a size of one is taken for a constant.
TRACED = {"batch": 2, "sequence": 11, "target": 7}
# Sizes to check at: none of them is the traced one, and one batch has a single row.
CHECKED = (
    {"batch": 1, "sequence": 7, "target": 5},
    {"batch": 3, "sequence": 16, "target": 9},
    {"batch": 5, "sequence": 29, "target": 13},
)


@dataclass(frozen=True, eq=False)
class Model:
    """A PyTorch model as the user named it, adapters not applied, in eval mode, and in fp32 unless told otherwise."""

    source: str
    module: nn.Module
    axes: Axes  # the axes whose sizes may vary, by input, in the order of forward's parameters
    make: Make
    sizes: Sizes  # what the example inputs are made with
    is_huggingface: bool = False
    limits: Limits = field(default_factory=dict)  # sizes that a symbol may have, where not any
    notes: tuple[str, ...] = ()  # what a verdict on it has to say

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(self.axes)

    def examples(self) -> Inputs:
        """The inputs to trace with. The same on every call."""
        return self.inputs(self.sizes, seed=0)

    def inputs(self, sizes: Mapping[str, int], *, seed: int) -> Inputs:
        """Seeded inputs of these sizes; symbols that `sizes` lacks keep their traced size."""
        return self.make({**self.sizes, **sizes}, torch.Generator().manual_seed(seed))

    def fingerprint(self) -> str:
        """The SHA-256 of all weights with their names."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def checked_sizes(self, fixed: Mapping[str, int], limits: Limits | None = None) -> list[Sizes]:
        """Three sets of sizes that differ from the traced ones in every dynamic axis, but for the `fixed` ones.

        They stay within the model's `limits`, and within those that are given.
        """
        symbols = sorted({symbol for axes in self.axes.values() for symbol in axes.values()})
        sets = []
        for number, chosen in enumerate(CHECKED):
            sizes = {symbol: chosen.get(symbol, self.sizes[symbol] + 1 + 2 * number) for symbol in symbols}
            for low_high in (self.limits, limits or {}):
                for symbol, (low, high) in low_high.items():
                    if symbol in sizes:
                        least = max(sizes[symbol], low)
                        sizes[symbol] = least if high is None else min(least, high)
            sets.append({**sizes, **fixed})
        return sets


def load(
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
        return _huggingface(Path(source), adapters, labels, dtype)
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
    made = _from_factory(source, _find_factory(place, name))
    return replace(made, module=made.module.to(dtype))


def of_module(module: nn.Module, examples: Any) -> Model:
    """A module in hand with its example inputs, as a factory would return them; the module itself stays as it is."""
    return _from_factory(type(module).__name__, lambda: (copy.deepcopy(module), examples))


def with_weights(model: Model, path: Path) -> nn.Module:
    """A copy of the model's module with the weights of a .safetensors file, all of them and no others."""
    tensorfile.open_file(path)
    module = copy.deepcopy(model.module)
    try:
        module.load_state_dict(load_file(path), strict=True)
    except RuntimeError as error:
        raise InputRefused(f"{path} does not fit {model.source}: {error}") from error
    return module


def load_tokenizer(model: Model) -> Any:
    """The tokenizer that lies in a Hugging Face model's folder. Raises InputRefused where there is none."""
    if not model.is_huggingface:
        raise InputRefused(f"{model.source} has no tokenizer: it is no Hugging Face folder. Give arrays (.npz)")
    transformers = _transformers()
    with _quiet(transformers):
        try:
            return transformers.AutoTokenizer.from_pretrained(model.source, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputRefused(f"{model.source} has no tokenizer: {str(error).splitlines()[0]}") from error


# --- Hugging Face -------------------------------------------------------------------------------


def _huggingface(folder: Path, adapters: Sequence[Adapter], labels: Sequence[str], dtype: torch.dtype) -> Model:
    open_checkpoint(folder)  # refuses what is damaged, quantised or pickled before anything is built from it
    if not (folder / CONFIG).is_file():
        raise InputRefused(f"{folder} has no {CONFIG}: it holds weights, but does not say of which model")
    raw = config_with_heads(files.read_json(folder / CONFIG), adapters)
    if labels:
        if not raw.get("architectures"):
            raise InputRefused(f"{folder / CONFIG} names no architecture, so that I cannot tell its classifier")
        raw = config_for_labels(raw, labels)
    if code := code_of_its_own(raw):
        raise InputRefused(
            f"{folder / CONFIG} names code of its own ({code}), which is never run from here. Build the model in a "
            "factory, `file.py:factory`, where you trust it"
        )
    if "model_type" not in raw:
        raise InputRefused(f"{folder / CONFIG} has no model_type")
    transformers = _transformers()
    with _quiet(transformers):
        try:
            config = transformers.AutoConfig.for_model(**raw)
        except (ValueError, KeyError) as error:
            raise InputRefused(f"{folder / CONFIG}: transformers does not know this model ({error})") from error
        architecture = (raw.get("architectures") or ["AutoModel"])[0]
        cls = getattr(transformers, architecture, None)
        if cls is None:
            raise InputRefused(f"{folder / CONFIG}: transformers has no class {architecture}")
        if getattr(config, "use_cache", False):
            config.use_cache = False  # a graph without a cache: one call, one answer
        try:
            module = cls.from_pretrained(folder, config=config, local_files_only=True, dtype=dtype)
        except (OSError, ValueError, RuntimeError) as error:
            raise InputRefused(f"{folder}: transformers cannot load it as {architecture}: {error}") from error
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        # Out of the mapped file: who cuts that short meanwhile would end this process, and a proof that widens the
        # model tensor by tensor would hold all of both.
        tensor.data = tensor.data.clone()
    module.eval()
    axes, make = _huggingface_inputs(module)
    sizes = {symbol: TRACED[symbol] for symbol in {symbol for there in axes.values() for symbol in there.values()}}
    return Model(str(folder), module, axes, make, sizes, is_huggingface=True)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise EnvironmentLacking(
            f"a Hugging Face model needs transformers ({error}): pip install 'lora-export[hf]'"
        ) from error


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and no load report: a head that is still fresh is what we asked for."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def _huggingface_inputs(module: Any) -> tuple[Axes, Make]:
    """What the model takes and how to make it: ids in range, masks with padding, images of the right size."""
    config = module.config
    takes = set(inspect.signature(module.forward).parameters)
    if module.main_input_name == "pixel_values":
        height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size

        def make_images(sizes: Sizes, generator: torch.Generator) -> Inputs:
            shape = (sizes["batch"], config.num_channels, height, width)
            return {"pixel_values": torch.rand(shape, generator=generator) * 2 - 1}

        return {"pixel_values": {0: "batch"}}, make_images
    if module.main_input_name != "input_ids":
        raise InputRefused(
            f"{type(module).__name__} takes {module.main_input_name}, for which I cannot make inputs yet. Wrap it in a "
            "factory that returns (module, example_inputs)"
        )
    text = config.get_text_config()
    token_types = getattr(text, "type_vocab_size", 0) or 0

    def make_text(sizes: Sizes, generator: torch.Generator) -> Inputs:
        shape = (sizes["batch"], sizes["sequence"])
        inputs = {"input_ids": torch.randint(0, text.vocab_size, shape, generator=generator)}
        inputs["attention_mask"] = padding_mask(shape, generator)
        if "token_type_ids" in takes and token_types > 1:
            inputs["token_type_ids"] = torch.randint(0, token_types, shape, generator=generator)
        if "decoder_input_ids" in takes:
            target = (sizes["batch"], sizes["target"])
            inputs["decoder_input_ids"] = torch.randint(0, text.vocab_size, target, generator=generator)
        return inputs

    names = make_text(TRACED, torch.Generator().manual_seed(0))
    axes = {name: {0: "batch", 1: "target" if name.startswith("decoder") else "sequence"} for name in names}
    return axes, make_text


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


def _find_factory(place: str, name: str) -> Callable[[], Any]:
    module: Any
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise InputRefused(f"there is no file {path}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)  # so that what it defines can be pickled and deep-copied
        with _their_failures(place):
            spec.loader.exec_module(module)
    else:
        if str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))  # a package in the current folder; last, so that it shadows nothing
        with _their_failures(place):
            try:
                module = importlib.import_module(place)
            except ModuleNotFoundError as error:
                raise InputRefused(f"cannot import {place}: {error}") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputRefused(f"{place} has no function {name}; it has {', '.join(known) or 'none'}")
    return factory  # type: ignore[no-any-return]


@contextlib.contextmanager
def _their_failures(source: str) -> Iterator[None]:
    """What goes wrong in the user's own code, told with its place."""
    try:
        yield
    except InputRefused:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise InputRefused(
            f"{source} failed at {place.filename}:{place.lineno}: {type(error).__name__}: {error}"
        ) from error


def _from_factory(source: str, factory: Callable[[], Any]) -> Model:
    with _their_failures(source):
        made = factory()
    module, examples = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        raise InputRefused(
            f"{source} returned {type(module).__name__}; a factory returns a module, or (module, example_inputs)"
        )
    if examples is None:
        raise InputRefused(f"{source} returned a module without example inputs; return (module, example_inputs)")
    module.eval().to(torch.float32)
    named = _named(source, module, examples)
    axes, sizes = _varying_axes(source, module, named)
    return Model(source, module, axes, lambda wanted, generator: _resampled(named, axes, wanted, generator), sizes)


def _named(source: str, module: nn.Module, examples: Any) -> Inputs:
    """Example inputs under the names of forward's parameters."""
    parameters = list(inspect.signature(module.forward).parameters)
    if isinstance(examples, torch.Tensor):
        examples = (examples,)
    named = dict(examples) if isinstance(examples, Mapping) else dict(zip(parameters, examples, strict=False))
    strange = [name for name in named if name not in parameters]
    if strange or (not isinstance(examples, Mapping) and len(examples) > len(parameters)):
        raise InputRefused(f"{source}: the example inputs do not fit forward({', '.join(parameters)})")
    if not named or not all(isinstance(value, torch.Tensor) for value in named.values()):
        raise InputRefused(f"{source}: example inputs are tensors, as one tensor, a tuple, or a dict by name")
    return {name: named[name].detach() for name in parameters if name in named}


def _varying_axes(source: str, module: nn.Module, examples: Inputs) -> tuple[Axes, Sizes]:
    """Which axes may vary: found by trying. Axes of one size are taken to vary together.

    The first axis is the batch; another is called after the first input that has its size.
    """
    batches = {value.shape[0] for value in examples.values() if value.ndim}
    if len(batches) != 1 or batches == {1}:
        raise InputRefused(
            f"{source}: the example inputs' first axis is the batch, the same in all of them and at least 2 "
            f"(a single row is taken for a constant when a model is traced); here it is {sorted(batches)}"
        )
    symbols: dict[tuple[str, int], str] = {}
    by_size: dict[int, str] = {}
    for name, value in examples.items():
        for axis, size in enumerate(value.shape):
            symbols[name, axis] = by_size.setdefault(size, f"{name}_axis{axis}") if axis else "batch"
    sizes = {symbol: examples[name].shape[axis] for (name, axis), symbol in symbols.items()}
    generator = torch.Generator().manual_seed(0)
    every: Axes = {name: {axis: symbols[name, axis] for axis in range(value.ndim)} for name, value in examples.items()}
    varying = set()
    for symbol, size in sizes.items():
        trial = _resampled(examples, every, {**sizes, symbol: size + 1}, generator)
        try:
            with torch.no_grad():
                module(**trial)
        except Exception as error:  # whatever the user's model raises means: not at this size
            if symbol == "batch":
                raise InputRefused(f"{source}: the model fails at another batch size, {size + 1}: {error}") from error
        else:
            varying.add(symbol)
    axes = {
        name: {axis: symbol for axis, symbol in there.items() if symbol in varying} for name, there in every.items()
    }
    return axes, {symbol: sizes[symbol] for symbol in varying}


def _resampled(examples: Inputs, axes: Axes, sizes: Sizes, generator: torch.Generator) -> Inputs:
    """New inputs that look like the examples: floats with their mean and spread, whole numbers out of their rows."""
    made = {}
    for name, example in examples.items():
        shape = [sizes.get(axes[name].get(axis, ""), size) for axis, size in enumerate(example.shape)]
        if example.is_floating_point():
            spread = float(example.std()) if example.numel() > 1 else 0.0
            noise = torch.randn(shape, generator=generator, dtype=torch.float32)
            made[name] = (float(example.mean()) + (spread or 1.0) * noise).to(example.dtype)
        else:
            # Rows of the example, cut or repeated: ids stay in range and no mask hides a whole row.
            rows = example[torch.randint(0, example.shape[0], (shape[0],), generator=generator)]
            for axis, size in itertools.islice(enumerate(shape), 1, None):
                rows = rows.index_select(axis, torch.arange(size) % example.shape[axis])
            made[name] = rows
    return made
