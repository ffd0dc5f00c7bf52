"""What the reference said, kept in a folder for the next candidate of the same model.

The reference is the dear part of a proof: fp64, three times for each case. It does not know the candidate, so that
what it says of a model, its adapters and the inputs is said once. An entry is found by the hashes of these, and
believed only where the code that made it is the same and its own hash is right. A folder that others can write to
is no place for it: who writes there decides what is true.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import nn

from lora_export import __version__
from lora_export.errors import InputRefused, OutputFailed
from lora_export.lora import Adapter
from lora_export.models.model import Model
from lora_export.storage import atomic_output, files, safetensors_file

Arrays = dict[str, NDArray[Any]]
Say = Callable[[str], None]

METADATA = "lora_export"
KNOWN_BY_VERSION = ("torch", "transformers", "builtins")  # packages whose code their version tells


@dataclass(frozen=True)
class Question:
    """What the reference is asked. `key` is of the model, adapters and inputs, `made_with` of the code that answers."""

    key: str
    made_with: dict[str, str]


class Answers:
    """What the reference said and says. Whatever is wrong with the folder is said to `say` and never ends a proof.

    Without a question there is nothing to look up or to keep. `stayed` are the operators that the reference could not
    lift to fp64: they are kept with what it said.
    """

    def __init__(self, folder: Path | None, question: Question | None, stayed: set[str], say: Say):
        self.folder, self.question, self.stayed, self.say = folder, question, stayed, say
        self.said: dict[tuple[str, str], Arrays] = {}  # (case, role) -> output -> values
        self.is_kept = False
        if folder is None:
            return
        if question is None:
            say("cache: not used: an adapter came from no file, or was merged into quantised weights")
        else:
            self._look_up(question)

    def of(self, case: str, role: str, ask: Callable[..., Arrays], *arguments: Any) -> Arrays:
        """What was said of a case in a role (reference, base, scaled), or what `ask` answers now."""
        if (case, role) not in self.said:
            self.said[case, role] = ask(*arguments)
        return self.said[case, role]

    def keep(self) -> None:
        """Write down what was said, whole or not at all, unless it stands there already."""
        if self.folder is None or self.question is None or self.is_kept:
            return
        flat = [((*key, output), values) for key, arrays in self.said.items() for output, values in arrays.items()]
        told = {"made_with": self.question.made_with, "stayed": sorted(self.stayed), "digest": _digest(flat)}
        path = self._path(self.question)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_output.stage_file(path, inputs=[], overwrite=True) as stage:
                named = {json.dumps(name): values for name, values in flat}
                safetensors_file.write(stage / path.name, named, {METADATA: json.dumps(told)})
        except (OutputFailed, OSError, KeyError) as error:  # KeyError: a dtype that safetensors does not have
            self.say(f"cache: nothing was kept: {error}")

    def _look_up(self, question: Question) -> None:
        path = self._path(question)
        if not path.exists():
            return
        try:
            there = safetensors_file.open_file(path)
            told = files.parse_json(there.metadata.get(METADATA, "{}").encode(), f"the record in {path}")
            flat = [(tuple(json.loads(name)), there.read(name)) for name in there.entries]
            if told.get("digest") != _digest(flat):
                raise InputRefused("its values are not those that were written")
            if told["made_with"] != question.made_with:
                changes = _changes(told["made_with"], question.made_with)
                self.say(f"cache: {path.name} is stale ({changes}): the reference is asked again")
                return
            for (case, role, output), values in flat:
                self.said.setdefault((case, role), {})[output] = values
            self.stayed.update(told["stayed"])
        except (InputRefused, ValueError, TypeError, KeyError, AttributeError) as error:
            self.said.clear()
            self.say(f"cache: {path.name} is damaged ({error}): the reference is asked again")
        else:
            self.is_kept = True

    def _path(self, question: Question) -> Path:
        assert self.folder is not None
        return self.folder / f"reference-{question.key[:32]}.safetensors"


def question(
    model: Model,
    adapters: Sequence[Adapter],
    strengths: Sequence[float] | None,
    inputs: Mapping[str, Arrays],
    rounded: Mapping[str, str],
    settled: nn.Module,
) -> Question | None:
    """The hashes of everything that the reference's answer depends on; None for an adapter that came from no file.

    Of weights that the reference rounds, to the dtypes `rounded`, the candidate may have chosen some, where two are as
    near: what they have become stands in `settled`.
    """
    if not all(adapter.sha256 for adapter in adapters):
        return None
    digest = hashlib.sha256()
    digest.update(model.fingerprint().encode())
    for name, buffer in sorted(model.module.named_buffers()):  # those that no state_dict holds, too
        _feed(digest, name, buffer.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    chosen = [
        [adapter.sha256, float(w)] for adapter, w in zip(adapters, strengths or [1.0] * len(adapters), strict=True)
    ]
    digest.update(json.dumps(chosen).encode())
    for name in sorted(rounded):
        weight = settled.state_dict()[name].detach().cpu().contiguous().reshape(-1)
        _feed(digest, f"{name}\0{rounded[name]}", weight.view(torch.uint8).numpy())
    for case, arrays in inputs.items():
        for name, array in arrays.items():
            _feed(digest, f"{case}\0{name}\0{array.dtype}\0{array.shape}", array)
    return Question(digest.hexdigest(), _made_with(model.module))


def _feed(digest: Any, name: str, array: NDArray[Any]) -> None:
    digest.update(f"\0{name}\0{array.nbytes}\0".encode(errors="surrogatepass"))
    digest.update(np.ascontiguousarray(array).tobytes())


def _made_with(module: nn.Module) -> dict[str, str]:
    """The versions and the model's own code: of the same weights, another forward makes another answer."""
    told = {"lora_export": __version__, "torch": torch.__version__}
    if transformers := sys.modules.get("transformers"):
        told["transformers"] = str(transformers.__version__)
    structure = hashlib.sha256(repr(module).encode())
    structure.update(str(getattr(module, "config", "")).encode())
    told["structure"] = structure.hexdigest()
    for path in sorted({path for part in module.modules() for path in _sources(type(part))}):
        told[f"code of {path.name}"] = files.sha256(path)
    return told


def _sources(kind: type) -> list[Path]:
    """The files in which a layer's class, and those that it comes of, are written."""
    written = [each for each in kind.__mro__ if each.__module__.partition(".")[0] not in KNOWN_BY_VERSION]
    paths = []
    for each in written:
        try:
            paths.append(Path(inspect.getfile(each)))
        except (TypeError, OSError):  # typed at a prompt, or compiled
            continue
    return [path for path in paths if path.is_file()]


def _digest(said: Sequence[tuple[Sequence[str], NDArray[Any]]]) -> str:
    digest = xxhash.xxh3_128()
    for name, array in sorted(said, key=lambda there: list(there[0])):
        _feed(digest, json.dumps([*name, str(array.dtype), list(array.shape)]), array)
    return digest.hexdigest()


def _changes(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return ", ".join(
        f"{name} {then.get(name, 'absent')[:12]} then, {now.get(name, 'absent')[:12]} now" for name in sorted(names)
    )
