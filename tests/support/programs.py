"""Modules with PEFT adapters, exported by torch.export to .pt2 files for `verify`."""

from __future__ import annotations

import copy
import functools
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.export import Dim

from lora_export import formats
from lora_export.lora import Adapter
from support.factories import Pictures, Wide, Worded
from support.peft_models import fill
from support.tiny_models import tiny_bert, tiny_gpt2, tiny_llama

VARIES = Dim.DYNAMIC


@dataclass(frozen=True, eq=False)
class Subject:
    """A module, the inputs it is exported with, and the layers that its adapter targets."""

    make: Callable[[], nn.Module]
    inputs: Mapping[str, Tensor]
    dynamic: int  # how many of each input's first axes vary
    targets: tuple[str, ...]

    @functools.cached_property
    def base(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().eval()

    @functools.cached_property
    def adapted(self) -> peft.PeftModel:
        """PEFT's model with the adapter attached; no A or B is zero."""
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(self.targets))
        model = peft.get_peft_model(copy.deepcopy(self.base), config).eval()
        fill(model, "lora_", std=0.3)
        return model

    def adapter(self, folder: Path) -> Adapter:
        """The adapter as PEFT saves it."""
        self.adapted.save_pretrained(str(folder))
        return formats.load(folder)

    def merged(self, change: Callable[[peft.PeftModel], object] = lambda _: None) -> nn.Module:
        """The merge that PEFT makes, after a change."""
        model = copy.deepcopy(self.adapted)
        with torch.no_grad():
            change(model)
        return model.merge_and_unload()

    def export(self, module: nn.Module, path: Path, **how: Any) -> Path:
        return export(module, self.inputs, path, dynamic=self.dynamic, **how)


def export(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    path: Path,
    *,
    dynamic: int = 1,
    decomposed: bool = False,
    shapes: Any = None,
) -> Path:
    """Export a module to a .pt2 file, inputs by their names, the first `dynamic` axes of each to vary."""
    if shapes is None:
        shapes = {name: dict.fromkeys(range(min(dynamic, value.ndim)), VARIES) for name, value in inputs.items()}
    exported = torch.export.export(module.eval(), (), dict(inputs), dynamic_shapes=shapes if dynamic else None)
    torch.export.save(exported.run_decompositions() if decomposed else exported, path)
    return path


def rewritten(source: Path, to: Path, members: Mapping[str, bytes | None]) -> Path:
    """The archive with some members replaced, added, or (None) left out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(to, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        named = {f"{root}/{name}": content for name, content in members.items()}
        for info in old.infolist():
            content = named.pop(info.filename, old.read(info))
            if content is not None:
                new.writestr(info.filename, content)
        for name, content in named.items():
            new.writestr(name, content or b"")
    return to


def graph_of(path: Path) -> tuple[str, dict[str, Any]]:
    """The name of a program's graph in its archive, and its JSON."""
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if "/models/" in name)
        return name.partition("/")[2], json.loads(archive.read(name))


def ids(rows: int, length: int, *, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def padded(rows: int, length: int) -> Tensor:
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1, length - 3 :] = 0
    return mask


SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES |= {"max_position_embeddings": 64}


def llama() -> nn.Module:
    return tiny_llama(**SIZES, num_key_value_heads=1, use_cache=False)


def bert() -> nn.Module:
    return tiny_bert(**SIZES)


def gpt2() -> nn.Module:
    gpt2_sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_positions": 64}
    return tiny_gpt2(**gpt2_sizes, use_cache=False, tie_word_embeddings=False)


WORDS = {"input_ids": ids(2, 11), "attention_mask": padded(2, 11)}
SUBJECTS = {
    "mlp": Subject(
        Wide, {"rows": torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2))}, 2, ("up", "down")
    ),
    "cnn": Subject(
        Pictures,
        {"picture": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))},
        1,
        ("first", "second", "dense"),
    ),
    "words": Subject(Worded, {"ids": ids(2, 5) % 10, "mask": padded(2, 5)}, 2, ("words", "dense")),
    "llama": Subject(llama, WORDS, 2, ("q_proj", "v_proj", "down_proj")),
    "bert": Subject(bert, {**WORDS, "token_type_ids": ids(2, 11, seed=1) % 2}, 2, ("query", "value", "dense")),
    "gpt2": Subject(gpt2, WORDS, 2, ("c_attn", "c_fc")),
}


class ProgramFiles:
    """The base, PEFT's merge and the adapter of each subject, as files that are written once."""

    def __init__(self, folder: Path):
        self.folder = folder

    def base(self, name: str) -> Path:
        path = self.folder / f"{name}-base.pt2"
        return path if path.exists() else SUBJECTS[name].export(SUBJECTS[name].base, path)

    def merged(self, name: str) -> Path:
        path = self.folder / f"{name}-merged.pt2"
        return path if path.exists() else SUBJECTS[name].export(SUBJECTS[name].merged(), path)

    def adapter_folder(self, name: str) -> Path:
        folder = self.folder / f"{name}-adapter"
        if not folder.exists():
            SUBJECTS[name].adapted.save_pretrained(str(folder))
        return folder

    def adapter(self, name: str) -> Adapter:
        return formats.load(self.adapter_folder(name))
