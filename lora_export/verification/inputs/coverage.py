"""Whether the inputs reach what the adapters bring, pairs and rows: a fault in what no input reaches cannot show."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from lora_export import layers, plan
from lora_export.errors import first_of
from lora_export.layers.attachments import Branch, attachment_of, is_attached
from lora_export.layers.module_tensors import named_tensors
from lora_export.lora import Adapter
from lora_export.models.model import Model
from lora_export.options.spelling import named
from lora_export.runtime.runner import Arrays
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.verification.pair_controls import SHOWN_PAIRS
from lora_export.verification.parity import Findings

MOST_DRAWS = 32  # that are tried for pairs which no case reaches


class PairCoverage(NamedTuple):
    """The pairs of the adapters that were computed in no case: of an image tower, or of a rare expert."""

    unreached: tuple[str, ...]  # the adapter's names of their modules
    findings: Findings  # one doubt about them


def coverage_of_pairs(attached: nn.Module, cases: Mapping[str, Arrays], computed: Collection[Branch]) -> PairCoverage:
    """Which pairs the inputs reach.

    `attached` is the module with its adapters. `computed` are the branches that a run of it computed. Where it is
    empty (its outputs are cached), `attached` itself runs all cases.
    """
    every = [branch for owner in attached.modules() if is_attached(owner) for branch in attachment_of(owner).branches]
    if every and not computed:
        with layers.recorded_branches() as found:
            for arrays in cases.values():
                ModuleRunner(attached).run(arrays)
        computed = found
    unreached = tuple(branch.module for branch in every if branch not in computed)
    doubt = (
        f"no input reaches {first_of(unreached, SHOWN_PAIRS)}: {len(unreached)} of the {len(every)} pairs of the "
        f"adapters were not computed. Give inputs that reach them ({named('inputs')})"
    )
    return PairCoverage(unreached, Findings(doubts=(doubt,) if unreached else ()))


def seeds_that_reach(
    attached: nn.Module, unreached: Collection[str], make_inputs: Callable[[int], Arrays], first_seed: int
) -> tuple[int, ...]:
    """Seeds of inputs that reach more of the pairs, which no case has reached: those of a rare expert.

    Each of MOST_DRAWS inputs is run by the module with its adapters. Inputs that reach nothing new are left out.
    """
    missing, seeds = set(unreached), []
    for seed in range(first_seed, first_seed + MOST_DRAWS):
        with layers.recorded_branches() as computed:
            ModuleRunner(attached).run(make_inputs(seed))
        if reached := missing & {branch.module for branch in computed}:
            seeds.append(seed)
            missing -= reached
        if not missing:
            break
    return tuple(seeds)


class RowCoverage:
    """Which of the adapters' rows of embedding tables PyTorch looks up, from now on.

    Puts hooks on the tables of `module`, which stay there.
    """

    def __init__(self, module: nn.Module, model: Model, adapters: Sequence[Adapter]):
        self.wanted: dict[str, set[int]] = {}
        self.seen: dict[str, set[int]] = {}
        if not any(adapter.token_rows for adapter in adapters):
            return
        tables = {one.name: one.tensor for one in named_tensors(model.module) if isinstance(one.owner, nn.Embedding)}
        steps = plan.make(adapters, layers.specs(model.module)).by_weight
        for step in steps.values():
            if step.token_rows is None or step.weight not in tables:
                continue
            self.wanted[step.weight] = set(step.token_rows.indices.tolist())
            self.seen[step.weight] = set()
            for name, table in tables.items():
                # A tied table may be looked up under another of its names, which has equal rows where ties are broken.
                if table is tables[step.weight] or (name in steps and step.token_rows.equals(steps[name].token_rows)):
                    owner = module.get_submodule(name.rpartition(".")[0])
                    owner.register_forward_pre_hook(functools.partial(self._record, step.weight), with_kwargs=True)

    def _record(self, table: str, _: nn.Module, inputs: tuple[Any, ...], named_inputs: dict[str, Any]) -> None:
        ids = next(iter((*inputs, *named_inputs.values())))
        self.seen[table] |= set(ids.flatten().tolist())

    @property
    def findings(self) -> Findings:
        """One doubt for each table of whose rows none was looked up so far; not judged are those of which some were."""
        doubts = (
            f"{table}: none of the {len(rows)} rows that the adapter brings was looked up. Give inputs that contain "
            f"them ({named('inputs')})"
            for table, rows in self.wanted.items()
            if not rows & self.seen[table]
        )
        not_judged = (
            f"{table}: {len(rows - self.seen[table])} of the {len(rows)} rows that the adapter brings. They were not "
            "looked up"
            for table, rows in self.wanted.items()
            if 0 < len(rows & self.seen[table]) < len(rows)
        )
        return Findings(not_judged=tuple(not_judged), doubts=tuple(doubts))
