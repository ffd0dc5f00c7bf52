"""How several adapters are combined, and what happens to tied tensors of which one changes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from lora_export.errors import WrongUsage
from lora_export.options.common import LAYOUT
from lora_export.options.declaring import Option, Options, Section, means, nested, option
from lora_export.options.reading import ReadOptions
from lora_export.options.spelling import named

if TYPE_CHECKING:
    from lora_export.lora import Adapter

Method = Literal[
    "cat",
    "linear",
    "svd",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
]
EXACT = "cat"
FACTORWISE = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
TiedEmbeddings = Literal["error", "untie", "both"]

AdapterSource: TypeAlias = "str | Path | Adapter"  # a path, `NAME=PATH`, or an adapter that is loaded already
AdapterSources: TypeAlias = "AdapterSource | Sequence[AdapterSource]"


def read_prefixes(texts: Iterable[str]) -> dict[str, str]:
    """FROM=TO... as a table. Raises ValueError for another text, and for two replacements of one beginning."""
    prefixes: dict[str, str] = {}
    for text in texts:
        old, equals, new = text.partition("=")
        if not equals or old == new:
            raise ValueError(f"{text} is not FROM=TO, such as model.=model.language_model.")
        if prefixes.setdefault(old, new) != new:
            raise ValueError(f"{old} is given twice")
    return prefixes


@dataclass(frozen=True)
class Combination(Options):
    """How the pairs of several adapters on one weight become one pair, by the methods of PEFT's `add_weighted_adapter`.

    Raises WrongUsage for values that do not go together.
    """

    SECTION: ClassVar[Section] = Section.COMBINING

    method: Method = option(
        "cat",
        "How the pairs of several adapters on one weight are combined, by PEFT's names. cat is the exact sum.",
        flags=("--combine",),
    )
    density: float | None = option(
        None,
        "Share of entries that ties, dare_* and magnitude_prune keep: above 0, at most 1.",
        metavar="D",
        above=0,
        at_most=1,
    )
    majority_sign: Literal["total", "frequency"] | None = option(
        None, "Sign that ties and dare_ties elect: that of the sum, or of most values (default: total)."
    )
    svd_rank: int | None = option(
        None, "Rank after an SVD (default: the largest of the adapters).", metavar="R", at_least=1
    )
    seed: int | None = option(
        None, "Random seed for the entries that dare_* keeps (default: 0).", flags=("--combine-seed",), metavar="N"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prunes and self.density is None:
            raise WrongUsage(
                f"{named('combine', self.method)} needs {named('density')}, the share of entries that it keeps"
            )
        unused = {
            "density": self.density is not None and not self.prunes,
            "majority_sign": self.majority_sign is not None and "ties" not in self.method,
            "svd_rank": self.svd_rank is not None and not self.method.endswith("svd"),
            "combine_seed": self.seed is not None and not self.is_random,
        }
        if names := [named(name) for name, is_unused in unused.items() if is_unused]:
            raise WrongUsage(f"{' and '.join(names)}: {named('combine', self.method)} does not use it")

    @property
    def is_exact(self) -> bool:
        """Whether the combination is the sum of the changes."""
        return self.method == EXACT

    @property
    def prunes(self) -> bool:
        """Whether entries are removed."""
        return any(name in self.method for name in ("ties", "dare", "magnitude"))

    @property
    def is_random(self) -> bool:
        """Whether the entries that are removed are random ones."""
        return "dare" in self.method

    @property
    def settings(self) -> dict[str, Any]:
        """What a record of provenance contains of it; empty for the exact sum."""
        if self.is_exact:
            return {}
        chosen = {name: value for name, value in asdict(self).items() if value is not None}
        defaults: dict[str, Any] = {"majority_sign": "total"} if "ties" in self.method else {}
        defaults |= {"seed": 0} if self.is_random else {}
        return {"combine": defaults | chosen}

    def __str__(self) -> str:
        settings = self.settings.get("combine", {})
        values = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "method")
        return f"{self.method} ({values})" if values else self.method


@dataclass(frozen=True, kw_only=True)
class Weighted(Options):
    """Several adapters, each with a factor, under the names that a base has."""

    weights: Sequence[float] = option(
        (),
        "Factor on an adapter's scale. Once per adapter, in the same order (default: 1.0).",
        section=Section.COMBINING,
        flags=("--weight",),
        metavar="W",
        often=True,
    )
    combination: str | Combination = nested(Combination)
    prefixes: Mapping[str, str] | None = option(
        None,
        "Replace the beginning FROM of names in the adapters by TO: for an adapter of a text model on a multimodal "
        "base. May be repeated.",
        section=Section.READING,
        flags=("--prefix",),
        metavar="FROM=TO",
        read=read_prefixes,
    )
    reading: ReadOptions = nested(ReadOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.combination, Combination):
            object.__setattr__(self, "combination", Combination(self.combination))  # type: ignore[arg-type]

    @property
    def combined(self) -> Combination:
        """How pairs are combined, whichever way it was given."""
        assert isinstance(self.combination, Combination)
        return self.combination


TIED_OPTION = Option(
    "Tied embeddings of which an adapter changes one. error: refuse the adapter; untie: give each a tensor of its own, "
    "as the adapter was trained; both: change both.",
    section=Section.COMBINING,
)


@dataclass(frozen=True, kw_only=True)
class Applied(Weighted):
    """How adapters are applied to a base: options that merges, exports and proofs share."""

    tied: TiedEmbeddings = means("error", TIED_OPTION)
    layout: Mapping[str, str] | None = means(None, replace(LAYOUT, section=Section.READING))

    @property
    def settings(self) -> dict[str, Any]:
        """What records and reports contain of it; empty where it is the default."""
        stated = {"tied": self.tied != "error" and self.tied, "layout": dict(self.layout or {})}
        return {**self.combined.settings, **{name: value for name, value in stated.items() if value}}


@dataclass(frozen=True, kw_only=True)
class GivenAdapters(Applied):
    """Adapters that the command line takes by -a, and how they are applied."""

    adapters: AdapterSources = option(
        (),
        "Adapter to apply. May be repeated.",
        flags=("-a", "--adapter"),
        metavar="[NAME=]ADAPTER",
        kind="source",
        multiple=True,
        often=True,
    )
