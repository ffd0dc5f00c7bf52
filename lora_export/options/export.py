"""The options of `onnx`, `torchscript` and `generate`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias, get_args

from lora_export.callbacks import OnMessage, ignore
from lora_export.options.combining import GivenAdapters
from lora_export.options.common import PROVIDER, ModelSource, ProviderName, Published, Running, modes
from lora_export.options.declaring import Only, Option, Options, Positional, Section

if TYPE_CHECKING:
    from numpy.typing import NDArray

CachedTask = Literal["text-generation", "text2text-generation", "automatic-speech-recognition", "image-to-text"]
# What models with a key/value cache do: a decoder alone goes on with a text, the others decode what an encoder read.
CACHED_TASKS: tuple[str, ...] = get_args(CachedTask)
TEXT_GENERATION, TEXT_TO_TEXT, SPEECH_TO_TEXT, IMAGE_TO_TEXT = CACHED_TASKS
SWAPPED = ("inputs", "rows")  # modes whose graph is the base until a call chooses an adapter

OF_ADAPTERS = "other graphs contain the adapters that are given, and no others"
EXPORTED = Only("model", ("module",), "MODEL is a graph already", words="models that are exported")
EXISTING_GRAPH = Only("model", ("graph",), words="an .onnx MODEL")


@dataclass(frozen=True, kw_only=True)
class OnnxOptions(GivenAdapters, Running, Published):
    """What `onnx` takes. The fact `model` of its usage is "module" or "graph"."""

    SECTION: ClassVar[Section] = Section.GRAPH

    model: Annotated[ModelSource, Positional("MODEL", kind="source", multiple=False)] = field(kw_only=False)
    output: Annotated[
        str | Path,
        Option(
            "File to publish after its proof.",
            flags=("-o", "--output"),
            metavar="OUT.onnx",
            kind="path",
            section=Section.OPTIONS,
        ),
    ] = field(kw_only=False)

    checkpoint: Annotated[
        str | Path | None,
        Option(
            "Checkpoint that an .onnx MODEL was exported from. Names the weights whose names were lost, by content.",
            flags=("--base",),
            metavar="CHECKPOINT",
            only=(EXISTING_GRAPH,),
            section=Section.OPTIONS,
        ),
    ] = None
    reference: Annotated[
        "ModelSource | None",
        Option(
            "PyTorch model that an .onnx MODEL was exported from: the proof compares with it, not with the graph.",
            flags=("--model",),
            metavar="MODEL",
            kind="source",
            multiple=False,
            only=(EXISTING_GRAPH,),
            section=Section.OPTIONS,
        ),
    ] = None

    lora: Annotated[
        Literal["merged", "nodes", "inputs", "rows"], Option(modes("merged", "nodes", "inputs", "rows"))
    ] = "merged"
    target: Annotated[
        str | Sequence[str] | None,
        Option(
            "With {lora=inputs}: also add adapter inputs at these layers, for future adapters. Endings of layer names, "
            "separated by commas, or all linear layers except the output head.",
            metavar="NAMES|all-linear",
            multiple=False,
            only=(Only("lora", ("inputs",), OF_ADAPTERS),),
        ),
    ] = None
    dora: Annotated[
        bool,
        Option(
            "With {lora=inputs}: let future adapters have DoRA at all these layers.",
            only=(Only("lora", ("inputs",), OF_ADAPTERS),),
        ),
    ] = False
    names: Annotated[
        Literal["olive", "genai", "peft"], Option("With {lora=inputs}: naming convention of the inputs.")
    ] = "olive"
    max_rank: Annotated[
        int | None,
        Option(
            "With {lora=inputs} and rows: pad the rank of every adapter to N with zeros, so that adapters have static "
            "shapes. A larger rank is refused.",
            metavar="N",
            at_least=1,
            only=(Only("lora", SWAPPED, "in other graphs an adapter has its own rank"),),
        ),
    ] = None
    required_inputs: Annotated[
        bool,
        Option(
            "With {lora=inputs}: give adapter inputs no default, for runtimes that pass no optional inputs "
            "(JavaScript).",
            only=(Only("lora", ("inputs",)),),
        ),
    ] = False
    per_row: Annotated[
        int,
        Option(
            "With {lora=rows}: give each row K adapters, added up. adapter_ids and the input adapter_scales are "
            "[batch, K].",
            flags=("--adapters-per-row",),
            metavar="K",
            at_least=1,
            only=(Only("lora", ("rows",)),),
        ),
    ] = 1
    ignore_head: Annotated[
        bool,
        Option(
            "With {lora=inputs} and rows: leave out the task head that the adapters save whole. MODEL has to contain "
            "the same head (merge {only_head}).",
            only=(Only("lora", SWAPPED, "other graphs contain the head of the adapter"),),
        ),
    ] = False
    task: Annotated[
        CachedTask | None,
        Option(
            "Make graphs with a key/value cache that generate texts, and a folder that `lora-export generate`, optimum "
            "and, of a decoder, onnxruntime-genai run.",
            only=(EXPORTED,),
        ),
    ] = None
    with_cache: Annotated[bool, Option("Choose {task} by the model's class.", only=(EXPORTED,))] = False
    fuse: Annotated[
        Literal["cpu", "cuda", "webgpu"] | None,
        Option("Use onnxruntime's own operators for this provider, such as GroupQueryAttention.", only=(EXPORTED,)),
    ] = None
    quantize: Annotated[
        Literal["int4", "int8"] | None,
        Option(
            "Store the weights of linear layers in 4 or 8 bits (onnxruntime's MatMulNBits). Adapters beside them stay "
            "floats; a merged graph is quantised after the merge.",
            only=(
                Only(
                    *("model", ("module",)),
                    "MODEL is a graph already. A graph that other tools quantised is a MODEL, too",
                    words="models that are exported",
                ),
            ),
        ),
    ] = None
    opset: Annotated[
        int | None, Option("ONNX operator set (default: the exporter's).", at_least=18, only=(EXPORTED,))
    ] = None


@dataclass(frozen=True, kw_only=True)
class TorchScriptOptions(GivenAdapters, Published):
    """What `torchscript` takes."""

    model: Annotated[ModelSource, Positional("MODEL", kind="source", multiple=False)] = field(kw_only=False)
    output: Annotated[
        str | Path,
        Option(
            "File to publish after its proof: TorchScript, or with .pt2 a program of torch.export with dynamic sizes.",
            flags=("-o", "--output"),
            metavar="OUT.pt|OUT.pt2",
            kind="path",
        ),
    ] = field(kw_only=False)
    lora: Annotated[Literal["merged", "nodes"], Option(modes("merged", "nodes"))] = "merged"
    format: Annotated[
        Literal["torchscript", "pt2"] | None,
        Option("What to write, whatever the suffix of the output is.", python_only=True),
    ] = None


OnText: TypeAlias = Callable[[int, str], None]  # receives the number of a prompt, and the text of its next tokens
Prompt: TypeAlias = "str | Sequence[int] | Path | NDArray[Any]"
Prompts: TypeAlias = "Sequence[Prompt]"
Starts: TypeAlias = str | Sequence[str | Sequence[int]]  # a text or token ids: one for all, or one for each


def no_text(_: int, __: str) -> None:
    """Ignore a text."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(Options):
    """What `generate` takes."""

    source: Annotated[str | Path, Positional(metavar="FOLDER", kind="path")] = field(kw_only=False)
    prompts: Annotated[
        Prompts,
        Option(
            "Texts, lists of token ids, or what an encoder reads: paths or arrays. All run as one batch.",
            python_only=True,
            kind="text",
            multiple=True,
        ),
    ] = field(kw_only=False)
    adapters: Annotated[
        str | Sequence[str | None] | None,
        Option(
            "The adapter for all prompts, or one for each in a graph of {lora=rows}. None is the base.",
            python_only=True,
            kind="text",
            multiple=True,
        ),
    ] = None
    starts: Annotated[
        Starts,
        Option(
            "The first tokens of the texts that are made of images: one for all or one for each.",
            python_only=True,
            kind="text",
            multiple=True,
        ),
    ] = ()
    language: Annotated[str | None, Option("Language of the sounds. Default: as the model hears it.", metavar="en")] = (
        None
    )
    translate: Annotated[bool, Option("Let a speech model write English.")] = False
    max_new_tokens: Annotated[int, Option("Most new tokens.", at_least=1)] = 128
    temperature: Annotated[float, Option("0 takes the most probable token. More draws a token.", at_least=0)] = 0.0
    top_p: Annotated[
        float, Option("Draw among the most probable tokens whose probabilities add up to this.", above=0, at_most=1)
    ] = 1.0
    seed: Annotated[int, Option("Seed of the draws.", at_least=0)] = 0
    chat: Annotated[bool, Option("Put each prompt into the tokenizer's chat template, as a user's message.")] = False
    provider: Annotated[ProviderName, PROVIDER] = "cpu"
    on_text: OnText = field(default=no_text, repr=False, compare=False)
    on_message: OnMessage = field(default=ignore, repr=False, compare=False)
