"""The options of the commands on adapters and on existing files: convert, combine, extract, resize, inspect, check."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lora_export.callbacks import OnMessage, ignore
from lora_export.errors import WrongUsage
from lora_export.options.combining import AdapterSource, AdapterSources, Combination, Weighted
from lora_export.options.common import LAYOUT, Download, Output, written
from lora_export.options.declaring import Only, Option, Options, argument, declares, means, nested, option, table_of
from lora_export.options.reading import ReadOptions
from lora_export.options.spelling import named
from lora_export.options.verify import Expectations

TO_GRAPH = Only("to", ("onnx_adapter",))
AS_LORA = Only("as_kind", ("lora",))
WrittenFormat = Literal["onnx_adapter", "peft", "mlx", "gguf", "kohya", "comfyui", "diffusers", "openvino"]
NamesOf = Literal["transformers4", "transformers5", "vllm", "sglang"]


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Output):
    """What `convert` takes."""

    adapter: AdapterSource = field(
        kw_only=False, metadata=argument(metavar="[NAME=]ADAPTER", kind="source", multiple=False)
    )
    output: str | Path = field(kw_only=False, metadata=written("File or folder to write.", "OUT"))
    to: WrittenFormat = option("onnx_adapter", "Format to write.", often=True)
    graph: str | Path | None = option(
        None,
        "With {to=onnx_adapter}: graph that will run the adapter, made by `onnx {lora=inputs}` or slots; of an "
        "encoder-decoder, the folder; or a .pte by `torchscript {lora=inputs}`, for which a .safetensors is written.",
        flags=("--for",),
        metavar="MODEL.onnx|.pte",
        often=True,
    )
    base: str | Path | None = option(
        None,
        "Model that the adapter was trained on: for {names}, {to=gguf}, kinds and formats that need its config or its "
        "weights.",
        metavar="CHECKPOINT",
        often=True,
    )
    names: NamesOf | None = option(
        None,
        "With {to=peft}: whose names the modules get. transformers4 and vllm: those of the original checkpoint; "
        "sglang: the same, with all experts of a projection in one tensor; transformers5: those of the loaded "
        "model.",
    )
    as_kind: Literal["lora"] | None = option(
        None,
        "Make pairs of LoRA of every change first, by {rank}: exact ones where the rank is enough, else the best ones.",
        flags=("--as",),
        often=True,
    )
    rank: int | None = option(None, "Largest rank of a pair.", metavar="R", at_least=1, only=(AS_LORA,), often=True)
    min_kept: float = option(
        1.0,
        "Least share of each change's ‖ΔW‖² that its pair has to keep, 0 to 1. Nothing may be lost by default.",
        metavar="SHARE",
        at_least=0,
        at_most=1,
        only=(AS_LORA,),
    )
    weight: float = option(1.0, "Factor on the adapter's scale.", often=True)
    layout: Mapping[str, str] | None = means(None, LAYOUT)
    ignore_head: bool = option(
        False,
        "Leave out the task head that the adapter saves whole. MODEL.onnx has to contain the same head.",
        only=(TO_GRAPH,),
    )
    reading: ReadOptions = nested(ReadOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.to == "onnx_adapter" and self.graph is None:
            raise WrongUsage(f"{named('to', 'onnx_adapter')} needs {named('graph', 'MODEL.onnx')}, or a .pte")
        if self.to != "onnx_adapter" and self.graph is not None:
            raise WrongUsage(
                f"{named('graph', self.graph)} determines the format of the file, so {named('to', self.to)} cannot be "
                "chosen beside it"
            )
        self.check_usage()
        if self.layout and self.base is None:
            raise WrongUsage(f"{named('layout')} is for matrices of {named('base', 'CHECKPOINT')}")
        if self.as_kind is not None and self.rank is None:
            raise WrongUsage(f"{named('as_kind', self.as_kind)} needs {named('rank', 'R')}")
        if self.names is not None and (self.to != "peft" or self.base is None):
            raise WrongUsage(
                f"{named('names')} is for {named('to', 'peft')}, and needs {named('base', 'CHECKPOINT')}, which has "
                "the names"
            )


@dataclass(frozen=True, kw_only=True)
class CombineOptions(Weighted, Output):
    """What `combine` takes."""

    adapters: AdapterSources = field(
        kw_only=False, metadata=argument(metavar="[NAME=]ADAPTER...", kind="source", multiple=True)
    )
    output: str | Path = field(kw_only=False, metadata=written("Folder for the combined adapter."))
    combination: str | Combination = nested(Combination, {"method": ("--method", "--combine")})


@dataclass(frozen=True, kw_only=True)
class Truncated(Options):
    """The rank of pairs that an SVD makes."""

    rank: int | None = option(None, "Rank of each pair. With {energy}: at most this rank.", metavar="R", at_least=1)
    energy: float | None = option(
        None,
        "Share of each change's ‖ΔW‖² that is kept, above 0 and at most 1: the least rank that holds it.",
        metavar="E",
        above=0,
        at_most=1,
    )


@dataclass(frozen=True, kw_only=True)
class ExtractOptions(Truncated, Output):
    """What `extract` takes."""

    base: str | Path = field(kw_only=False, metadata=argument("BASE", kind="path"))
    tuned: str | Path = field(kw_only=False, metadata=argument("TUNED", kind="path"))
    output: str | Path = field(kw_only=False, metadata=written("Folder for the adapter."))
    exclude: Sequence[str] = option(
        (), "Tensor, module or glob whose difference is left out. May be repeated.", metavar="NAME"
    )
    layout: Mapping[str, str] | None = means(None, LAYOUT)


@dataclass(frozen=True, kw_only=True)
class ResizeOptions(Truncated, Output):
    """What `resize` takes."""

    adapter: AdapterSource = field(kw_only=False, metadata=argument(metavar="ADAPTER", kind="source", multiple=False))
    output: str | Path = field(kw_only=False, metadata=written("Folder for the smaller adapter."))
    reading: ReadOptions = nested(ReadOptions)


@dataclass(frozen=True, kw_only=True)
class InspectOptions(Download):
    """What `inspect` takes. `on_message` is no option of the command line."""

    path: str | Path = field(kw_only=False, metadata=argument("PATH", kind="path"))
    checkpoint: str | Path | None = option(
        None,
        "Checkpoint that an .onnx was exported from. Names its weights by content, and checks other names.",
        flags=("--base",),
    )
    check: bool = option(False, "Read every file of a merged folder, and compare it with the manifest.")
    expected: Expectations = nested(Expectations)
    reading: ReadOptions = nested(ReadOptions)
    on_message: OnMessage = field(default=ignore, repr=False, compare=False)


RUNTIMES = tuple(sorted(path.stem for path in (Path(__file__).parents[1] / "preflight" / "runtimes").glob("*.toml")))


@dataclass(frozen=True, kw_only=True)
class CheckOptions(Download):
    """What `check` takes."""

    adapter: AdapterSource = field(
        kw_only=False, metadata=argument(metavar="[NAME=]ADAPTER", kind="source", multiple=False)
    )
    runtimes: Sequence[str] = option(
        (), "Runtime that is to run the adapter. May be repeated.", flags=("--for",), choices=RUNTIMES
    )
    base: str | Path | None = option(
        None,
        "Model that the adapter was trained on. Without it, only what the adapter itself shows is checked.",
        metavar="CHECKPOINT",
    )
    settings: Mapping[str, float] = field(
        default_factory=dict,
        metadata=declares(
            Option(
                "What the runtime is started with, where a rule depends on it: max-lora-rank=64.",
                flags=("--with",),
                metavar="NAME=NUMBER",
                read=table_of("NAME=NUMBER", float),
            )
        ),
    )
    reading: ReadOptions = nested(ReadOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runtimes:
            raise WrongUsage(f"{named('runtimes')} has to name a runtime: {', '.join(RUNTIMES)}")
        if wrong := [name for name, value in self.settings.items() if not math.isfinite(value)]:
            raise WrongUsage(f"{named('settings')}: {', '.join(wrong)} has to be a number, no infinity and no NaN")
