"""The options of the commands on adapters and on existing files: convert, combine, extract, resize, inspect."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from lora_export.errors import WrongUsage
from lora_export.options.combining import AdapterSource, AdapterSources, Combination, Weighted
from lora_export.options.common import LAYOUT, Download, Output
from lora_export.options.declaring import Nested, Only, Option, Options, Positional
from lora_export.options.reading import ReadOptions
from lora_export.options.spelling import named
from lora_export.options.verify import Expectations

TO_GRAPH = Only("to", ("onnx_adapter",))
WrittenFormat = Literal["onnx_adapter", "peft", "mlx", "gguf", "kohya", "comfyui", "diffusers"]
NamesOf = Literal["transformers4", "transformers5", "vllm", "sglang"]


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Output):
    """What `convert` takes."""

    adapter: Annotated[AdapterSource, Positional(metavar="[NAME=]ADAPTER", kind="source", multiple=False)] = field(
        kw_only=False
    )
    output: Annotated[
        str | Path, Option("File or folder to write.", flags=("-o", "--output"), metavar="OUT", kind="path")
    ] = field(kw_only=False)
    to: Annotated[WrittenFormat, Option("Format to write.")] = "onnx_adapter"
    graph: Annotated[
        str | Path | None,
        Option(
            "With {to=onnx_adapter}: graph that will run the adapter, made by `onnx {lora=inputs}`.",
            flags=("--for",),
            metavar="MODEL.onnx",
        ),
    ] = None
    base: Annotated[
        str | Path | None,
        Option(
            "Model that the adapter was trained on: for {names}, {to=gguf}, and formats that need its config.",
            metavar="CHECKPOINT",
        ),
    ] = None
    names: Annotated[
        NamesOf | None,
        Option(
            "With {to=peft}: whose names the modules get. transformers4 and vllm: those of the original checkpoint; "
            "sglang: the same, with all experts of a projection in one tensor; transformers5: those of the loaded "
            "model."
        ),
    ] = None
    weight: Annotated[float, Option("Factor on the adapter's scale.")] = 1.0
    ignore_head: Annotated[
        bool,
        Option(
            "Leave out the task head that the adapter saves whole. MODEL.onnx has to contain the same head.",
            only=(TO_GRAPH,),
        ),
    ] = False
    reading: Annotated[ReadOptions, Nested(ReadOptions)] = field(default_factory=ReadOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.to == "onnx_adapter") is not (self.graph is not None):
            raise WrongUsage(
                f"{named('to', 'onnx_adapter')} needs {named('graph', 'MODEL.onnx')}, and no other format has it"
            )
        self.check_usage()
        if self.names is not None and (self.to != "peft" or self.base is None):
            raise WrongUsage(
                f"{named('names')} is for {named('to', 'peft')}, and needs {named('base', 'CHECKPOINT')}, which has "
                "the names"
            )


@dataclass(frozen=True, kw_only=True)
class CombineOptions(Weighted, Output):
    """What `combine` takes."""

    adapters: Annotated[AdapterSources, Positional(metavar="[NAME=]ADAPTER...", kind="source", multiple=True)] = field(
        kw_only=False
    )
    output: Annotated[str | Path, Option("Folder for the combined adapter.", flags=("-o", "--output"), kind="path")] = (
        field(kw_only=False)
    )
    combination: Annotated[str | Combination, Nested(Combination, {"method": ("--method", "--combine")})] = field(
        default_factory=Combination
    )


@dataclass(frozen=True, kw_only=True)
class Truncated(Options):
    """The rank of pairs that an SVD makes."""

    rank: Annotated[
        int | None, Option("Rank of each pair. With {energy}: at most this rank.", metavar="R", at_least=1)
    ] = None
    energy: Annotated[
        float | None,
        Option(
            "Share of each change's ‖ΔW‖² that is kept, above 0 and at most 1: the least rank that holds it.",
            metavar="E",
            above=0,
            at_most=1,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ExtractOptions(Truncated, Output):
    """What `extract` takes."""

    base: Annotated[str | Path, Positional("BASE", kind="path")] = field(kw_only=False)
    tuned: Annotated[str | Path, Positional("TUNED", kind="path")] = field(kw_only=False)
    output: Annotated[str | Path, Option("Folder for the adapter.", flags=("-o", "--output"), kind="path")] = field(
        kw_only=False
    )
    exclude: Annotated[
        Sequence[str], Option("Tensor, module or glob whose difference is left out. May be repeated.", metavar="NAME")
    ] = ()
    layout: Annotated[Mapping[str, str] | None, LAYOUT] = None


@dataclass(frozen=True, kw_only=True)
class ResizeOptions(Truncated, Output):
    """What `resize` takes."""

    adapter: Annotated[AdapterSource, Positional(metavar="ADAPTER", kind="source", multiple=False)] = field(
        kw_only=False
    )
    output: Annotated[str | Path, Option("Folder for the smaller adapter.", flags=("-o", "--output"), kind="path")] = (
        field(kw_only=False)
    )
    reading: Annotated[ReadOptions, Nested(ReadOptions)] = field(default_factory=ReadOptions)


@dataclass(frozen=True, kw_only=True)
class InspectOptions(Download):
    """What `inspect` takes."""

    path: Annotated[str | Path, Positional("PATH", kind="path")] = field(kw_only=False)
    checkpoint: Annotated[
        str | Path | None,
        Option(
            "Checkpoint that an .onnx was exported from. Names its weights by content, and checks other names.",
            flags=("--base",),
        ),
    ] = None
    check: Annotated[bool, Option("Read every file of a merged folder, and compare it with the manifest.")] = False
    expected: Annotated[Expectations, Nested(Expectations)] = field(default_factory=Expectations)
    reading: Annotated[ReadOptions, Nested(ReadOptions)] = field(default_factory=ReadOptions)
