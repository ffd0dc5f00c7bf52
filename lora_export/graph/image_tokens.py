"""How the images of a model are placed among its tokens, recorded in the graph of its vision encoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_export.errors import InputRefused
from lora_export.storage.json_files import parse_json

IMAGE_TOKENS_KEY = "lora_export.image_tokens"


@dataclass(frozen=True)
class ImageTokens:
    """The token in whose places the features of images are put, and how an image's grid becomes positions."""

    token: int
    merge: int = 0  # patches of a grid that become one token, along each side; 0: positions count the tokens

    @property
    def properties(self) -> dict[str, str]:
        """The metadata of a graph."""
        return {IMAGE_TOKENS_KEY: json.dumps(asdict(self))}


def image_tokens_of(metadata: Mapping[str, str], graph: Path) -> ImageTokens:
    """What a graph's metadata record. Raises InputRefused where they record nothing, or nonsense."""
    if IMAGE_TOKENS_KEY not in metadata:
        raise InputRefused(f"{graph} does not record the token of its images: it was not made by lora-export")
    content = parse_json(metadata[IMAGE_TOKENS_KEY].encode(errors="surrogatepass"), f"the image token in {graph}")
    numbers: list[Any] = [content.get("token"), content.get("merge", 0)]
    if not all(type(number) is int and 0 <= number < 1 << 31 for number in numbers):
        raise InputRefused(f"{graph} records no token of its images: {content!r}")
    return ImageTokens(*numbers)
