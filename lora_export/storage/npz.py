"""Arrays from a .npz file, read within bounds. Nothing is unpickled."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.isolation.limits import MAX_INFLATED, MAX_RATIO
from lora_export.storage.input_files import open_regular


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read the arrays of an .npz file, none larger than its bytes. Raises InputRefused for others and zip bombs."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            total, packed = sum(member.file_size for member in members), path.stat().st_size
            if total > MAX_INFLATED and total > MAX_RATIO * packed:
                raise InputRefused(
                    f"{path} inflates from {packed:,} bytes to {total:,}; if that is right, save it with numpy.savez"
                )
            arrays = {member.filename.removesuffix(".npy"): _read_array(archive, member) for member in members}
    except InputRefused:
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise a dozen types
        raise InputRefused(f"{path} is not an .npz file of plain arrays: {error}") from error
    if len(arrays) != len(members):
        raise InputRefused(f"{path} names an array more than once")
    return arrays


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in headers:
            raise ValueError(f"{member.filename} is of version {version}")
        shape, _, dtype = headers[version](stream)
        # NumPy would take the memory first. Entries without a size would be any number of them.
        if math.prod(shape) * max(dtype.itemsize, 1) > member.file_size:
            raise ValueError(f"{member.filename} is too short for {shape} of {dtype}")
        stream.seek(0)
        array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
        return array.astype(array.dtype.newbyteorder("="), copy=False)  # PyTorch and onnxruntime read no others
