"""Models of transformers without their key-value cache: a graph takes and returns tensors, and a cache is none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

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
