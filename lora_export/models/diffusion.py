"""A model in a folder of diffusers: the UNet or transformer of a pipeline. Nothing is downloaded, no code is run.

A graph of it has the names that optimum gives its inputs and its output: `sample` or `hidden_states`, `timestep`,
`encoder_hidden_states` … and `out_sample`. The nested arguments of SDXL are inputs of their own.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_export.errors import EnvironmentLacking, InputRefused, listed
from lora_export.layers.torch_internals import exchange_forward
from lora_export.models.huggingface import notes_on_unread_tensors, refuse_random_weights
from lora_export.models.model import Model, ModelInputs, Sizes
from lora_export.models.refusals import innermost_cause
from lora_export.models.tracing import silence
from lora_export.storage import json_files
from lora_export.weights.checkpoint import CONFIG, OF_DIFFUSERS, open_checkpoint

CLASS = "_class_name"
OUT_SAMPLE = "out_sample"
NESTED = "added_cond_kwargs"  # the argument with further inputs: of SDXL's UNet, of PixArt
NOISE_STEPS = 1000  # of a schedule of noise
POSITIONS_OF_IDS = 64  # of a patch in an image, or of a token in a text, in drawn inputs
SAMPLE_OF_PIXART_WITH_SIZES = 128  # where its config does not say whether it reads the size of the image
TRACED = {"batch": 2, "sequence": 7, "patches": 12}
SIDES = ("height", "width")


@dataclass(frozen=True)
class Wanted:
    """One input: its sizes, by symbol where they vary, and how its values are drawn: by default as normal numbers."""

    name: str
    shape: tuple[int | str, ...]
    draw: Callable[..., torch.Tensor] = torch.randn  # (shape, generator=...)
    is_nested: bool = False


def is_diffusion_model(folder: Path) -> bool:
    """Whether a folder has the config of a model of diffusers. Reads it."""
    path = folder / CONFIG
    return path.is_file() and OF_DIFFUSERS in json_files.read_json(path)


def from_diffusers(folder: Path, dtype: torch.dtype) -> Model:
    """Load the model of a folder, and describe its inputs by its config.

    Raises InputRefused for a folder that is damaged, or whose class is not supported, and EnvironmentLacking without
    diffusers.
    """
    open_checkpoint(folder)  # refuses what is damaged, quantised or pickled before anything is built
    fields = json_files.read_json(folder / CONFIG)
    name = str(fields.get(CLASS))
    if name not in INPUTS:
        raise InputRefused(
            f"{folder} is a {name} of diffusers, whose inputs are not known. Known are {', '.join(INPUTS)}. Give the "
            "model and its inputs by a factory, `file.py:factory`"
        )
    try:
        diffusers: Any = importlib.import_module("diffusers")
    except ImportError as error:
        raise EnvironmentLacking(f"a model of diffusers needs diffusers ({error}): pip install diffusers") from error
    try:
        with silence():
            module, loading = getattr(diffusers, name).from_pretrained(
                folder, local_files_only=True, use_safetensors=True, torch_dtype=dtype, low_cpu_mem_usage=False,
                output_loading_info=True,
            )  # fmt: skip
        wanted = INPUTS[name](module.config)
    except InputRefused:
        raise
    except Exception as error:  # values of the wrong type raise any type
        raise InputRefused(
            f"{folder}: diffusers cannot load it as {name}:", listed(innermost_cause(error).splitlines())
        ) from error
    refuse_random_weights(folder, module, loading["missing_keys"])
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        tensor.data = tensor.data.clone()  # out of the mapped file
    _flatten_arguments(module.eval(), wanted)
    symbols = {size for each in wanted for size in each.shape if isinstance(size, str)}
    step = 2 ** (len(module.config.get("block_out_channels", [1])) - 1)  # a UNet halves the image so often
    sides = dict.fromkeys(SIDES, 8 * max(step // 4, 1))
    traced = {symbol: {**TRACED, **sides}[symbol] for symbol in symbols}
    axes = {each.name: {axis: size for axis, size in enumerate(each.shape) if isinstance(size, str)} for each in wanted}
    return Model(
        str(folder), module, axes, functools.partial(_made, wanted), traced,
        steps={symbol: step for symbol in SIDES if symbol in symbols},
        derive=functools.partial(_in_whole_steps, step),
        notes=tuple(notes_on_unread_tensors(module, loading["unexpected_keys"])),
    )  # fmt: skip


def _in_whole_steps(step: int, sizes: Sizes) -> Sizes:
    """The sizes, with sides of an image that can be halved as often as the model does it."""
    return {symbol: -(-size // step) * step if symbol in SIDES else size for symbol, size in sizes.items()}


def _made(wanted: tuple[Wanted, ...], sizes: Sizes, generator: torch.Generator) -> ModelInputs:
    shapes = [tuple(sizes[size] if isinstance(size, str) else size for size in each.shape) for each in wanted]
    return {each.name: each.draw(shape, generator=generator) for each, shape in zip(wanted, shapes, strict=True)}


def _flatten_arguments(module: Any, wanted: tuple[Wanted, ...]) -> None:
    """Let a module take these inputs by keyword and return its one output by name, from now on."""
    cls = type(module)
    nested = [each.name for each in wanted if each.is_nested]
    keyword = inspect.Parameter.KEYWORD_ONLY

    def forward(self: Any, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        own: dict[str, Any] = {name: value for name, value in inputs.items() if name not in nested}
        if nested:
            own[NESTED] = {name: inputs[name] for name in nested}
        return {OUT_SAMPLE: cls.forward(self, **own, return_dict=False)[0]}

    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
    parameters += [inspect.Parameter(each.name, keyword) for each in wanted]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    exchange_forward(module, forward)


# --- Inputs by class ---


def _below(end: int) -> Callable[..., torch.Tensor]:
    return functools.partial(torch.randint, 0, end)


NOISE_STEP = Wanted("timestep", ("batch",), _below(NOISE_STEPS))


def _unet(config: Mapping[str, Any]) -> tuple[Wanted, ...]:
    width = config["cross_attention_dim"]
    inputs = [
        Wanted("sample", ("batch", config["in_channels"], "height", "width")),
        NOISE_STEP,
        Wanted("encoder_hidden_states", ("batch", "sequence", width[0] if isinstance(width, list | tuple) else width)),
    ]
    if config.get("addition_embed_type") == "text_time":
        # The embedding joins that of the text with those of six numbers: sizes and crops of the image.
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        if pooled <= 0:
            raise InputRefused("projection_class_embeddings_input_dim has no place for the embedding of a text")
        inputs += [
            Wanted("text_embeds", ("batch", pooled), is_nested=True),
            Wanted("time_ids", ("batch", 6), is_nested=True),
        ]
    elif config.get("addition_embed_type") or config.get("class_embed_type"):
        raise InputRefused("only the further inputs of SDXL (addition_embed_type text_time) are known")
    return tuple(inputs)


def _image(config: Mapping[str, Any]) -> tuple[int | str, ...]:
    # Of one size: its positions are cropped out of a table by code that a graph cannot contain.
    return ("batch", config["in_channels"], config["sample_size"], config["sample_size"])


def _dit(config: Mapping[str, Any]) -> tuple[Wanted, ...]:
    return (
        Wanted("hidden_states", _image(config)),
        NOISE_STEP,
        Wanted("class_labels", ("batch",), _below(config["num_embeds_ada_norm"])),
    )


def _sd3(config: Mapping[str, Any]) -> tuple[Wanted, ...]:
    return (
        Wanted("hidden_states", _image(config)),
        Wanted("encoder_hidden_states", ("batch", "sequence", config["joint_attention_dim"])),
        Wanted("pooled_projections", ("batch", config["pooled_projection_dim"])),
        NOISE_STEP,
    )


def _flux(config: Mapping[str, Any]) -> tuple[Wanted, ...]:
    # Patches of an image of any size, and where each of them is
    axes = len(config["axes_dims_rope"])
    inputs = [
        Wanted("hidden_states", ("batch", "patches", config["in_channels"])),
        Wanted("encoder_hidden_states", ("batch", "sequence", config["joint_attention_dim"])),
        Wanted("pooled_projections", ("batch", config["pooled_projection_dim"])),
        Wanted("timestep", ("batch",), torch.rand),
        Wanted("img_ids", ("patches", axes), _positions),
        Wanted("txt_ids", ("sequence", axes), _positions),
    ]
    return (*inputs, *([Wanted("guidance", ("batch",), torch.rand)] if config["guidance_embeds"] else []))


def _pixart(config: Mapping[str, Any]) -> tuple[Wanted, ...]:
    inputs = (
        Wanted("hidden_states", _image(config)),
        Wanted("encoder_hidden_states", ("batch", "sequence", config["caption_channels"])),
        NOISE_STEP,
    )
    with_sizes = config["use_additional_conditions"]
    if not (config["sample_size"] == SAMPLE_OF_PIXART_WITH_SIZES if with_sizes is None else with_sizes):
        return inputs
    sizes = (("resolution", 2), ("aspect_ratio", 1))  # of the image, in pixels
    return (*inputs, *(Wanted(name, ("batch", count), _positions, is_nested=True) for name, count in sizes))


def _positions(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, POSITIONS_OF_IDS, shape, generator=generator).float()


INPUTS: dict[str, Callable[[Mapping[str, Any]], tuple[Wanted, ...]]] = {
    "UNet2DConditionModel": _unet,
    "DiTTransformer2DModel": _dit,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "PixArtTransformer2DModel": _pixart,
}
