"""A module as exporters need it: in eval mode, silent, and without its key-value cache, which is no tensor."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

USE_CACHE = "use_cache"


def disable_cache(config: Any) -> None:
    """Set `use_cache` to false in a config and in the configs inside it.

    A composite model reads the setting of the part that has the cache, such as `text_config`, not its own.
    """
    for part in _parts(config):
        if getattr(part, USE_CACHE, False):
            setattr(part, USE_CACHE, False)


@contextlib.contextmanager
def cache_disabled(module: nn.Module) -> Iterator[None]:
    """A model of transformers that makes no cache while the context is active."""
    with _cache_setting(module, to=False):
        yield


@contextlib.contextmanager
def cache_enabled(module: nn.Module) -> Iterator[None]:
    """A model of transformers that makes a cache while the context is active."""
    with _cache_setting(module, to=True):
        yield


@contextlib.contextmanager
def _cache_setting(module: nn.Module, *, to: bool) -> Iterator[None]:
    """All configs of a model with this value of `use_cache`, while active; those that lack the setting keep none."""
    configs = [getattr(part, "config", None) for part in module.modules()]
    parts = {id(part): part for config in configs for part in _parts(config)}
    changed = [part for part in parts.values() if getattr(part, USE_CACHE, to) != to]
    for part in changed:
        setattr(part, USE_CACHE, to)
    try:
        yield
    finally:
        for part in changed:
            setattr(part, USE_CACHE, not to)


def _parts(config: Any) -> Iterator[Any]:
    """A config of transformers and every config inside it."""
    if not hasattr(config, "model_type"):
        return
    yield config
    for value in list(vars(config).values()):
        yield from _parts(value)


def is_hugging_face(module: nn.Module) -> bool:
    """Whether transformers knows how to export the module. Does not import transformers."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


def without_cache(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """A module that makes no cache while the context is active; nothing but transformers' models makes one."""
    return cache_disabled(module) if is_hugging_face(module) else contextlib.nullcontext()


@contextlib.contextmanager
def tracing(module: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no output, and no fused attention kernels: a trace would capture them as opaque calls.

    The module's own modes are restored afterwards.
    """
    training = [part for part in module.modules() if part.training]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    module.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), silence():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for part in training:
            part.training = True


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Discard what the exporters print, warn and log. The exception that they raise has all that matters."""
    disabled, discarded = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(discarded),
            contextlib.redirect_stderr(discarded),
        ):
            yield
    finally:
        logging.disable(disabled)
