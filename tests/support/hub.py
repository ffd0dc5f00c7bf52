"""A cache of the Hugging Face Hub, as huggingface_hub makes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, name: str, files: Mapping[str, str | Path]) -> Path:
    """Put a model into a cache, with links to its contents, and return its snapshot. A path is a file to copy."""
    model = cache / f"models--{name.replace('/', '--')}"
    snapshot = model / "snapshots" / COMMIT
    for folder in (snapshot, model / "blobs", model / "refs"):
        folder.mkdir(parents=True)
    (model / "refs/main").write_text(COMMIT)
    for number, (file, content) in enumerate(files.items()):
        blob = model / "blobs" / f"{number:040}"
        blob.write_bytes(content.encode() if isinstance(content, str) else content.read_bytes())
        (snapshot / file).symlink_to(blob)
    return snapshot
