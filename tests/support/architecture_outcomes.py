"""What becomes of an adapter that PEFT trained on each architecture that transformers renames."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import transformers

import lora_export
from lora_export.errors import LoraExportError
from support import tables
from support.architectures import NotBuilt, Trained, architectures, different, names_in, reloaded, trained

RIGHT, REFUSED, WRONG, NO_MODEL = "right", "refused", "wrong", "no tiny model"
GENERATIONS = {"original": "original names", "loaded": "names of the loaded model"}
COLUMNS = (RIGHT, REFUSED, WRONG, NO_MODEL)
TOLERANCE = 2e-6  # PEFT sums in another sequence


@dataclass(frozen=True)
class Outcome:
    """Of one class and one generation of names."""

    architecture: str
    generation: str
    what: str
    why: str = ""


def outcomes(names: Iterable[str] = ()) -> Iterator[Outcome]:
    for name in names or architectures():
        folder = Path(tempfile.mkdtemp(prefix="architecture"))
        try:
            yield from _of(name, folder)
        finally:
            shutil.rmtree(folder)


def _of(name: str, folder: Path) -> Iterator[Outcome]:
    try:
        model = trained(name, folder)
    except NotBuilt as why:
        yield from (Outcome(name, each, NO_MODEL, str(why)) for each in GENERATIONS)
        return
    for generation in GENERATIONS:
        try:
            yield Outcome(
                name, generation, *_merged(model, getattr(model, generation), folder / f"{generation}-merged")
            )
        except LoraExportError as refused:
            yield Outcome(name, generation, REFUSED, str(refused))


def _merged(model: Trained, base: Path, output: Path) -> tuple[str, str]:
    lora_export.merge(base, model.adapter, output)
    if not model.changed:
        return WRONG, "PEFT changed nothing"
    if off := different(model.merged, reloaded(model.cls, output).state_dict(), tolerance=TOLERANCE):
        return WRONG, f"{len(off)} tensors are not PEFT's, such as {min(off)}"
    if names_in(output) != names_in(base):
        return WRONG, "the names are not the base's"
    found = lora_export.verify(output, base=base, adapters=[model.adapter])
    return (RIGHT, "") if found else (WRONG, f"verify --base: {found}")


def as_text(found: Iterable[Outcome]) -> str:
    """The counts, and the classes that are not right in both generations."""
    found = list(found)
    counts = {title: Counter(one.what for one in found if one.generation == key) for key, title in GENERATIONS.items()}
    table = tables.table(
        {title: {column: str(count[column]) for column in COLUMNS} for title, count in counts.items()}, "checkpoint"
    )
    lines = []
    for what in (REFUSED, WRONG, NO_MODEL):
        names = sorted({one.architecture for one in found if one.what == what})
        if names:
            lines += ["", f"{what.capitalize()}: {', '.join(names)}."]
    return "\n".join([table, *lines, "", f"transformers {transformers.__version__}"])
