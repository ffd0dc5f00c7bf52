"""Folders as data: each text file is a row, or each image, whose class is the name of its folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_export.errors import InputRefused, listed
from lora_export.storage.hashes import file_sha256
from lora_export.storage.input_files import open_regular, regular_files
from lora_export.training.records.rows import MAX_ROW, Row

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


class TextFiles:
    """The text files below a folder, in the order of their paths. A row has the whole text in `text`."""

    def __init__(self, path: Path, files: Sequence[Path]):
        self.path, self.files = path, files
        self.sha256 = _hash_of(path, files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> Row:
        with open_regular(self.files[row]) as file:
            content = file.read(MAX_ROW + 1)
        if len(content) > MAX_ROW:
            raise InputRefused(f"{self.files[row]} has more than {MAX_ROW:,} bytes")
        try:
            return {"text": content.decode("utf-8-sig")}
        except UnicodeDecodeError as error:
            raise InputRefused(f"{self.files[row]} is not UTF-8: byte {error.start}") from error

    def where(self, row: int) -> str:
        return str(self.files[row].relative_to(self.path))


class ImagesByClass:
    """The images in the folders of a folder. A row has the path of one in `image`, and its folder's name in `label`."""

    def __init__(self, path: Path, files: Sequence[Path]):
        """Raises InputRefused for images that are in no folder of a class."""
        self.path, self.files = path, files
        if loose := [str(file.relative_to(path)) for file in files if len(file.relative_to(path).parts) < 2]:
            raise InputRefused(f"{path} has images that are in no folder of a class:", listed(loose))
        self.sha256 = _hash_of(path, files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> Row:
        return {"image": self.files[row], "label": self.files[row].relative_to(self.path).parts[0]}

    def where(self, row: int) -> str:
        return str(self.files[row].relative_to(self.path))


def open_folder(path: Path) -> TextFiles | ImagesByClass:
    """The images of a folder by class, or its text files. Hidden files are left out.

    Raises InputRefused for a folder with both, and for an empty one.
    """
    files = [file for file in regular_files(path) if not any(part[0] == "." for part in file.relative_to(path).parts)]
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise InputRefused(f"{path} contains no files")
    if not images:
        return TextFiles(path, files)
    if others := sorted(set(files) - set(images)):
        names = [str(file.relative_to(path)) for file in others]
        raise InputRefused(f"{path} has {len(images):,} images, and other files:", listed(names))
    return ImagesByClass(path, images)


def _hash_of(path: Path, files: Iterable[Path]) -> str:
    lines = (f"{file.relative_to(path).as_posix()} {file_sha256(file)}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
