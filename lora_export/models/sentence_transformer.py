"""A sentence-transformers folder as one module: the transformer, and what makes an embedding of its tokens.

sentence-transformers itself is not imported. The formulas are those of its release 6, which the tests compare with. Its
modules take and return one dictionary, which no exporter takes, so that a forward of our own would be left over; and
its import takes 14 s of CPU and 570 MiB, where torch and transformers take 4 s and 240 MiB.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_export.errors import InputRefused, listed
from lora_export.layers.torch_internals import exchange_forward
from lora_export.storage import json_files, safetensors_file
from lora_export.weights.sentence_modules import ALONE, TRANSFORMER_CONFIG, SentenceModule, sentence_modules
from lora_export.weights.task_head import CLASS_ENDINGS
from lora_export.weights.weight_files import weight_files

TOKENS, SENTENCE, MASK_INPUT = "token_embeddings", "sentence_embedding", "attention_mask"
# What a name of the whole model has before the name of the transformer's tensor, since release 6 and until then.
OUTER_NAMES = ("0.model.", "0.auto_model.")
# Of BERT and its like: a layer on the first token, which no embedding of sentence-transformers reads
POOLER = "pooler."
# Encoder-decoders of which sentence-transformers loads the encoder alone
ENCODERS = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "longt5": "LongT5EncoderModel",
}
TASK = {"transformer_task": "feature-extraction", "module_output_name": TOKENS}
LAST_STATE = "last_hidden_state"
TEXT: dict[str, Any] = {"method": "forward", "method_output_name": LAST_STATE}
OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ACTIVATIONS = {
    f"torch.nn.modules.{cls.__module__.rpartition('.')[2]}.{cls.__name__}": cls
    for cls in (nn.Identity, nn.Tanh, nn.GELU, nn.ReLU, nn.SiLU, nn.Sigmoid, nn.ELU, nn.LeakyReLU, nn.Mish)
}

Features = dict[str, Tensor]


def embedder_modules(folder: Path, fields: Mapping[str, Any]) -> tuple[SentenceModule, ...] | None:
    """The modules after the transformer of an embedding model; None for a folder of another kind.

    `fields` is the config of the model. One with a classifier is that classifier: its head was trained on the
    transformer, and the embedding is not used. Raises InputRefused as `sentence_modules`, and for a transformer of
    which another output than its last hidden state is taken.
    """
    architecture = next(iter(fields.get("architectures") or ()), "")
    if architecture.endswith(tuple(CLASS_ENDINGS.values())):
        return None
    modules = sentence_modules(folder)
    path = folder / TRANSFORMER_CONFIG
    if modules is None or not path.is_file():
        return modules
    config = json_files.read_json(path)
    for name, supported in TASK.items():
        if config.get(name, supported) != supported:
            raise InputRefused(f"{path}: {name} is {config[name]!r}; only {supported!r} is supported. {ALONE}")
    kinds = config.get("modality_config", {"text": TEXT})
    if not isinstance(kinds, dict) or kinds.get("text") not in (TEXT, TEXT | {"method_output_name": [LAST_STATE]}):
        raise InputRefused(f"{path}: only the last hidden state of texts is supported (modality_config). {ALONE}")
    return modules


def encoder_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the class that sentence-transformers loads: one without a head, whichever the config names."""
    encoder = ENCODERS.get(str(fields.get("model_type")))
    others = {name: value for name, value in fields.items() if name != "architectures"}
    return {**others, "architectures": [encoder]} if encoder else others


def as_embedder(transformer: Any, modules: Iterable[SentenceModule], dtype: torch.dtype) -> list[str]:
    """Let a model of transformers return its token embeddings and what the modules make of them, from now on.

    Its tensors keep their names; those of a module begin with its name, as in sentence-transformers. The pooler is
    removed. Returns remarks on the embedding. Raises InputRefused for a module that is unknown or damaged.
    """
    if has_removable_pooler(transformer):
        transformer.pooler = None
    notes = []
    modules = [module for module in modules if module.kind != "Dropout"]  # nothing, outside of training
    for module in modules:
        if module.kind not in BUILDERS:
            raise InputRefused(
                f"{module.folder.parent} has a module {module.name} of the class {module.kind}, which is not "
                f"supported. Supported: {', '.join(BUILDERS)}. {ALONE}"
            )
        if hasattr(transformer, module.name):
            raise InputRefused(f"{module.folder.parent} has a module with the name {module.name!r} of another part")
        try:
            step = BUILDERS[module.kind](module)
        except RuntimeError as error:
            why = listed(str(error).splitlines())
            raise InputRefused(f"{module.folder}: its weights do not fit:", why) from error
        transformer.add_module(module.name, step.to(dtype).requires_grad_(False).eval())
        if isinstance(step, Pooling) and not module.config().get("include_prompt", True):
            notes.append(
                "sentence-transformers leaves the tokens of a prompt out of the mean (include_prompt). The embedding "
                "has all tokens whose attention_mask is 1"
            )
    _embed(transformer, tuple(module.name for module in modules))
    return notes


def whole_state(module: Any, transformer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a module, from those of its transformer. They are the same unless it is an embedding model."""
    names: tuple[str, ...] = getattr(module, "module_names", ())
    unread: tuple[str, ...] = getattr(module, "unread", ())
    own = {name: tensor for name, tensor in module.state_dict().items() if name.partition(".")[0] in names}
    return own | {name: tensor for name, tensor in transformer.items() if not unread or not name.startswith(unread)}


def has_removable_pooler(transformer: Any) -> bool:
    """Whether a model of transformers has a pooler that it can do without."""
    parameters = inspect.signature(type(transformer).__init__).parameters
    return "add_pooling_layer" in parameters and getattr(transformer, "pooler", None) is not None


def _embed(transformer: nn.Module, names: tuple[str, ...]) -> None:
    cls: Any = type(transformer)
    signature = inspect.signature(cls.forward)

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Features:
        tokens = cls.forward(self, *args, **kwargs).last_hidden_state
        mask = signature.bind_partial(self, *args, **kwargs).arguments.get(MASK_INPUT)
        if mask is None or mask.shape[-1] != tokens.shape[1]:
            mask = torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
        features = {TOKENS: tokens}
        for name in names:
            getattr(self, name)(features, mask)
        return features

    exchange_forward(transformer, forward, module_names=names, outer_names=OUTER_NAMES, unread=(POOLER,))


# --- The modules. The features are token_embeddings (batch, sequence, hidden) and sentence_embedding (batch, n) ---


class Pooling(nn.Module):
    """One vector from those of all tokens whose mask is 1; several modes are joined."""

    def __init__(self, module: SentenceModule):
        super().__init__()
        config = module.config()
        stated = config.get("pooling_mode") or [mode for old, mode in OLD_MODES.items() if config.get(old)] or "mean"
        self.modes = tuple(stated) if isinstance(stated, list) else (stated,)
        if unknown := [mode for mode in self.modes if not isinstance(mode, str) or mode not in POOLINGS]:
            raise InputRefused(
                f"{module.folder} has the unknown pooling mode {unknown[0]!r}. Supported are {', '.join(POOLINGS)}"
            )

    def forward(self, features: Features, mask: Tensor) -> None:
        features[SENTENCE] = torch.cat([POOLINGS[mode](features[TOKENS], mask) for mode in self.modes], dim=-1)


def _positions(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device)


def _first_position(tokens: Tensor, mask: Tensor) -> Tensor:
    """The position of each row's first token, (batch,)."""
    return torch.where(mask == 0, tokens.shape[1] - 1, _positions(tokens)).amin(1)


def _at(tokens: Tensor, positions: Tensor) -> Tensor:
    """The token at one position of each row, (batch, hidden)."""
    return tokens.gather(1, positions[:, None, None].expand(-1, 1, tokens.shape[2])).squeeze(1)


def _weighted(tokens: Tensor, weights: Tensor, root: bool = False) -> Tensor:
    """Σ weight · token / Σ weight, or its root in the denominator; weights are (batch, sequence)."""
    weights = weights.to(torch.float32 if tokens.dtype in (torch.float16, torch.bfloat16) else tokens.dtype)
    total = weights.sum(1, keepdim=True).clamp(min=1e-9)
    summed = (tokens * weights[:, :, None]).sum(1)
    return (summed / (total.sqrt() if root else total)).to(tokens.dtype)


def _numbers(tokens: Tensor, mask: Tensor) -> Tensor:
    """1 for the first token of a row, 2 for the second, and so on."""
    return _positions(tokens) + 1 - _first_position(tokens, mask)[:, None]


# Of the tokens (batch, sequence, hidden) and their mask (batch, sequence)
POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": lambda tokens, mask: _at(tokens, _first_position(tokens, mask)),
    "max": lambda tokens, mask: tokens.masked_fill(mask[:, :, None] == 0, float("-inf")).amax(1),
    "mean": _weighted,
    "mean_sqrt_len_tokens": lambda tokens, mask: _weighted(tokens, mask, root=True),
    "weightedmean": lambda tokens, mask: _weighted(tokens, mask * _numbers(tokens, mask)),
    "lasttoken": lambda tokens, mask: _at(tokens, torch.where(mask == 0, 0, _positions(tokens)).amax(1)),
}


class _Applied(nn.Module):
    """A layer on one feature, whose result is another, or replaces it."""

    source = target = SENTENCE

    def forward(self, features: Features, _: Tensor) -> None:
        features[self.target] = self.applied(features[self.source])

    def applied(self, values: Tensor) -> Tensor:
        raise NotImplementedError

    def read_features(self, module: SentenceModule) -> None:
        """Read from the config which feature the module reads, and which one it writes."""
        config = module.config()
        self.source = config.get("module_input_name") or SENTENCE
        self.target = config.get("module_output_name") or self.source
        if unknown := [name for name in (self.source, self.target) if name not in (TOKENS, SENTENCE)]:
            raise InputRefused(f"{module.folder} uses {unknown[0]!r}, which is neither {TOKENS} nor {SENTENCE}")


class Normalize(_Applied):
    """Vectors of the length 1."""

    def __init__(self, module: SentenceModule):
        super().__init__()
        self.read_features(module)

    def applied(self, values: Tensor) -> Tensor:
        return nn.functional.normalize(values, p=2.0, dim=-1)


class Dense(_Applied):
    """A linear layer and an activation, beside which the values may be added again."""

    def __init__(self, module: SentenceModule):
        super().__init__()
        config, tensors = module.config(), _tensors(module, "linear.weight")
        name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
        if name not in ACTIVATIONS:
            known = ", ".join(cls.__name__ for cls in ACTIVATIONS.values())
            raise InputRefused(
                f"{module.folder} has the unsupported activation {name}. Supported are {known} of torch.nn"
            )
        self.read_features(module)
        outputs, inputs = tensors["linear.weight"].shape
        self.activation, self.is_added = ACTIVATIONS[name](), bool(config.get("use_residual", False))
        self.linear = nn.Linear(inputs, outputs, bias="linear.bias" in tensors)
        self.residual = nn.Linear(inputs, outputs, bias=False) if self.is_added and inputs != outputs else None
        self.load_state_dict(tensors)

    def applied(self, values: Tensor) -> Tensor:
        result: Tensor = self.activation(self.linear(values))
        if not self.is_added:
            return result
        return result + (values if self.residual is None else self.residual(values))


class LayerNorm(_Applied):
    """A layer norm of the embedding."""

    def __init__(self, module: SentenceModule):
        super().__init__()
        tensors = _tensors(module, "norm.weight")
        self.norm = nn.LayerNorm(tensors["norm.weight"].shape[0])
        self.load_state_dict(tensors)

    def applied(self, values: Tensor) -> Tensor:
        result: Tensor = self.norm(values)
        return result


BUILDERS: dict[str, Callable[[SentenceModule], nn.Module]] = {
    cls.__name__: cls for cls in (Pooling, Normalize, Dense, LayerNorm)
}


def _tensors(module: SentenceModule, needed: str) -> dict[str, Tensor]:
    """The weights of a module, copied out of their file. Raises InputRefused where it is damaged or lacks `needed`."""
    _, names = weight_files(module.folder)
    found: dict[str, Tensor] = {}
    for name in names:
        safetensors_file.open_file(module.folder / name)  # refuses a damaged file
        found |= {key: value.clone().float() for key, value in load_file(module.folder / name).items()}
    shape = found[needed].shape if needed in found else ()
    if len(shape) != (2 if needed.startswith("linear") else 1):
        raise InputRefused(f"{module.folder} lacks {needed}, or has it in another shape")
    return found
