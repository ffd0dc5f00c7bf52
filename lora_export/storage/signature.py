"""Signatures of outputs: who made an output, and that no byte of it has changed since.

A signature is a bundle as OpenSSF's Model Signing defines it: an in-toto statement with the SHA-256 of each file of the
output. The composition (base, adapters, verdict) is in the output's record, which is one of these files or inside of
one. The package model-signing makes and checks it, and so does its own command `model_signing verify`. Nothing is
imported before it is needed.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from lora_export.errors import Different, EnvironmentLacking, InputRefused, listed, one_line
from lora_export.extras import pip_install
from lora_export.options.spelling import named
from lora_export.storage.hashes import file_sha256
from lora_export.storage.input_files import files_of
from lora_export.storage.json_files import parse_json
from lora_export.storage.manifest import SIGNATURE, SIGNATURE_SUFFIX

KEYLESS = "sigstore"  # in place of a key: an identity that sigstore's servers confirm
PASSWORD = "LORA_EXPORT_SIGN_PASSWORD"  # the environment's variable for the password of a key
NEEDS_KEY = "Name a PEM file with a key on the curve P-256, P-384 or P-521"
# How messages of the package begin: on changed files, and on a signature by another key
MISMATCH, KEY_MISMATCH = "Signature mismatch", "Key mismatch"
MOST_BYTES = 1 << 26  # of a signature: a line of a hundred bytes for each file


def signature_of(output: Path) -> Path:
    """Where the signature of a folder or a file is. In a folder whose graph was signed, that of the graph lists all."""
    if not output.is_dir():
        return output.with_name(output.name + SIGNATURE_SUFFIX)
    own, of_files = output / SIGNATURE, list(output.glob(f"*{SIGNATURE_SUFFIX}"))
    return own if own.is_file() or len(of_files) != 1 else of_files[0]


def signer(key: str | Path, target: Path) -> Callable[[Path, Path], None]:
    """What signs the files of a folder as those of `target`: (folder, file of the signature) -> None.

    `key` is a file with a private key (PEM, on an elliptic curve), or `sigstore`. Raises InputRefused for a key that
    cannot be used, before anything is signed, and EnvironmentLacking without the package or sigstore's servers.
    """
    with _package_required("sign"):
        from model_signing import hashing, manifest, signing

        class Hashing(hashing.Config):
            """The hashes of a folder that becomes the target, under the target's name."""

            def hash(self, model_path: Any, **options: Any) -> Any:
                found = super().hash(model_path, **options)
                kind = manifest.SerializationType.from_args(found.serialization_type)
                items = [kind.new_item(each.identifier, each.digest) for each in found.resource_descriptors()]
                return manifest.Manifest(target.name, items, kind)

    config: Any = cast(Any, signing).Config()
    if str(key) == KEYLESS:
        with _servers_required():
            config.use_sigstore_signer(use_ambient_credentials=True)
    else:
        with _key_readable(Path(key), "sign"):
            # cryptography takes the password as bytes.
            password = os.environ[PASSWORD].encode() if PASSWORD in os.environ else None
            config.use_elliptic_key_signer(private_key=key, password=password)

    def sign(folder: Path, file: Path) -> None:
        config.set_hashing_config(cast(Any, Hashing)().set_ignored_paths(paths=[file.relative_to(folder)]))
        with _servers_required() if str(key) == KEYLESS else contextlib.nullcontext():
            config.sign(folder, file)

    return sign


def refuse_unsigned(output: Path, by: str | Path) -> None:
    """Raise Different unless an output is signed by `by`, and none of its files has changed since.

    `by` is a file with a public key, or `IDENTITY,ISSUER`, which sigstore's servers confirmed when it was signed. In a
    folder each file has to be signed. Beside a file, the file and what was signed with it, such as its external data.
    Raises InputRefused for a key that cannot be used, and EnvironmentLacking without the package or the servers.
    """
    file = signature_of(output)
    if not file.is_file():
        raise Different(f"{output} is not signed: there is no {file}")
    if file.stat().st_size > MOST_BYTES:
        raise InputRefused(f"{file} is larger than any signature")
    with _package_required("signature"):
        from cryptography.exceptions import InvalidSignature
        from model_signing import verifying

    config: Any = cast(Any, verifying).Config().set_ignore_unsigned_files(not output.is_dir())
    identity, comma, issuer = str(by).rpartition(",")
    if comma and not Path(by).is_file():
        with _servers_required():
            config.use_sigstore_verifier(identity=identity, oidc_issuer=issuer)
    else:
        with _key_readable(Path(by), "signature"):
            config.use_elliptic_key_verifier(public_key=by)
    content = file.read_bytes()
    try:
        # The package prints a warning on stdout, where the answer stands.
        with contextlib.redirect_stdout(io.StringIO()):
            config.verify(output if output.is_dir() else output.parent, file)
    except InvalidSignature:
        raise Different(f"{output} is signed with another key than {by}, or its signature was changed") from None
    except (ValueError, KeyError, IndexError, OSError) as error:
        if str(error).startswith(KEY_MISMATCH):
            raise Different(f"{output} is signed with another key than {by}") from None
        if changes := _changes(output, signed_files(content, file)) if str(error).startswith(MISMATCH) else []:
            raise Different(f"{output} is not what {by} signed:", listed(changes)) from None
        raise Different(f"{output} is not what {by} signed: {one_line(str(error)).strip()}") from error
    if file.read_bytes() != content or not (output.is_dir() or output.name in signed_files(content, file)):
        raise Different(f"{file} is the signature of other files than {output.name}")


def signed_files(content: bytes, file: Path) -> dict[str, str]:
    """Name -> hash of each file that a signature lists. Raises InputRefused where it lists none."""
    envelope = parse_json(content, str(file)).get("dsseEnvelope")
    try:
        statement = parse_json(base64.b64decode(cast(Any, envelope)["payload"], validate=True), str(file))
        return {str(each["name"]): str(each["digest"]) for each in statement["predicate"]["resources"]}
    except (KeyError, TypeError, ValueError) as error:
        raise InputRefused(f"{file} lists no files") from error


def _changes(output: Path, signed: Mapping[str, str]) -> list[str]:
    """What was done to an output after it was signed: a line for each file."""
    folder, own = (output, files_of(output)) if output.is_dir() else (output.parent, [])
    present = {path.relative_to(folder).as_posix() for path in own} - {SIGNATURE}
    lines = [f"{one_line(name)} was added" for name in sorted(present - set(signed))]
    for name, digest in signed.items():
        path = folder / name
        if not path.is_file():
            lines.append(f"{one_line(name)} is missing")
        elif file_sha256(path) != digest:
            lines.append(f"{one_line(name)} contains other bytes than were signed")
    return lines


@contextlib.contextmanager
def _package_required(option: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise EnvironmentLacking(f"{named(option)} needs model-signing ({error}): {pip_install('sign')}") from error


@contextlib.contextmanager
def _key_readable(path: Path, option: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError) as error:
        reason = one_line(str(error.strerror if isinstance(error, OSError) else error)).rstrip(".?")
        needs = f"Its password is taken from {PASSWORD}" if isinstance(error, TypeError) else NEEDS_KEY
        raise InputRefused(f"{named(option, path)} cannot be used: {reason}. {needs}") from error


@contextlib.contextmanager
def _servers_required() -> Iterator[None]:
    """Turn a failure of sigstore's servers, or of the identity, into EnvironmentLacking."""
    from requests import RequestException
    from sigstore.errors import Error

    try:
        yield
    except (Error, RequestException, OSError) as error:
        raise EnvironmentLacking(
            f"{KEYLESS} could not be used: {one_line(str(error)) or type(error).__name__}. It needs the network and an "
            "identity: that of a job in CI, or a browser"
        ) from error
