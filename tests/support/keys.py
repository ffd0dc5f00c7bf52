"""Keys that sign outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec


def a_key(folder: Path, name: str, password: bytes | None = None, curve: Any = ec.SECP256R1) -> Path:
    """`NAME.pem`, and `NAME.pub` beside it."""
    key = ec.generate_private_key(curve())
    sealed = pem.BestAvailableEncryption(password) if password else pem.NoEncryption()
    path = folder / f"{name}.pem"
    path.write_bytes(key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, sealed))
    public = key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(public)
    return path
