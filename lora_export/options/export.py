"""The options of `onnx`, `torchscript` and `generate`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, get_args

from lora_export.callbacks import OnMessage, ignore
from lora_export.options.combining import GivenAdapters
from lora_export.options.common import (
    LEAST_RETENTION,
    SHARE_WITH,
    WEIGHTS_BESIDE,
    ModelSource,
    axis_size,
    modes,
    written,
)
from lora_export.options.declaring import Only, Option, Options, Section, argument, declares, means, option, table_of
from lora_export.options.proof import PROVIDER, ProviderName, Published, Running

if TYPE_CHECKING:
    from numpy.typing import NDArray

CachedTask = Literal[
    "text-generation", "text2text-generation", "automatic-speech-recognition", "image-to-text", "image-text-to-text"
]
# What models with a key/value cache do: a decoder alone goes on with a text, the others decode what an encoder read.
CACHED_TASKS: tuple[str, ...] = get_args(CachedTask)
TEXT_GENERATION, TEXT_TO_TEXT, SPEECH_TO_TEXT, IMAGE_TO_TEXT, IMAGE_TEXT_TO_TEXT = CACHED_TASKS
SWAPPED = ("inputs", "rows", "slots")  # modes whose graph is the base until a call chooses an adapter

OF_ADAPTERS = "other graphs contain the adapters that are given, and no others"
EXPORTED = Only("model", ("module",), "MODEL is a graph already", words="models that are exported")
EXISTING_GRAPH = Only("model", ("graph",), words="an .onnx MODEL")


@dataclass(frozen=True, kw_only=True)
class OnnxOptions(GivenAdapters, Running, Published):
    """What `onnx` takes. The fact `model` of its usage is "module" or "graph"."""

    SECTION: ClassVar[Section] = Section.GRAPH

    model: ModelSource = field(kw_only=False, metadata=argument("MODEL", kind="source", multiple=False))
    output: str | Path = field(kw_only=False, metadata=written("File to publish after its proof.", "OUT.onnx"))

    checkpoint: str | Path | None = option(
        None,
        "Checkpoint that an .onnx MODEL was exported from. Names the weights whose names were lost, by content.",
        flags=("--base",),
        metavar="CHECKPOINT",
        only=(EXISTING_GRAPH,),
        section=Section.OPTIONS,
    )
    reference: "ModelSource | None" = option(
        None,
        "PyTorch model that an .onnx MODEL was exported from: the proof compares with it, not with the graph.",
        often=True,
        flags=("--model",),
        metavar="MODEL",
        kind="source",
        multiple=False,
        only=(EXISTING_GRAPH,),
        section=Section.OPTIONS,
    )

    lora: Literal["merged", "nodes", "inputs", "rows", "slots"] = option(
        "merged", modes("merged", "nodes", "inputs", "rows", "slots"), often=True
    )
    requantize: bool = option(
        False,
        "With {lora=merged}: also merge into quantised weights of an .onnx MODEL, as `merge {requantize}` does.",
        only=(EXISTING_GRAPH, Only("lora", ("merged",), "beside weights that stay as they are, adapters stay floats")),
    )
    min_retention: float = means(
        0.5, replace(LEAST_RETENTION, only=(EXISTING_GRAPH, Only("lora", ("merged",), "nothing else is rounded")))
    )
    target: str | Sequence[str] | None = option(
        None,
        "With {lora=inputs} and slots: also add adapter inputs at these layers, for future adapters. Endings of layer "
        "names, separated by commas, or all linear layers except the output head.",
        metavar="NAMES|all-linear",
        multiple=False,
        often=True,
        only=(Only("lora", ("inputs", "slots"), OF_ADAPTERS),),
    )
    dora: bool = option(
        False,
        "With {lora=inputs} and slots: let future adapters have DoRA at all these layers.",
        only=(Only("lora", ("inputs", "slots"), OF_ADAPTERS),),
    )
    names: Literal["olive", "genai", "peft"] = option(
        "olive",
        "With {lora=inputs} and slots: naming convention of the inputs.",
        only=(Only("lora", ("inputs", "slots"), "other graphs have no inputs for adapters' values"),),
    )
    max_rank: int | None = option(
        None,
        "With {lora=inputs}, rows and slots: pad the rank of every adapter to N with zeros, so that adapters have "
        "static shapes. A larger rank is refused. Default of slots: 16.",
        metavar="N",
        at_least=1,
        only=(Only("lora", SWAPPED, "in other graphs an adapter has its own rank"),),
    )
    slots: int = option(
        64,
        "With {lora=slots}: how many adapters the graph takes at a time.",
        metavar="N",
        at_least=1,
        only=(Only("lora", ("slots",)),),
    )
    required_inputs: bool = option(
        False,
        "With {lora=inputs}: give adapter inputs no default, for runtimes that pass no optional inputs (JavaScript).",
        only=(Only("lora", ("inputs",)),),
    )
    per_row: int = option(
        1,
        "With {lora=rows} and slots: give each row K adapters, added up. adapter_ids and the input adapter_scales are "
        "[batch, K].",
        flags=("--adapters-per-row",),
        metavar="K",
        at_least=1,
        only=(Only("lora", ("rows", "slots")),),
    )
    strength_input: bool = option(
        False,
        "With {lora=nodes} and inputs: add the input adapter_strengths, a factor of each adapter's change that every "
        "run may choose. Default: 1.",
        only=(Only("lora", ("nodes", "inputs"), "rows and slots have {per_row}, and in a merge nothing is left"),),
    )
    ignore_head: bool = option(
        False,
        "With {lora=inputs}, rows and slots: leave out the task head that the adapters save whole. MODEL has to "
        "contain the same head (merge {only_head}).",
        only=(Only("lora", SWAPPED, "other graphs contain the head of the adapter"),),
    )
    share_with: str | Path | None = means(None, SHARE_WITH)
    external_data: bool = means(False, WEIGHTS_BESIDE)
    task: CachedTask | None = option(
        None,
        "Make graphs with a key/value cache that generate texts, and a folder that `lora-export generate`, optimum "
        "and, of a decoder, onnxruntime-genai run.",
        only=(EXPORTED,),
    )
    with_cache: bool = option(
        False,
        "Make graphs with a key/value cache, which generate: {task} by the model's class.",
        only=(EXPORTED,),
        often=True,
    )
    fuse: Literal["cpu", "cuda", "webgpu"] | None = option(
        None, "Use onnxruntime's own operators for this provider, such as GroupQueryAttention.", only=(EXPORTED,)
    )
    quantize: Literal["int4", "int8"] | None = option(
        None,
        "Store the weights of linear layers in 4 or 8 bits (onnxruntime's MatMulNBits). Adapters beside them stay "
        "floats; a merged graph is quantised after the merge.",
        only=(
            Only(
                "model",
                ("module",),
                "MODEL is a graph already. A graph that other tools quantised is a MODEL, too",
                words="models that are exported",
            ),
        ),
        often=True,
    )
    opset: int | None = option(None, "ONNX operator set (default: the exporter's).", at_least=18, only=(EXPORTED,))
    # A folder where graphs of exported bases are kept for further adapters; no option of the command line
    graphs: Path | None = field(default=None, repr=False, compare=False)
    session: object = field(default=None, repr=False, compare=False)  # a ProofSession; no option of the command line


@dataclass(frozen=True, kw_only=True)
class TorchScriptOptions(GivenAdapters, Published):
    """What `torchscript` takes."""

    model: ModelSource = field(kw_only=False, metadata=argument("MODEL", kind="source", multiple=False))
    output: str | Path = field(
        kw_only=False,
        metadata=written(
            "File to publish after its proof: TorchScript, with .pt2 a program of torch.export with dynamic sizes, or "
            "with .pte one of ExecuTorch, lowered for XNNPACK.",
            "OUT.pt|OUT.pt2|OUT.pte",
        ),
    )
    lora: Literal["merged", "nodes", "inputs"] = option(
        "merged",
        f"{modes('merged', 'nodes')} inputs: of a .pte, take A and B as further inputs, with one file per adapter.",
        often=True,
    )
    max_rank: int | None = option(
        None,
        "With {lora=inputs}: rank of the inputs, for future adapters. Smaller ones are padded with zeros. Default: the "
        "largest of the adapters.",
        metavar="N",
        at_least=1,
        only=(Only("lora", ("inputs",), "in other programs an adapter has its own rank"),),
    )
    max_size: Mapping[str, int] | None = option(
        None,
        "Greatest size of an axis, such as `sequence`, for which a .pte reserves memory (3 in place of 2). Default: 4 "
        "of `batch`, 128 of others. May be repeated.",
        metavar="AXIS=SIZE",
        read=table_of("AXIS=SIZE, such as sequence=512", axis_size),
        only=(Only("format", ("pte",), "other files take any size", words="an output that ends in .pte"),),
    )
    format: Literal["torchscript", "pt2", "pte"] | None = option(
        None, "What to write, whatever the suffix of the output is.", python_only=True
    )


OnText: TypeAlias = Callable[[int, str], None]  # receives the number of a prompt, and the text of its next tokens
Prompt: TypeAlias = "str | Sequence[int] | Path | NDArray[Any]"
Prompts: TypeAlias = "Sequence[Prompt]"
Starts: TypeAlias = str | Sequence[str | Sequence[int]]  # a text or token ids: one for all, or one for each


def no_text(_: int, __: str) -> None:
    """Ignore a text."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(Options):
    """What `generate` takes."""

    source: str | Path = field(kw_only=False, metadata=argument(metavar="FOLDER", kind="path"))
    prompts: Prompts = field(
        kw_only=False,
        metadata=declares(
            Option(
                "Texts, lists of token ids, or what an encoder reads: paths or arrays. All run as one batch.",
                python_only=True,
                kind="text",
                multiple=True,
            )
        ),
    )
    images: Sequence[Path] = option(
        (),
        "The images that the model reads: among the tokens of the prompts, or to write a text of each.",
        python_only=True,
        kind="path",
        multiple=True,
    )
    adapters: str | Sequence[str | None] | None = option(
        None,
        "The adapter for all prompts, or one for each in a graph of {lora=rows}. None is the base.",
        python_only=True,
        kind="text",
        multiple=True,
    )
    starts: Starts = option(
        (),
        "The first tokens of the texts that are made of images: one for all or one for each.",
        python_only=True,
        kind="text",
        multiple=True,
    )
    language: str | None = option(
        None, "Language of the sounds. Default: that of its configs, or as the model hears it.", metavar="en"
    )
    translate: bool = option(False, "Let a speech model write English.")
    max_new_tokens: int = option(128, "Most new tokens.", at_least=1)
    temperature: float = option(0.0, "0 takes the most probable token. More draws a token.", at_least=0)
    top_p: float = option(
        1.0, "Draw among the most probable tokens whose probabilities add up to this.", above=0, at_most=1
    )
    seed: int = option(0, "Seed of the draws.", at_least=0)
    chat: bool = option(False, "Put each prompt into the tokenizer's chat template, as a user's message.")
    provider: ProviderName = means("cpu", PROVIDER)
    on_text: OnText = field(default=no_text, repr=False, compare=False)
    on_message: OnMessage = field(default=ignore, repr=False, compare=False)
