"""A module as exporters need it: in eval mode, silent, without its cache. Its state and modes are restored."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from lora_export.models.stored_parameter import StoredParameter
from lora_export.models.traceable_code import traceable_code

USE_CACHE = "use_cache"


def disable_cache(config: Any) -> None:
    """Set `use_cache` to false in a config and in the configs inside it.

    A composite model reads the setting of the part that has the cache, such as `text_config`, not its own.
    """
    for part in _parts(config):
        if getattr(part, USE_CACHE, False):
            setattr(part, USE_CACHE, False)


@contextlib.contextmanager
def cache_setting(module: nn.Module, *, to: bool) -> Iterator[None]:
    """A model of transformers with this value of `use_cache` in all configs that have one, while active."""
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
    return cache_setting(module, to=False) if is_hugging_face(module) else contextlib.nullcontext()


@contextlib.contextmanager
def tracing(module: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no output, and no fused attention kernels: a trace would capture them as opaque calls.

    Code that a trace cannot follow is exchanged (see `traceable_code`). The module's own modes are restored afterwards.
    """
    training = [part for part in module.modules() if part.training]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    module.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), silence(), same_state(module), traceable_code(module):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for part in training:
            part.training = True


REGISTRIES = ("_parameters", "_buffers", "_modules", "_forward_hooks")  # of an nn.Module, which are dictionaries


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Show no warning of transformers. `logging.disable` visits all loggers, longer than a small model runs."""
    handlers = [*logging.root.handlers, *logging.getLogger("transformers").handlers]
    levels = [handler.level for handler in handlers]
    for handler in handlers:
        handler.setLevel(max(handler.level, logging.ERROR))
    try:
        yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)


@contextlib.contextmanager
def same_state(module: nn.Module) -> Iterator[None]:
    """A model of transformers has the attributes and children afterwards that it has now; its tensors are not copied.

    Some models keep what they chose for one input for all later ones: after a short text, BigBird attends to all tokens
    of a long one, too. SegFormer adds hooks at its first run, and an attribute for that. Without the attribute alone,
    each run would add them again, and collect its hidden states twice.
    """
    parts = [vars(part) for part in module.modules()] if is_hugging_face(module) else []
    before = [(dict(part), [(part[name], dict(part[name])) for name in REGISTRIES]) for part in parts]
    try:
        with _no_warnings() if parts else contextlib.nullcontext():  # they tell of such a choice, now in each run
            yield
    finally:
        for part, (attributes, registries) in zip(parts, before, strict=True):
            part.update(attributes)
            for name in part.keys() - attributes if len(part) > len(attributes) else ():
                del part[name]
            for registry, entries in registries:
                if list(map(id, registry.values())) != list(map(id, entries.values())):
                    registry.clear()
                    registry.update(entries)


def state_reader(module: nn.Module) -> Callable[[], bool]:
    """A function that returns whether all parts of a module still have the attributes, children and values of now.

    Seen are also other entries of a dictionary, list or set of theirs, and tensors that were changed in place.
    """
    parts = list(module.modules())
    before = _state(parts)

    def is_as_before() -> bool:
        now = _state(parts)
        return len(now) == len(before) and all(map(_is_same, before, now))

    return is_as_before


@contextlib.contextmanager
def attribute_writes(modules: Iterable[nn.Module]) -> Iterator[list[str]]:
    """The names of attributes that are set on parts of modules while the context is active, also those put back."""
    parts = {id(part) for module in modules for part in module.modules()}
    written: list[str] = []
    before = nn.Module.__setattr__

    def noted(self: nn.Module, name: str, value: Any) -> None:
        if id(self) in parts:
            written.append(name)
        before(self, name, value)

    nn.Module.__setattr__ = noted  # type: ignore[method-assign]
    try:
        yield written
    finally:
        nn.Module.__setattr__ = before  # type: ignore[method-assign]


def _state(parts: Iterable[nn.Module]) -> list[Any]:
    return [each for part in parts for name, value in vars(part).items() for each in (name, value, *_inside(value))]


def _inside(value: Any) -> list[Any]:
    """The entries of a container, and how often its tensors, or the tensor, were changed in place."""
    entries: list[Any] = [*value.keys(), *value.values()] if isinstance(value, dict) else []
    entries += value if isinstance(value, list | set | deque) else ()
    tensors = (one for one in (value, *entries) if isinstance(one, torch.Tensor))
    counted = (one for one in tensors if not isinstance(one, StoredParameter) and not one.is_inference())
    return [*entries, *(one._version for one in counted)]  # a stored parameter cannot be changed, and is not read here


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, int) and one == other)


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
