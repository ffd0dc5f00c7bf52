"""Options of a proof: its inputs, and how a graph is run."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from lora_export.isolation.limits import TIMEOUT
from lora_export.options.common import Signed
from lora_export.options.declaring import Option, Options, Section, means, option

NO_PROOF = "--no-verify"  # what files record where no proof was requested, whichever interface it was

ProviderName = Literal["cpu", "cuda"]
Dtype = Literal["float32", "float16", "bfloat16"]

PROVIDER = Option("Execution provider on which onnxruntime must run.", section=Section.PROOF, often=True)


@dataclass(frozen=True, kw_only=True)
class ProofInputs(Options):
    """Inputs that a proof takes besides the generated ones."""

    inputs: str | Path | None = option(
        None,
        "Further inputs for the proof: one array for each input of the model, by its name. They are the example "
        "where the inputs of a Hugging Face model cannot be generated.",
        section=Section.PROOF,
        metavar="FILE.npz",
    )


@dataclass(frozen=True, kw_only=True)
class Running(ProofInputs):
    """How a graph is run in its proof, and in which precision the model is deployed."""

    SECTION: ClassVar[Section] = Section.PROOF

    provider: ProviderName = means("cpu", PROVIDER)
    dtype: Dtype = option(
        "float32",
        "Precision of the deployed model. Tolerances follow PyTorch's own error in that precision.",
        often=True,
    )
    timeout: float | None = option(
        None,
        "Stop a run of CANDIDATE or of a graph that takes longer than this. Default: see `guide limits`.",
        metavar="SECONDS",
        above=0,
    )
    memory: float | None = option(
        None,
        "Memory that a run of CANDIDATE or of a graph may take. Default: 2 GiB and four times the file.",
        metavar="GIB",
        above=0,
    )

    @property
    def seconds(self) -> float:
        """How long a run may take where PyTorch is not timed."""
        return float(TIMEOUT) if self.timeout is None else self.timeout


@dataclass(frozen=True, kw_only=True)
class Published(ProofInputs, Signed):
    """What a function takes that proves a file before it publishes it."""

    verify: bool = option(True, "Publish without a proof. The file records that.", section=Section.PROOF, often=True)
