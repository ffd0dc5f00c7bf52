"""The inputs of a model's linear layers, collected while it runs: what calibrated rounding is fitted to.

Some texts, or rows of arrays, are held out. Each layer stores so many tokens of both, in temporary files. Layers that
get the same array, such as q, k and v, share theirs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_export.errors import InputRefused
from lora_export.layers import with_loaded_names
from lora_export.models.huggingface import load_tokenizer
from lora_export.models.model import Model, in_dtype_of
from lora_export.models.refusals import named_failures
from lora_export.models.text_inputs import text_lengths
from lora_export.weights.calibrated_rounding import FITTED, HELD_OUT, LayerInputs, StoredInputs

HELD_OUT_EVERY = 5  # of so many texts, one is held out
AT_ONCE = 16  # texts of one length that run together
LONGEST_CALIBRATION = 1024  # tokens of a text
TOKEN_MASK, CONV1D_CLASS = "attention_mask", "Conv1D"

CalibrationCase = tuple[bool, dict[str, NDArray[Any]]]  # whether it is held out, and the arrays that forward takes


def collect_inputs(model: Model, weights: Collection[str], cases: Iterable[CalibrationCase]) -> dict[str, LayerInputs]:
    """The inputs of linear layers in these cases, by the names of their weights in the model's folder.

    Stores what has a place, and runs no more than that. Layers that no case reaches are left out, and so are weights of
    other modules. Raises RuntimeRefused where the model fails, and OutputFailed where temporary files have no place.
    """
    named = with_loaded_names(model.module, {name: name for name in weights})
    # What the names of a model with a head have before those of the model without one, or the other way round.
    prefix = f"{getattr(model.module, 'base_model_prefix', '')}.".lstrip(".")
    layers = {}
    for name, module in model.module.named_modules():
        own = f"{name}.weight"
        stored = next((each for each in (own, own.removeprefix(prefix), prefix + own) if each in named), None)
        if stored is not None and (isinstance(module, nn.Linear) or type(module).__name__ == CONV1D_CLASS):
            layers[named[stored]] = module
    run = _Run()
    with run.listening(layers), torch.inference_mode():
        for run.is_held_out, arrays in cases:
            if run.is_full(layers):
                continue
            run.mask = torch.from_numpy(arrays[TOKEN_MASK]).bool() if TOKEN_MASK in arrays else None
            tensors = in_dtype_of(model.module, {name: torch.from_numpy(each) for name, each in arrays.items()})
            with named_failures(model.module, tensors, "calibration inputs"):
                model.module(**tensors)
            run.last = None
    found = {name: run.found[run.source[name]] for name in layers if name in run.source}
    return {name: each for name, each in found.items() if each.fitted.count and each.held_out.count}


class _Run:
    """What the hooks of one model share."""

    def __init__(self) -> None:
        self.found: dict[str, LayerInputs] = {}
        self.source: dict[str, str] = {}  # layer -> the first one that gets the same array
        self.is_held_out = False
        self.mask: Tensor | None = None
        self.last: tuple[str, Tensor] | None = None

    @contextlib.contextmanager
    def listening(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        hooks = [
            module.register_forward_pre_hook(functools.partial(self._add, name)) for name, module in layers.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def is_full(self, layers: Collection[str]) -> bool:
        """Whether every layer has all that is stored of this kind of cases."""
        sources = {self.source.get(name, "") for name in layers}
        return all(name and self._rows(name).is_full for name in sources)

    def _rows(self, name: str) -> StoredInputs:
        return self.found[name].held_out if self.is_held_out else self.found[name].fitted

    def _add(self, name: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not inputs:
            return
        array: Tensor = inputs[0]
        is_shared = self.last is not None and self.last[1] is array
        source = self.source.setdefault(name, self.last[0] if self.last is not None and is_shared else name)
        if source != name:
            return
        self.last = name, array
        width = array.shape[-1]
        if name not in self.found:
            self.found[name] = LayerInputs(StoredInputs(width, FITTED), StoredInputs(width, HELD_OUT))
        is_masked = self.mask is not None and self.mask.shape == array.shape[:-1]
        rows = array[self.mask] if is_masked else array.reshape(-1, width)
        found = rows.float().numpy()
        if not np.isfinite(found).all():
            raise InputRefused(f"{name}: its inputs are not finite in the model's run on the calibration")
        self._rows(name).add(found)


def cases_of_texts(model: Model, texts: Collection[str]) -> Iterator[CalibrationCase]:
    """Texts as a Hugging Face model takes them, without padding: those of one length together, in a fixed random order.

    Raises InputRefused where the folder has no tokenizer, and for too few texts.
    """
    tokenizer = load_tokenizer(model)
    most = min(LONGEST_CALIBRATION, int(text_lengths(model.module, {"sequence"}).most("sequence")))
    by_length: dict[tuple[bool, int], list[list[int]]] = {}
    for number, text in enumerate(texts):
        tokens = tokenizer(text, truncation=True, max_length=most)["input_ids"]
        if tokens:
            by_length.setdefault((_is_held_out(number), len(tokens)), []).append(tokens)
    _refuse_too_few(len(texts))
    batches = [
        (is_held_out, rows[first : first + AT_ONCE])
        for (is_held_out, _), rows in by_length.items()
        for first in range(0, len(rows), AT_ONCE)
    ]
    for is_held_out in (False, True):
        own = [rows for held, rows in batches if held is is_held_out]
        for position in np.random.default_rng(0).permutation(len(own)):
            ids = np.array(own[position], np.int64)
            yield is_held_out, {"input_ids": ids, TOKEN_MASK: np.ones_like(ids)}


def cases_of_arrays(arrays: Mapping[str, NDArray[Any]]) -> Iterator[CalibrationCase]:
    """Arrays that forward takes, some rows at a time. Raises InputRefused for rows that differ in number or are few."""
    counts = {len(each) if each.ndim else 0 for each in arrays.values()}
    if len(counts) != 1:
        raise InputRefused("the calibration arrays have different numbers of rows, or none")
    rows = np.arange(counts.pop())
    _refuse_too_few(len(rows))
    for is_held_out in (False, True):
        own = rows[_is_held_out(rows) == is_held_out]
        for first in range(0, len(own), AT_ONCE):
            part = own[first : first + AT_ONCE]
            yield is_held_out, {name: each[part] for name, each in arrays.items()}


def _is_held_out(number: Any) -> Any:
    """Of a number, or of each of several."""
    return number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def _refuse_too_few(number: int) -> None:
    if number < HELD_OUT_EVERY:
        raise InputRefused(
            f"{number} calibration texts or rows are too few: {HELD_OUT_EVERY} are needed, of which one is held out"
        )
