"""Options that several commands have: what is written, and what is reported while it is made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from lora_export.callbacks import OnMessage, OnProgress, ignore
from lora_export.errors import WrongUsage
from lora_export.options.declaring import Option, Options, Section, declares, option, table_of
from lora_export.options.spelling import named


class LoadedModel(Protocol):
    """What `load_model` returns: a PyTorch module, and what is known of it."""

    @property
    def module(self) -> Any: ...

    def fingerprint(self) -> str:
        """The SHA-256 of its weights."""
        ...


ModelSource: TypeAlias = str | Path | LoadedModel | tuple[Any, Any]  # the last: a module and its example inputs


def is_address(path: str | Path) -> bool:
    """Whether this is the address of a server: a text, since a path has no two slashes in a row."""
    return isinstance(path, str) and path.lower().startswith(("http://", "https://"))


LAYOUT = Option(
    "Layout of a square matrix of a checkpoint, or of a layer of a model's own class: out_in (nn.Linear) or in_out "
    "(transformers' Conv1D). NAME is a tensor, a module or a glob such as '*'. Needed only where neither the model nor "
    "the adapter determines it. May be repeated: the last match counts.",
    metavar="NAME=in_out|out_in",
    read=table_of("NAME=out_in or NAME=in_out", {"out_in": "out_in", "in_out": "in_out"}.__getitem__, at_last=True),
)
LEAST_RETENTION = Option(
    "Least part of a weight's change that has to survive rounding. Less is refused; where a quantised base stays so, "
    "the layer gets more bits or becomes floats.",
    section=Section.OUTPUT,
    at_least=0,
    at_most=1,
)

SHARE_WITH = Option(
    "Refer to equal weights of this graph instead of writing them again. It is in the folder of {output}, and was "
    "written with {external_data}.",
    metavar="GRAPH.onnx",
)
WEIGHTS_BESIDE = Option(
    "Write the weights into a file beside the graph, whatever their size. From 512 MiB on they always are."
)
GREATEST_SEED = 2**63 - 1  # of PyTorch's generators
JOBS_AT_ONCE = Option(
    "Processes on this machine that work at the same time.", flags=("-j", "--jobs"), metavar="N", at_least=1
)
RAY_ADDRESS = Option(
    "Run on Ray: the address of a cluster, auto for the one that this machine belongs to, or local.",
    metavar="ADDRESS|local",
)


def axis_size(text: str) -> int:
    """A size from 1 on. Raises ValueError for another text."""
    if not text.isdecimal() or not int(text):
        raise ValueError(text)
    return int(text)


def written(text: str, metavar: str = "") -> Mapping[str, Any]:
    """The option that names the output, as the metadata of a field. `text` is its help."""
    output = Option(text, section=Section.OPTIONS, flags=("-o", "--output"), metavar=metavar, kind="path", often=True)
    return declares(output)


@dataclass(frozen=True, kw_only=True)
class Reported(Options):
    """What a function calls while it runs. They are no options of the command line."""

    on_message: OnMessage = field(default=ignore, repr=False, compare=False)
    on_progress: OnProgress = field(default=ignore, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("on_message", "on_progress"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, ignore)  # a record is frozen
            if not callable(getattr(self, name)):
                raise WrongUsage(f"{named(name)} is {getattr(self, name)!r}; it must be a function, or left out")


@dataclass(frozen=True, kw_only=True)
class Download(Options):
    """Whether names of the Hugging Face Hub are downloaded."""

    download: bool = option(
        False, "Download models and adapters named as on the Hugging Face Hub, if not cached.", section=Section.FILES
    )


@dataclass(frozen=True, kw_only=True)
class Output(Download, Reported):
    """What a function that writes takes."""

    overwrite: bool = option(False, "Replace an existing output, in one step.", section=Section.FILES, often=True)


@dataclass(frozen=True, kw_only=True)
class Signed(Output):
    """What a function takes whose output can be signed."""

    sign: str | Path | None = option(
        None,
        "Sign the output, with the hashes of base and adapters and the verdict in it: a private key, or sigstore for "
        "the identity of this job. `lora-export guide ci` has the whole way.",
        section=Section.FILES,
        metavar="KEY.pem|sigstore",
    )


LORA_MODES = {
    "merged": "fold the adapters into the weights",
    "nodes": "keep A and B as nodes beside the weights",
    "inputs": "make A and B optional inputs, with one file per adapter",
    "rows": "choose the adapter of each batch row by an input",
    "slots": "as rows, with the adapters as inputs, so that they are replaced while the graph runs",
}


ALL_LINEAR = "all-linear"


def layer_endings(target: str | Sequence[str]) -> str | list[str]:
    """ALL_LINEAR, or endings of layer names: those of a list, or of a text that separates them by commas."""
    if target == ALL_LINEAR:
        return ALL_LINEAR
    return [name for name in (target.split(",") if isinstance(target, str) else target) if name]


def modes(*names: str) -> str:
    """The help of `lora`, with what each of these modes does."""
    return "; ".join(f"{name}: {LORA_MODES[name]}" for name in names) + "."
