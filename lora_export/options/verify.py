"""The options of `verify`, and of the gates that `verify` and `inspect` have before a deployment."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lora_export.errors import WrongUsage
from lora_export.options.combining import AdapterSources, GivenAdapters
from lora_export.options.common import Download, ModelSource, Reported, axis_size
from lora_export.options.declaring import Option, Options, Section, argument, declares, nested, option, table_of
from lora_export.options.proof import Running
from lora_export.options.spelling import named

SECONDS_OF_UNIT = {"s": 1, "m": 60, "h": 3600}
DURATION = re.compile(r"([1-9]\d{0,8})([smh])")
SHA256_DIGITS = re.compile("[0-9a-f]{64}")


def runs_in_ci() -> bool:
    """Whether this is a job of CI, by the environment: GitHub, GitLab, CircleCI and others set CI=true."""
    return os.environ.get("CI", "").lower() in ("true", "1")


def seconds_of(duration: str) -> float:
    """The seconds of a duration such as 90s, 10m or 2h. Raises WrongUsage for another text."""
    found = DURATION.fullmatch(duration)
    if found is None:
        raise WrongUsage(f"{named('watch', duration)} is no duration: give one such as 90s, 10m or 2h")
    return float(found[1]) * SECONDS_OF_UNIT[found[2]]


@dataclass(frozen=True)
class Expectations(Options):
    """What a deployment gate expects; None and empty where anything is right. True where something is expected.

    Raises WrongUsage for a hash that is no SHA-256.
    """

    SECTION: ClassVar[Section] = Section.EXPECTED

    adapter_sha256: Sequence[str] = option(
        (),
        "End with exit code 4 unless this is the SHA-256 of the adapter. Once for each of several adapters.",
        flags=("--expect-adapter-sha256",),
        metavar="HEX",
    )
    rank: int | None = option(
        None, "The same for the rank of every pair.", flags=("--expect-rank",), metavar="R", at_least=1
    )
    alpha: float | None = option(
        None, "The same for alpha: scale x rank, with rsLoRA x its root.", flags=("--expect-alpha",), metavar="ALPHA"
    )
    base_sha256: Sequence[str] = option(
        (),
        "The same for the SHA-256 of the base's weights. Once for each of its files.",
        flags=("--expect-base-sha256",),
        metavar="HEX",
    )
    signature: str | Path | None = option(
        None,
        "The same unless the file or folder is signed by this public key, or by this identity at sigstore, no byte of "
        "it has changed since, and its record has the adapters and the base that are given here.",
        metavar="KEY.pem|IDENTITY,ISSUER",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("adapter_sha256", "base_sha256"):
            values = tuple(value.lower() for value in getattr(self, name))
            object.__setattr__(self, name, values)
            for value in values:
                if not SHA256_DIGITS.fullmatch(value):
                    raise WrongUsage(
                        f"{named(f'expect_{name}')} {value!r} is no SHA-256: give its 64 hexadecimal digits"
                    )

    def __bool__(self) -> bool:
        return self != Expectations()


@dataclass(frozen=True, kw_only=True)
class Judging(Running):
    """How the candidate is run, and how its outputs are judged."""

    SECTION: ClassVar[Section] = Section.PROOF

    onnx_adapter: str | Path | None = option(
        None,
        "Adapter file to run CANDIDATE with. For a graph made by `onnx {lora=inputs}`, or a .pte by `torchscript "
        "{lora=inputs}`.",
        often=True,
        metavar="FILE",
        section=Section.OPTIONS,
    )
    adapter_id: int | None = option(
        None,
        "Adapter of all rows (0: the base), for a graph made by `onnx {lora=rows}`. Without it, the base, every "
        "adapter of {adapters} (in the order of the ids) and mixed batches are proven.",
        metavar="N",
        at_least=0,
        section=Section.OPTIONS,
    )
    runner: str | None = option(
        None,
        "What runs CANDIDATE, in place of onnxruntime or PyTorch: openvino, onnx-reference, a name that a package "
        "registers, or your own function (see `guide runners`).",
        metavar="NAME|FILE.py:FUNCTION",
        section=Section.PROOF,
    )
    served_name: str | None = option(
        None,
        "Model of an endpoint that is judged. Default: that of the adapter's name, or the only one.",
        metavar="NAME",
        section=Section.OPTIONS,
    )
    other: AdapterSources = option(
        (),
        "Adapter of another tenant of an endpoint: its answers must be distinguishable. May be repeated.",
        metavar="[NAME=]ADAPTER",
        kind="source",
        multiple=True,
        section=Section.PROOF,
    )
    watch: str | None = option(
        None,
        "Repeat the proof so long after each, with fresh inputs, and end with the first verdict that is not `same`: "
        "90s, 10m or 2h.",
        metavar="DURATION",
    )
    atol: float | None = option(None, "Also require |candidate - reference| <= atol + rtol·|reference|.", at_least=0)
    rtol: float | None = option(None, "See {atol}.", at_least=0)
    input_seed: int | None = option(None, "Random seed for the generated inputs.  [default: 0]")
    cache: str | Path | None = option(
        None,
        "Store the outputs of the fp64 reference here, and reuse them for the same model, adapters and inputs.",
        section=Section.FILES,
        metavar="FOLDER",
        kind="folder",
    )
    trace: bool = option(False, "Compare every module (always done when the verdict is `different`).")
    fixed: Mapping[str, int] | None = option(
        None,
        "An axis, such as `sequence`, that CANDIDATE has in one size on purpose. Without it, an axis that "
        "CANDIDATE fixes and MODEL does not makes the verdict `undecided`. May be repeated.",
        metavar="AXIS=SIZE",
        read=table_of("AXIS=SIZE, such as sequence=128", axis_size),
    )


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(GivenAdapters, Judging, Download, Reported):
    """What `verify` takes."""

    candidate: str | Path = field(kw_only=False, metadata=argument("CANDIDATE", kind="source", multiple=False))
    model: "ModelSource | None" = field(
        default=None,
        kw_only=False,
        metadata=declares(
            Option(
                "PyTorch model that CANDIDATE was made from.",
                metavar="MODEL",
                kind="source",
                multiple=False,
                often=True,
            )
        ),
    )
    base: str | Path | None = option(
        None,
        "Without {model}: compare a merged checkpoint with this base and the adapters, weight by weight. With "
        "{model}: the quantised .onnx that CANDIDATE was made from, by `merge {requantize}` or `onnx {lora}`.",
        metavar="CHECKPOINT",
        often=True,
    )
    calibration: str | Path | None = option(
        None,
        "The file of `merge {calibration}`: the outputs of calibrated layers are judged on its held-out part, too. "
        "Needs PyTorch.",
        section=Section.PROOF,
        metavar="TEXTS|FILE.npz",
    )
    reports: Sequence[str | Path] = option(
        (),
        "Write the verdict as JSON (every figure), JUnit XML (for CI), HTML (to read), Markdown (for a model's page) "
        "or SVG (a badge). May be repeated.",
        section=Section.FILES,
        flags=("--report",),
        often=True,
        metavar="FILE.json|.xml|.html|.md|.svg",
        kind="path",
    )
    expected: Expectations = nested(Expectations)
    strict: bool = option(
        False,
        "Call a candidate of which a part was not judged `undecided`.  [default: strict where CI=true]",
        section=Section.PROOF,
        flags=("--strict/--no-strict",),
        often=True,
        command_line_default=runs_in_ci,
    )
    session: object = field(default=None, repr=False, compare=False)  # a ProofSession; no option of the command line
    about: Mapping[str, Any] | None = option(
        None, "Further facts for the reports.", python_only=True, kind="text", multiple=False
    )
