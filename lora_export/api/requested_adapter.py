"""The adapters that `train` starts from: new ones as requested, or a trained one that is continued."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_export import formats, layers
from lora_export.errors import InputRefused, WrongUsage
from lora_export.formats.peft_records import as_peft_computes
from lora_export.layers.initial_factors import Init
from lora_export.layers.new_adapter import TrainedBiases
from lora_export.lora import Adapter
from lora_export.models.model import Model

DEFAULT_RANK = 8
ALPHA_PER_RANK = 2.0
WITHOUT_INIT = ("dora", "target_parameters")  # what excludes a start from the weights
OF_A_NEW_ADAPTER = "--continue-from takes rank, alpha and layers of the adapter that it names"


@dataclass(frozen=True, kw_only=True)
class AdapterRequest:
    """What `train` is to train. Raises WrongUsage for options that exclude each other."""

    ranks: tuple[int, ...] = ()  # empty: DEFAULT_RANK
    alpha: float | None = None  # None: twice the rank
    target: str | Sequence[str] | None = None  # None: all-linear, where nothing else chooses layers
    target_pattern: str = ""
    target_parameters: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    init: Init = "default"
    dropout: float | None = None  # None: 0, or that of the continued adapter
    bias: TrainedBiases = "none"
    token_indices: tuple[int, ...] = ()
    continue_from: Path | None = None

    def __post_init__(self) -> None:
        if len(set(self.ranks)) < len(self.ranks):
            raise WrongUsage("each --rank is given once")
        names = [one.name for one in dataclasses.fields(self) if one.name not in ("continue_from", "dropout")]
        given = [name for name in names if getattr(self, name) != _default_of(name)]
        if self.continue_from is not None and given:
            raise WrongUsage(f"{OF_A_NEW_ADAPTER}; {_as_options(given)} cannot be given beside it")
        if self.init != "default" and (given := [name for name in WITHOUT_INIT if getattr(self, name)]):
            raise WrongUsage(
                f"--init {self.init} trains one pair beside a frozen one of the same layer. This is not possible "
                f"with {_as_options(given)}"
            )

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
    def recorded(self) -> dict[str, Any]:
        """What decides which tensors are trained, and how: a continued training must have the same."""
        return {
            "rslora": self.rslora,
            "dora": self.dora,
            "init": self.init,
            "dropout": self.dropout or 0.0,
            "bias": self.bias,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "tokens": list(self.token_indices),
        }

    def adapters(self, loaded: Model, heads: Sequence[str], *, seed: int) -> dict[int, Adapter]:
        """The adapters to train, by rank. Raises InputRefused as `create_adapter`, and for one that cannot go on."""
        if self.continue_from is not None:
            adapter = self._continued(loaded, heads)
            return {int(adapter.metadata.get("r") or max(pair.rank for pair in adapter.pairs.values())): adapter}
        return {
            rank: layers.create_adapter(
                loaded.module,
                targets=self.targets,
                rank=rank,
                alpha=self.alpha or ALPHA_PER_RANK * rank,
                rank_pattern=self.rank_pattern,
                alpha_pattern={**self.alpha_pattern, **self._alphas_of_ranks},
                target_pattern=self.target_pattern,
                target_parameters=self.target_parameters,
                rslora=self.rslora,
                dora=self.dora,
                dropout=self.dropout or 0.0,
                bias=self.bias,
                token_indices=self.token_indices,
                modules_to_save=heads,
                seed=seed,
            )
            for rank in self.ranks or (DEFAULT_RANK,)
        }

    @property
    def _alphas_of_ranks(self) -> dict[str, float]:
        """Twice the rank of each pattern that has no alpha of its own, unless an alpha is given."""
        ranks = {} if self.alpha else self.rank_pattern
        return {name: ALPHA_PER_RANK * rank for name, rank in ranks.items() if name not in self.alpha_pattern}

    def _continued(self, loaded: Model, heads: Sequence[str]) -> Adapter:
        assert self.continue_from is not None
        (adapter,) = layers.respelled_for(loaded.module, [as_peft_computes(formats.load(self.continue_from))])
        if adapter.added or adapter.biases:
            what = ", ".join((*adapter.added, *adapter.biases))
            raise InputRefused(f"{self.continue_from} adds to vectors, which is not trained further: {what}")
        _refuse_other_labels(adapter, loaded, self.continue_from)
        dropout = self.dropout if self.dropout is not None else float(adapter.metadata.get("lora_dropout", 0.0))
        new = {
            name: value
            for name, value in layers.tensors_of(loaded.module, heads).items()
            if name not in adapter.replaced and name.removesuffix(".weight") not in adapter.pairs
        }
        metadata = {key: value for key, value in adapter.metadata.items() if key != "model_config"}
        return dataclasses.replace(
            adapter, replaced={**adapter.replaced, **new}, metadata={**metadata, "lora_dropout": dropout}
        )


def _default_of(name: str) -> Any:
    (one,) = (one for one in dataclasses.fields(AdapterRequest) if one.name == name)
    return one.default if one.default_factory is dataclasses.MISSING else one.default_factory()


def _as_options(names: Sequence[str]) -> str:
    words = {"ranks": "--rank", "target_parameters": "--target-parameter", "token_indices": "--token-index"}
    return ", ".join(words.get(name, "--" + name.replace("_", "-")) for name in names)


def _refuse_other_labels(adapter: Adapter, loaded: Model, source: Path) -> None:
    """Raise InputRefused where the head of the adapter has other classes, or another order of them, than the data."""
    trained = (adapter.metadata.get("model_config") or {}).get("id2label")
    config: Any = getattr(loaded.module, "config", None)
    if not trained or not adapter.replaced or config is None:
        return
    own, data = ({int(key): str(label) for key, label in table.items()} for table in (trained, config.id2label))
    if own != data:
        raise InputRefused(
            f"{source} was trained on the classes {', '.join(own.values())}, and the data has "
            f"{', '.join(data.values())}: its head means other classes"
        )
