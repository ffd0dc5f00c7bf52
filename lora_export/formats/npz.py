"""Adapters as NumPy's `.npz`: `NAME.lora_A` (rank, in), `NAME.lora_B` (out, rank) and one `scale`."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import numpy as np

from lora_export.errors import InputRefused
from lora_export.formats.read_options import DEFAULTS, ReadOptions
from lora_export.formats.tensor_files import hash_of_files
from lora_export.lora import Adapter, LoraPair

DESCRIPTION = "a .npz file of NumPy with NAME.lora_A, NAME.lora_B and scale"
_KEY = re.compile(r"(.+)\.lora_A")


def recognises(path: Path) -> bool:
    """Whether the file is an archive of NumPy with such names. Reads its directory alone."""
    if path.suffix != ".npz" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(_KEY.fullmatch(name.removesuffix(".npy")) for name in archive.namelist())


def read(path: Path, name: str, options: ReadOptions = DEFAULTS) -> Adapter:
    """Read an adapter. Raises InputRefused where a factor or the scale is missing."""
    options.refuse_rank_and_alpha("its tensors")
    with np.load(path, allow_pickle=False) as file:
        try:
            modules = [found[1] for key in file.files if (found := _KEY.fullmatch(key))]
            scale = float(file["scale"])
            pairs = {one: LoraPair(file[f"{one}.lora_A"], file[f"{one}.lora_B"], scale) for one in modules}
        except KeyError as error:
            raise InputRefused(f"{path}: {error}") from error
    return Adapter(name=name, format="npz", pairs=pairs, scale_source="scale in the file", sha256=hash_of_files([path]))
