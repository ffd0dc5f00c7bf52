"""A diffusion pipeline on disk: a folder whose `model_index.json` names its models, each in a folder of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_export.errors import InputRefused
from lora_export.lora import DENOISER, SECOND_DENOISER, TEXT_ENCODERS
from lora_export.storage import input_files, json_files
from lora_export.storage.manifest import OF_THE_OUTPUT
from lora_export.weights.checkpoint import refuse_link_outside
from lora_export.weights.weight_files import PIPELINE_INDEX

# The folders in which a component may be, the first that the pipeline has.
FOLDERS = {
    DENOISER: ("unet", "transformer"),
    SECOND_DENOISER: ("transformer_2",),
    **{name: (name,) for name in TEXT_ENCODERS},
}
T5_OF_FLUX = "text_encoder_2"  # an adapter has T5 as the third text encoder, in pipelines with two of them too


@dataclass(frozen=True)
class Pipeline:
    """The folder of a pipeline, and its models."""

    path: Path
    models: Mapping[str, Path]  # name in the index -> folder
    class_name: str = ""  # of the pipeline in diffusers; empty where the index has none

    def folder_of(self, component: str, taken: Collection[str]) -> str:
        """The folder of the model that an adapter's component changes. `taken` are the components that it has.

        A component without a name is the model that removes the noise. Raises InputRefused where there is none.
        """
        candidates = FOLDERS[component or DENOISER]
        if component == TEXT_ENCODERS[2] and T5_OF_FLUX not in taken:
            candidates = (*candidates, T5_OF_FLUX)
        found = next((name for name in candidates if name in self.models), None)
        if found is None:
            raise InputRefused(f"{self.path} has no {' or '.join(candidates)}. Its models are {', '.join(self.models)}")
        return found

    def other_files(self, changed: Collection[str]) -> Iterator[Path]:
        """The files outside of the folders of changed models, relative to the pipeline.

        The record of an unchanged model is one of them: it has what is merged there already. Raises InputRefused for a
        link out of the folder.
        """
        home = self.path.resolve()
        for path in self.path.iterdir():
            if path.is_symlink() and path.is_dir():
                raise InputRefused(f"{path} is a link to a folder. Replace it with a copy of the folder")
        for path in input_files.shown_files(self.path):
            relative = path.relative_to(self.path)
            if relative.parts[0] not in changed and str(relative) not in OF_THE_OUTPUT:
                refuse_link_outside(path, home)
                yield relative


def is_pipeline(path: Path) -> bool:
    """Whether the folder of a pipeline is at `path`."""
    return (path / PIPELINE_INDEX).is_file()


def open_pipeline(path: Path) -> Pipeline:
    """Read the index of a pipeline. Raises InputRefused where it is damaged, or names no model that is there."""
    index = json_files.read_json(path / PIPELINE_INDEX)
    named = [
        name for name, value in index.items() if isinstance(value, list) and Path(name).name == name not in ("", "..")
    ]
    models = {name: path / name for name in named if (path / name).is_dir()}
    if not models:
        raise InputRefused(f"{path / PIPELINE_INDEX} names no model whose folder is there")
    name = index.get("_class_name")
    return Pipeline(path, models, name if isinstance(name, str) else "")
