"""The options of `train`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from lora_export.errors import WrongUsage
from lora_export.options.common import ALL_LINEAR, GREATEST_SEED, Output, layer_endings, written
from lora_export.options.declaring import Option, Options, Section, argument, declares, option, options_of, table_of
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


def _strategies(texts: Iterable[str]) -> tuple[str, ...]:
    """Words that are separated by commas, each once. Raises ValueError for an unknown one."""
    words = [word for text in texts for word in text.split(",") if word]
    if unknown := [word for word in words if word not in get_args(ComparedStrategy)]:
        raise ValueError(f"{', '.join(unknown)} is none of {', '.join(get_args(ComparedStrategy))}")
    return tuple(dict.fromkeys(words))


@dataclass(frozen=True, kw_only=True)
class Evaluating(Options):
    """When a training measures on held-out data, and when it is saved."""

    SECTION: ClassVar[Section] = Section.MEASUREMENTS

    evaluate_every: int = option(0, "Measure on the held-out data every so many steps.", metavar="STEPS", at_least=0)
    patience: int = option(
        0, "Stop after N evaluations without a lower held-out loss, and keep the best adapter.", metavar="N", at_least=0
    )
    keep_best: bool = option(False, "Save the adapter of the lowest held-out loss, not the last one.")
    save_every: int = option(
        100, "Write a checkpoint to OUTPUT.training every so many steps.", metavar="STEPS", at_least=1
    )

    @property
    def evaluates(self) -> bool:
        """Whether held-out examples are measured during training."""
        return bool(self.evaluate_every or self.patience or self.keep_best)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Evaluating):
    """The settings of the loop and of its optimiser, AdamW."""

    SECTION: ClassVar[Section] = Section.STEPS

    epochs: int = option(3, "Passes over the data.", at_least=1, often=True)
    batch_size: int = option(32, "Examples per step, of all processes together.", at_least=1, often=True)
    accumulate: int = option(1, "Parts of a step's examples that are computed one after the other.", at_least=1)
    learning_rate: float = option(1e-3, "Peak step size of AdamW.", above=0, often=True)
    b_ratio: float = option(1.0, "Learning rate of B divided by that of A (LoRA+).", above=0)
    schedule: Literal["linear", "cosine", "constant"] = option("linear", "Learning rate after the warm-up.")
    warmup: float = option(0.1, "Part of all steps in which the learning rate rises.", at_least=0, below=1)
    weight_decay: float = option(0.01, "Weight decay of AdamW.", at_least=0)
    max_gradient_norm: float = option(1.0, "Norm to which gradients are clipped.", above=0)
    precision: Precision = option("no", "Precision of autocast.")
    gradient_checkpointing: bool = option(
        False, "Compute activations again in the backward pass: less memory, more time."
    )
    compile: bool = option(False, "Compute the steps with torch.compile. The first step takes long.")
    seed: int = option(
        0, "Random seed for the split, the initial values and the order.", at_least=0, at_most=GREATEST_SEED
    )

    @property
    def recorded(self) -> dict[str, Any]:
        """What a manifest contains. How often a checkpoint is written changes no result."""
        names = [declared.name for declared in options_of(TrainingSettings) if declared.name != "save_every"]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class AdapterChoice(Options):
    """What `train` is to train. Raises WrongUsage for options that exclude each other."""

    SECTION: ClassVar[Section] = Section.ADAPTER

    rank: int | Sequence[int] | None = option(
        None,
        "Rank: rows of A and columns of B. Repeated, each rank gets an adapter, and a table compares them.",
        shown_default="8",
        often=True,
        at_least=1,
    )
    alpha: float | None = option(
        None, "B·A is multiplied by alpha/rank.", shown_default="twice the rank", above=0, often=True
    )
    rslora: bool = option(False, "Multiply by alpha/√rank instead.")
    dora: bool = option(False, "Also train the length of each output of a weight.")
    init: Init = option(
        "default", "First values of A and B: random and zero, or from the weights. Then the saved rank is twice {rank}."
    )
    target: str | Sequence[str] | None = option(
        None,
        "Layers to adapt: endings of their names, separated by commas.",
        metavar="NAMES|all-linear",
        shown_default="all-linear",
        often=True,
        multiple=False,
    )
    target_pattern: str = option("", "Regular expression for whole names of layers.", metavar="REGEX")
    target_parameters: Sequence[str] = option(
        (),
        "Stacked parameter of experts, each of which gets a pair. May be repeated.",
        flags=("--target-parameter",),
        metavar="NAME",
    )
    rank_pattern: Mapping[str, int] | None = option(
        None,
        "Another rank for layers whose names end so. The first match counts. May be repeated.",
        metavar="REGEX=RANK",
        read=table_of("REGEX=RANK, such as q_proj=4", int, at_last=True),
    )
    alpha_pattern: Mapping[str, float] | None = option(
        None,
        "Another alpha for layers whose names end so. May be repeated.",
        metavar="REGEX=ALPHA",
        read=table_of("REGEX=ALPHA, such as q_proj=4", float, at_last=True),
    )
    dropout: float | None = option(
        None, "Part of the inputs of A that is dropped in a step.", shown_default="0", at_least=0, below=1
    )
    bias: TrainedBiases = option("none", "Biases to train: all, or those of the adapted layers.")
    token_indices: Sequence[int] = option(
        (),
        "Row of the input embeddings to train alone. May be repeated.",
        flags=("--token-index",),
        metavar="N",
        at_least=0,
    )
    heads: Sequence[str] = option(
        (), "Module to train and save as a whole. May be repeated.", flags=("--head",), metavar="NAME", often=True
    )
    continue_from: str | Path | None = option(
        None,
        "Train this adapter further, with a new optimiser. Its layers, ranks and scales stay.",
        metavar="ADAPTER",
        kind="source",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.ranks)) < len(self.ranks):
            raise WrongUsage(f"each {named('rank')} is given once")
        given = [named(name) for name in self.chosen_of(AdapterChoice) if name not in OF_CONTINUED]
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

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that were given; none where the default is meant."""
        return (self.rank,) if isinstance(self.rank, int) else tuple(self.rank or ())

    @property
    def names_layers(self) -> bool:
        """Whether single layers were named, so that a misfit of one of them is an error."""
        return bool(self.targets != ALL_LINEAR)

    @property
    def targets(self) -> Any:
        """`all-linear`, or endings of layer names, which may be separated by commas."""
        if self.target is None:
            return [] if self.target_pattern or self.target_parameters else ALL_LINEAR
        return layer_endings(self.target)

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

    model: str | Path = field(kw_only=False, metadata=argument("MODEL", kind="source"))
    data: str | Path = field(
        kw_only=False,
        metadata=declares(
            Option(
                "Training data: a .jsonl, .csv, .parquet or .npz file, a folder, or file.py:factory.",
                flags=("--data",),
                often=True,
                kind="source",
                section=Section.OPTIONS,
            )
        ),
    )
    output: str | Path = field(kw_only=False, metadata=written("Folder for the adapter."))

    columns: Mapping[str, str] | None = option(
        None,
        "Column of the data that is read as NAME, such as text=body. May be repeated.",
        flags=("--column",),
        metavar="NAME=COLUMN",
        read=table_of("NAME=COLUMN, such as text=body", str),
    )
    task: LearntTask | None = option(None, "What is learnt from the columns, where they would fit several tasks.")
    max_length: int = option(128, "Maximum number of tokens per text.", at_least=1, often=True)
    packing: bool = option(False, "Put several short texts into one row. For causal language models.")
    holdout: float = option(0.2, "Part of the data that is held out of training and measured on.", at_least=0, below=1)

    quantize_base: BaseQuantization | None = option(
        None,
        "Store the frozen linear layers of the base in 4 bits while training (QLoRA). Needs bitsandbytes.",
        often=True,
        section=Section.FROZEN_BASE,
    )
    base_dtype: BaseDtype = option(
        "float32",
        "Dtype of the frozen weights while training. A half precision needs the same {precision}.",
        section=Section.FROZEN_BASE,
    )
    shard_base: bool = option(
        False,
        "With several processes: each holds a share of the frozen weights alone (FSDP).",
        section=Section.FROZEN_BASE,
    )

    compare: Sequence[ComparedStrategy] = option(
        (),
        "Also train all weights, or the head alone on the frozen base, and write a table.",
        section=Section.MEASUREMENTS,
        metavar="full,frozen",
        read=_strategies,
    )
    tensorboard: str | Path | None = option(
        None,
        "Also write the metrics of each run to a folder there, for TensorBoard.",
        section=Section.MEASUREMENTS,
        metavar="FOLDER",
    )
    resume: bool = option(
        False, "Continue from the checkpoint of an interrupted training.", section=Section.MEASUREMENTS
    )
    device: Literal["cpu", "cuda"] = option("cpu", "Device to train on.", section=Section.STEPS)

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
