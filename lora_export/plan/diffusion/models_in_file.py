"""The models of a diffusion pipeline that are in one checkpoint, each under a prefix of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lora_export.errors import InputRefused
from lora_export.lora import DENOISER, TEXT_ENCODERS
from lora_export.options.spelling import named
from lora_export.plan.types import TensorSpec

# Component -> the prefixes that its tensors may have, in files of Stable Diffusion 1, 2, XL and 3, and ComfyUI's.
PREFIXES_OF_MODELS = {
    DENOISER: ("model.diffusion_model.",),
    TEXT_ENCODERS[0]: (
        "cond_stage_model.transformer.",
        "cond_stage_model.model.",
        "conditioner.embedders.0.transformer.",
        "text_encoders.clip_l.transformer.",
    ),
    TEXT_ENCODERS[1]: ("conditioner.embedders.1.model.", "text_encoders.clip_g.transformer."),
    TEXT_ENCODERS[2]: ("text_encoders.t5xxl.transformer.",),
}


def prefixes_of_models(names: Iterable[str]) -> dict[str, str]:
    """The prefix of each component that is in a checkpoint with these names; empty where it has one model alone."""
    found: dict[str, str] = {}
    for name in names:
        for component, prefixes in PREFIXES_OF_MODELS.items():
            prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
            if prefix is not None:
                found.setdefault(component, prefix)
    return found if len(found) > 1 else {}


def tensors_of_model(base: Mapping[str, TensorSpec], component: str, adapter: str) -> list[TensorSpec]:
    """The tensors of the model that an adapter's component changes. Raises InputRefused where the base lacks it."""
    prefixes = prefixes_of_models(base)
    if component not in prefixes:
        raise InputRefused(
            f"{adapter} has changes for {component}, and the base does not: it contains "
            f"{', '.join(prefixes)}. Choose one model by {named('component')}, or give the folder of a pipeline"
        )
    return [spec for name, spec in base.items() if name.startswith(prefixes[component])]
