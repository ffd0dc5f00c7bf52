"""The options of `merge`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

from lora_export.options.combining import TIED_OPTION, AdapterSources, Applied, TiedEmbeddings
from lora_export.options.common import (
    JOBS_AT_ONCE,
    LAYOUT,
    LEAST_RETENTION,
    RAY_ADDRESS,
    SHARE_WITH,
    WEIGHTS_BESIDE,
    Signed,
    written,
)
from lora_export.options.declaring import Only, Section, argument, means, option, table_of

TYPES_OF_GGUF = ("Q8_0", "F16", "BF16", "F32", "keep")
OF_ONE_MODEL = {
    "pipeline": "is not for a pipeline. Give the folder of one of its models as BASE",
    "gguf": "is not for a GGUF file: its weights keep their types, or get those of {dtype_of}",
}


def checkpoints(because: str, *more: str) -> tuple[Only, ...]:
    """For options that a graph as BASE does not have, and a pipeline only where it is in `more`."""
    return (Only("base", ("checkpoint", *more), because, words="checkpoints", instead=OF_ONE_MODEL),)


def without(other: str, default: object, because: str) -> Only:
    """For an option that goes only with the default of another."""
    return Only(other, (default,), because, verb="does not go together with", words=f"{{{other}}}")


def shared_shards() -> tuple[Only, ...]:
    """For options that give the files of a checkpoint to several workers."""
    one_file = {"gguf": "is not for a GGUF file, which one process writes"}
    several = "the files of its weights are shared among workers"
    return (
        Only("base", ("checkpoint",), several, words="checkpoints", instead=OF_ONE_MODEL | one_file),
        without("keep_quantised", False, "it measures every layer before the first file is written"),
        without("calibration", None, "the inputs of all layers are in one process"),
        without("device", "cpu", "workers compute on the processor"),
        without("only_head", False, "workers know adapters by hashes, and a head alone has none"),
    )


def graphs(because: str) -> tuple[Only, ...]:
    """For options that only a graph as BASE has."""
    return (Only("base", ("graph",), because, words="an .onnx BASE", instead=OF_ONE_MODEL),)


@dataclass(frozen=True, kw_only=True)
class MergeOptions(Applied, Signed):
    """What `merge` takes. The fact `base` of its usage is "checkpoint", "graph", "gguf" or "pipeline"."""

    SECTION: ClassVar[Section] = Section.OUTPUT

    base: str | Path = field(kw_only=False, metadata=argument("BASE", kind="path"))
    adapters: AdapterSources = field(
        kw_only=False,
        metadata=argument(metavar="[NAME=]ADAPTER...", kind="source", multiple=True, optional=True),
    )
    output: str | Path = field(
        kw_only=False, metadata=written("Folder or file for the merged weights: the same kind as BASE.")
    )

    checkpoint: str | Path | None = option(
        None,
        "Checkpoint that an .onnx BASE was exported from. Names the weights whose names were lost, by content.",
        section=Section.BASE,
        flags=("--base",),
        metavar="CHECKPOINT",
        only=graphs("the weights of a checkpoint have their names"),
    )
    variant: str | None = option(
        None,
        "Weights to merge into, of a BASE folder with several sets: fp16 for model.fp16.safetensors, none for "
        "model.safetensors.",
        section=Section.BASE,
        metavar="NAME",
        only=(
            Only(
                "base",
                ("checkpoint", "pipeline"),
                words="folders of checkpoints, which may have several sets of weights",
            ),
        ),
    )
    layout: Mapping[str, str] | None = means(
        None,
        replace(
            LAYOUT,
            section=Section.BASE,
            only=checkpoints("a graph's operators determine the layout of its weights", "pipeline"),
        ),
    )
    dequantize: bool = option(
        False,
        "Make a quantised BASE a float model, and merge into that. `lora-export guide quantised` lists the schemes.",
        often=True,
        section=Section.BASE,
        only=checkpoints("{requantize} merges into the quantised weights of a graph"),
    )
    keep_quantised: bool = option(
        False,
        "Merge into a quantised BASE and keep it quantised, on its own scales. Layers that would lose their change are "
        "stored as floats. A .gguf BASE always stays quantised.",
        often=True,
        section=Section.BASE,
        only=(
            *checkpoints("{requantize} merges into the quantised weights of a graph", "gguf"),
            without("dequantize", False, "a weight is kept or made a float"),
            without("dtype", "keep", "the scheme of BASE decides how weights are stored"),
            without("keep_residual", None, "keep the quantised base itself"),
            without("device", "cpu", "quantised weights are changed by the processor"),
        ),
    )
    rescale: bool = option(
        False,
        "With {keep_quantised}: give weights that change new scales, by the rule of their scheme. In a .gguf BASE they "
        "are those of the least squared error.",
        section=Section.BASE,
        only=(Only("keep_quantised", (True,), "other weights have no scales", verb="needs"),),
    )
    requantize: bool = option(
        False,
        "Also merge into quantised weights of an .onnx BASE, and keep them so. Layers that would lose their change get "
        "8 bits or become floats.",
        section=Section.BASE,
        only=graphs("{keep_quantised} merges into a quantised checkpoint"),
    )
    float_base: str | Path | None = option(
        None,
        "Float checkpoint that a quantised BASE was made from. The report then has each weight's quantisation error.",
        section=Section.BASE,
        metavar="CHECKPOINT",
        only=(Only("dequantize", (True,), "it is compared with the weights of a quantised BASE", verb="needs"),),
    )

    dtype: Literal["keep", "float32", "bfloat16", "float16"] = option(
        "keep",
        "Type in which every float tensor is stored.",
        often=True,
        only=checkpoints("the weights of a graph keep the types that its nodes expect", "pipeline"),
    )
    calibration: str | Path | None = option(
        None,
        "Texts, one a line (or .jsonl with `text`), or arrays of the model's inputs (.npz). The model runs on them, "
        "and weights of 16 bits or less are rounded with feedback through the inputs of their layers. Needs PyTorch.",
        often=True,
        metavar="TEXTS|FILE.npz",
        only=(
            *checkpoints("a PyTorch model has to run", "gguf"),
            without("device", "cpu", "feedback is computed by the processor"),
            without("keep_residual", None, "a residual is that of weights rounded to nearest"),
        ),
    )
    rounding: Literal["nearest", "calibrated"] | None = option(
        None,
        "Rounding of what changes. calibrated needs {calibration}, and is the default with it; nearest then only "
        "measures the error of the outputs.",
        only=checkpoints("the weights of a graph are rounded to nearest", "gguf"),
    )
    only_head: bool = option(
        False,
        "Merge only the tensors that the adapters save whole: a task head, for models that share it.",
        only=(Only("base", ("checkpoint", "graph", "gguf"), instead=OF_ONE_MODEL),),
    )
    dtype_of: Mapping[str, str] | None = option(
        None,
        "Type in which a weight that changes is stored, in a .gguf BASE: Q8_0, F16, BF16, F32, or keep for its own. "
        "NAME is a layer of transformers or a tensor of llama.cpp, or a glob. May be repeated: the last match counts.",
        metavar="NAME=TYPE",
        read=table_of(
            f"NAME=TYPE with a type of {', '.join(TYPES_OF_GGUF)}",
            {name: name for name in TYPES_OF_GGUF}.__getitem__,
            at_last=True,
        ),
        only=(Only("base", ("gguf",), "only there has each weight a type of its own", words="a .gguf BASE"),),
    )
    share_with: str | Path | None = means(
        None, replace(SHARE_WITH, only=graphs("a checkpoint has all of its weights in its own files"))
    )
    external_data: bool = means(False, replace(WEIGHTS_BESIDE, only=graphs("a checkpoint has files of weights anyway")))
    min_retention: float = means(0.5, LEAST_RETENTION)
    keep_residual: str | Path | None = option(
        None,
        "Also write FILE: `unmerge` makes BASE again with it, the output and the adapters, bit for bit.",
        often=True,
        metavar="FILE",
        only=(
            *checkpoints("a graph is its own base: keep it"),
            without("dequantize", False, "keep the quantised base itself"),
        ),
    )
    hashing: Literal["xxh3_128", "sha256"] = option(
        "xxh3_128", "Hash that identifies base and output. sha256 takes longer than the merge.", flags=("--hash",)
    )
    device: Literal["cpu", "cuda"] = option(
        "cpu",
        "Device for the arithmetic. cuda needs PyTorch, and was not measured to be faster.",
        only=(Only("base", ("checkpoint", "graph"), instead=OF_ONE_MODEL),),
    )
    tied: TiedEmbeddings = means(
        Applied.tied,
        replace(
            TIED_OPTION, only=checkpoints("in a graph each layer gets a weight of its own where it changes", "gguf")
        ),
    )
    jobs: int = means(
        1,
        replace(
            JOBS_AT_ONCE,
            help="Processes on this machine that write the files of a sharded BASE at the same time.",
            only=shared_shards(),
        ),
    )
    ray: str | None = means(
        None,
        replace(
            RAY_ADDRESS,
            help="Write the files of a sharded BASE on Ray: the address of a cluster, auto for the one that this "
            "machine belongs to, or local.",
            only=shared_shards(),
        ),
    )
    dry_run: bool = option(False, "Print which weights would change, and write nothing.", often=True)
