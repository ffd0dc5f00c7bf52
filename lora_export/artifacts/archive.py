"""The zip archive of a .pt2 file: uncompressed members in one folder. What torch would not write is refused."""

from __future__ import annotations

import stat
import zipfile
from pathlib import Path
from typing import BinaryIO

from lora_export.errors import InputRefused, refuse_unprintable
from lora_export.storage import input_files

MAX_READ = 1 << 26  # bytes that are read at once: a zip's directory may not ask for more


class _BoundedReads:
    """A file that refuses to read more than MAX_READ bytes at once: a zip's directory may claim gigabytes."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.seek, self.tell, self.seekable, self.close = file.seek, file.tell, file.seekable, file.close

    def read(self, size: int = -1) -> bytes:
        content = self.file.read(min(size, MAX_READ + 1) if size >= 0 else MAX_READ + 1)
        if len(content) > MAX_READ:
            raise zipfile.BadZipFile("its directory claims more bytes than such a file needs")
        return content


class opened:  # noqa: N801 - used as a function is
    """The zip file at a path, while the context is active. Raises InputRefused for whatever zipfile raises.

    `refusal` is the predicate of the message.
    """

    def __init__(self, path: Path, refusal: str = "is no .pt2 file"):
        self.path, self.refusal = path, refusal

    def __enter__(self) -> zipfile.ZipFile:
        self.file = input_files.open_regular(self.path)
        try:
            return zipfile.ZipFile(_BoundedReads(self.file))
        except Exception as error:  # zipfile has a dozen kinds for this
            self.file.close()
            raise InputRefused(f"{self.path} {self.refusal}: {error}") from error

    def __exit__(self, *_: object) -> None:
        self.file.close()


def members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """The members of the archive's one folder, by their names in it.

    Raises InputRefused for what torch would not write: several folders, names that lead out of the folder, links,
    duplicates, compressed members, and members larger than the file.
    """
    found: dict[str, zipfile.ZipInfo] = {}
    roots = set()
    refuse_unprintable((info.filename for info in archive.infolist()), str(path))
    for info in archive.infolist():
        root, _, name = info.filename.partition("/")
        roots.add(root)
        if not name or "\\" in name or any(part in ("", ".", "..") for part in (root, *name.split("/"))):
            raise InputRefused(f"{path} has a member {info.filename!r}, which leads out of its folder")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise InputRefused(f"{path}: its member {name} is a link")
        if name in found:
            raise InputRefused(f"{path} contains {name} more than once")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise InputRefused(f"{path}: its member {name} is compressed; torch.export.save compresses none")
        found[name] = info
    if len(roots) > 1:
        raise InputRefused(f"{path} has {len(roots)} folders at its top, where torch.export.save writes one")
    total, size = sum(info.file_size for info in found.values()), path.stat().st_size
    if total > size:
        raise InputRefused(f"{path}: its members claim {total:,} bytes, and it has {size:,}")
    return found


def content(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, *, most: int | None = None) -> bytearray:
    """The bytes of a member, its checksum verified. Raises InputRefused if it is damaged, or above `most` bytes."""
    if most is not None and info.file_size > most:
        raise InputRefused(f"{path}: {info.filename} has more than {most:,} bytes, which no such file needs")
    content = bytearray()
    try:
        with archive.open(info) as member:
            while piece := member.read(MAX_READ):
                content += piece
    except Exception as error:  # zipfile has a dozen kinds for this
        raise InputRefused(f"{path} is damaged: {error}") from error
    if len(content) != info.file_size:
        raise InputRefused(f"{path} is cut short: {info.filename} should have {info.file_size:,} bytes")
    return content
