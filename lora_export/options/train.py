"""The options of `train`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from lora_export.errors import WrongUsage
from lora_export.options.common import Output
from lora_export.options.declaring import Option, Options, Positional, Section, options_of
from lora_export.options.spelling import named

LearntTask = Literal[
    "chat",
    "completion",
    "tags",
    "similarity",
    "image-classification",
    "automatic-speech-recognition",
    "classification",
    "language-modelling",
]
Precision = Literal["no", "bf16", "fp16"]
Init = Literal["default", "pissa", "olora"]
TrainedBiases = Literal["none", "all", "lora_only"]
BaseQuantization = Literal["nf4"]
BaseDtype = Literal["float32", "bfloat16", "float16"]
ComparedStrategy = Literal["full", "frozen"]
OF_CONTINUED = ("continue_from", "dropout", "heads")  # what a trained adapter that is continued may have beside it
WITHOUT_INIT = ("dora", "target_parameters")  # what excludes a start from the weights


def read_columns(texts: Iterable[str]) -> dict[str, str]:
    """NAME=COLUMN... as a table. Raises ValueError for another text."""
    columns: dict[str, str] = {}
    for text in texts:
        name, equals, column = text.partition("=")
        if not equals or not name or not column:
            raise ValueError(f"{text} is not NAME=COLUMN, such as text=body")
        columns[name] = column
    return columns


def read_ranks(texts: Iterable[str]) -> dict[str, int]:
    """REGEX=RANK... as a table. Raises ValueError for another text."""
    return _read_patterns(texts, int, "REGEX=RANK")


def read_alphas(texts: Iterable[str]) -> dict[str, float]:
    """REGEX=ALPHA... as a table. Raises ValueError for another text."""
    return _read_patterns(texts, float, "REGEX=ALPHA")


def _read_patterns(texts: Iterable[str], number: Any, form: str) -> dict[str, Any]:
    """The last equals sign counts."""
    patterns = {}
    for text in texts:
        pattern, _, value = text.rpartition("=")
        try:
            patterns[pattern] = number(value)
        except ValueError:
            raise ValueError(f"{text} is not {form}, such as q_proj=4") from None
        if not pattern:
            raise ValueError(f"{text} has no pattern before the equals sign")
    return patterns


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Options):
    """The settings of the loop and of its optimiser, AdamW."""

    SECTION: ClassVar[Section] = Section.STEPS

    epochs: Annotated[int, Option("Passes over the data.", at_least=1)] = 3
    batch_size: Annotated[int, Option("Examples per step, of all processes together.", at_least=1)] = 32
    accumulate: Annotated[
        int, Option("Parts of a step's examples that are computed one after the other.", at_least=1)
    ] = 1
    learning_rate: Annotated[float, Option("Peak step size of AdamW.", above=0)] = 1e-3
    b_ratio: Annotated[
        float,
        # Hayou et al. 2024
        Option("Learning rate of B divided by that of A (LoRA+).", above=0),
    ] = 1.0
    schedule: Annotated[Literal["linear", "cosine", "constant"], Option("Learning rate after the warm-up.")] = "linear"
    warmup: Annotated[float, Option("Part of all steps in which the learning rate rises.", at_least=0, below=1)] = 0.1
    weight_decay: Annotated[float, Option("Weight decay of AdamW.", at_least=0)] = 0.01
    max_gradient_norm: Annotated[float, Option("Norm to which gradients are clipped.", above=0)] = 1.0
    precision: Annotated[Precision, Option("Precision of autocast.")] = "no"
    gradient_checkpointing: Annotated[
        bool, Option("Compute activations again in the backward pass: less memory, more time.")
    ] = False
    compile: Annotated[bool, Option("Compute the steps with torch.compile. The first step takes long.")] = False
    seed: Annotated[int, Option("Random seed for the split, the initial values and the order.")] = 0
    evaluate_every: Annotated[
        int,
        Option(
            "Measure on the held-out data every so many steps.",
            section=Section.MEASUREMENTS,
            metavar="STEPS",
            at_least=0,
        ),
    ] = 0
    patience: Annotated[
        int,
        Option(
            "Stop after N evaluations without a lower held-out loss, and keep the best adapter.",
            section=Section.MEASUREMENTS,
            metavar="N",
            at_least=0,
        ),
    ] = 0
    keep_best: Annotated[
        bool, Option("Save the adapter of the lowest held-out loss, not the last one.", section=Section.MEASUREMENTS)
    ] = False
    save_every: Annotated[
        int,
        Option(
            "Write a checkpoint to OUTPUT.training every so many steps.",
            section=Section.MEASUREMENTS,
            metavar="STEPS",
            at_least=1,
        ),
    ] = 100

    @property
    def evaluates(self) -> bool:
        """Whether held-out examples are measured during training."""
        return bool(self.evaluate_every or self.patience or self.keep_best)

    @property
    def recorded(self) -> dict[str, Any]:
        """What a manifest contains. How often a checkpoint is written changes no result."""
        names = [declared.name for declared in options_of(TrainingSettings) if declared.name != "save_every"]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class AdapterChoice(Options):
    """What `train` is to train. Raises WrongUsage for options that exclude each other."""

    SECTION: ClassVar[Section] = Section.ADAPTER

    rank: Annotated[
        int | Sequence[int] | None,
        Option(
            "Rank: rows of A and columns of B. Repeated, each rank gets an adapter, and a table compares them.",
            shown_default="8",
            at_least=1,
        ),
    ] = None
    alpha: Annotated[
        float | None, Option("B·A is multiplied by alpha/rank.", shown_default="twice the rank", above=0)
    ] = None
    rslora: Annotated[bool, Option("Multiply by alpha/√rank instead.")] = False
    dora: Annotated[bool, Option("Also train the length of each output of a weight.")] = False
    init: Annotated[
        Init,
        Option("First values of A and B: random and zero, or from the weights. Then the saved rank is twice {rank}."),
    ] = "default"
    target: Annotated[
        str | Sequence[str] | None,
        Option(
            "Layers to adapt: endings of their names, separated by commas.",
            metavar="NAMES|all-linear",
            shown_default="all-linear",
            multiple=False,
        ),
    ] = None
    target_pattern: Annotated[str, Option("Regular expression for whole names of layers.", metavar="REGEX")] = ""
    target_parameters: Annotated[
        Sequence[str],
        Option(
            "Stacked parameter of experts, each of which gets a pair. May be repeated.",
            flags=("--target-parameter",),
            metavar="NAME",
        ),
    ] = ()
    rank_pattern: Annotated[
        Mapping[str, int] | None,
        Option(
            "Another rank for layers whose names end so. The first match counts. May be repeated.",
            metavar="REGEX=RANK",
            read=read_ranks,
        ),
    ] = None
    alpha_pattern: Annotated[
        Mapping[str, float] | None,
        Option(
            "Another alpha for layers whose names end so. May be repeated.", metavar="REGEX=ALPHA", read=read_alphas
        ),
    ] = None
    dropout: Annotated[
        float | None,
        Option("Part of the inputs of A that is dropped in a step.", shown_default="0", at_least=0, below=1),
    ] = None
    bias: Annotated[TrainedBiases, Option("Biases to train: all, or those of the adapted layers.")] = "none"
    token_indices: Annotated[
        Sequence[int],
        Option(
            "Row of the input embeddings to train alone. May be repeated.",
            flags=("--token-index",),
            metavar="N",
            at_least=0,
        ),
    ] = ()
    heads: Annotated[
        Sequence[str],
        Option("Module to train and save as a whole. May be repeated.", flags=("--head",), metavar="NAME"),
    ] = ()
    continue_from: Annotated[
        str | Path | None,
        Option(
            "Train this adapter further, with a new optimiser. Its layers, ranks and scales stay.",
            metavar="ADAPTER",
            kind="source",
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.ranks)) < len(self.ranks):
            raise WrongUsage(f"each {named('rank')} is given once")
        given = [named(name) for name in self._chosen_here() if name not in OF_CONTINUED]
        if self.continue_from is not None and given:
            raise WrongUsage(
                f"{named('continue_from')} takes rank, alpha and layers of the adapter that it names; "
                f"{', '.join(given)} cannot be given beside it"
            )
        if self.init != "default" and (excluded := [named(name) for name in WITHOUT_INIT if getattr(self, name)]):
            raise WrongUsage(
                f"{named('init', self.init)} trains one pair beside a frozen one of the same layer. This is not "
                f"possible with {', '.join(excluded)}"
            )

    def _chosen_here(self) -> list[str]:
        own = {declared.name for declared in options_of(AdapterChoice)}
        return [name for name in self.chosen() if name in own]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that were given; none where the default is meant."""
        return (self.rank,) if isinstance(self.rank, int) else tuple(self.rank or ())

    @property
    def names_layers(self) -> bool:
        """Whether single layers were named, so that a misfit of one of them is an error."""
        return bool(self.targets != "all-linear")

    @property
    def targets(self) -> Any:
        """`all-linear`, or endings of layer names, which may be separated by commas."""
        if self.target is None:
            return [] if self.target_pattern or self.target_parameters else "all-linear"
        if self.target == "all-linear":
            return self.target
        return [name for name in (self.target.split(",") if isinstance(self.target, str) else self.target) if name]

    @property
    def identity(self) -> dict[str, Any]:
        """What decides which tensors are trained, and how: a continued training must have the same."""
        return {
            "rslora": self.rslora,
            "dora": self.dora,
            "init": self.init,
            "dropout": self.dropout or 0.0,
            "bias": self.bias,
            "rank_pattern": dict(self.rank_pattern or {}),
            "alpha_pattern": dict(self.alpha_pattern or {}),
            "tokens": list(self.token_indices),
        }


@dataclass(frozen=True, kw_only=True)
class TrainOptions(AdapterChoice, TrainingSettings, Output):
    """What `train` takes."""

    SECTION: ClassVar[Section] = Section.DATA

    model: Annotated[str | Path, Positional("MODEL", kind="source")] = field(kw_only=False)
    data: Annotated[
        str | Path,
        Option(
            "Training data: a .jsonl, .csv, .parquet or .npz file, a folder, or file.py:factory.",
            flags=("--data",),
            kind="source",
            section=Section.OPTIONS,
        ),
    ] = field(kw_only=False)
    output: Annotated[
        str | Path, Option("Folder for the adapter.", flags=("-o", "--output"), kind="path", section=Section.OPTIONS)
    ] = field(kw_only=False)

    columns: Annotated[
        Mapping[str, str] | None,
        Option(
            "Column of the data that is read as NAME, such as text=body. May be repeated.",
            flags=("--column",),
            metavar="NAME=COLUMN",
            read=read_columns,
        ),
    ] = None
    task: Annotated[
        LearntTask | None, Option("What is learnt from the columns, where they would fit several tasks.")
    ] = None
    max_length: Annotated[int, Option("Maximum number of tokens per text.", at_least=1)] = 128
    packing: Annotated[bool, Option("Put several short texts into one row. For causal language models.")] = False
    holdout: Annotated[
        float, Option("Part of the data that is held out of training and measured on.", at_least=0, below=1)
    ] = 0.2

    quantize_base: Annotated[
        BaseQuantization | None,
        Option(
            "Store the frozen linear layers of the base in 4 bits while training (QLoRA). Needs bitsandbytes.",
            section=Section.FROZEN_BASE,
        ),
    ] = None
    base_dtype: Annotated[
        BaseDtype,
        Option(
            "Dtype of the frozen weights while training. A half precision needs the same {precision}.",
            section=Section.FROZEN_BASE,
        ),
    ] = "float32"
    shard_base: Annotated[
        bool,
        Option(
            "With several processes: each holds a share of the frozen weights alone (FSDP).",
            section=Section.FROZEN_BASE,
        ),
    ] = False

    compare: Annotated[
        Sequence[ComparedStrategy],
        Option(
            "Also train all weights, or the head alone on the frozen base, and write a table.",
            section=Section.MEASUREMENTS,
            metavar="full,frozen",
            separated=True,
        ),
    ] = ()
    tensorboard: Annotated[
        str | Path | None,
        Option(
            "Also write the metrics of each run to a folder there, for TensorBoard.",
            section=Section.MEASUREMENTS,
            metavar="FOLDER",
        ),
    ] = None
    resume: Annotated[
        bool, Option("Continue from the checkpoint of an interrupted training.", section=Section.MEASUREMENTS)
    ] = False
    device: Annotated[Literal["cpu", "cuda"], Option("Device to train on.", section=Section.STEPS)] = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume and self.is_comparison:
            raise WrongUsage(f"a comparison is not continued: {named('resume')} is for the training of one adapter")
        if self.shard_base and (self.is_comparison or self.compile):
            raise WrongUsage(
                f"{named('shard_base')} trains one adapter: leave out {named('compare')}, {named('compile')} and "
                "further ranks"
            )
        if self.quantize_base:
            self.refuse_full_training()
        fitting = {"bfloat16": "bf16", "float16": "fp16"}.get(self.base_dtype, self.precision)
        if self.precision != fitting:
            raise WrongUsage(
                f"with {named('base_dtype', self.base_dtype)} the steps are computed in {self.base_dtype}, too: add "
                f"{named('precision', fitting)}"
            )
        if self.evaluates and not self.holdout:
            raise WrongUsage(
                f"{named('evaluate_every')}, {named('patience')} and {named('keep_best')} need held-out examples "
                f"({named('holdout')})"
            )

    @property
    def is_comparison(self) -> bool:
        """Whether several ways of training are compared."""
        return len(self.ranks) > 1 or bool(self.compare)

    def refuse_full_training(self) -> None:
        """Raise WrongUsage where all weights are to be trained, of a base whose weights are stored in 4 bits."""
        if "full" in self.compare:
            raise WrongUsage(
                f"{named('compare', 'full')} trains all weights, and those of a base in 4 bits are frozen. Leave it out"
            )
