"""What several tests share: onnx_adapters."""

from __future__ import annotations


def shortened(data: bytes) -> bytes:
    return data[: len(data) // 2]
