"""In which generation of names an adapter is spelled, and its tensors under the names of the base.

transformers renames weights while it loads them, and joins or splits some. An adapter has the names of the model that
it was trained on, as that version of transformers loaded it. A checkpoint has the original names, or those of the
loaded model. All combinations are tried. If two of them lead to different tensors, the adapter is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from packaging.version import InvalidVersion, Version

from lora_export.errors import InputRefused, MatchError, Misfit
from lora_export.lora import Adapter
from lora_export.plan.attempts import AsLoaded, AsOriginal, AsSpelled, Attempt, ConvertedNames, SpelledAdapter, Spelling
from lora_export.plan.conversion.architecture import ArchitectureRules
from lora_export.plan.match_names import BaseTensors
from lora_export.plan.respelling import Respelling
from lora_export.plan.types import TensorSpec


def spell(adapter: Adapter, base: BaseTensors, rules: ArchitectureRules | None) -> SpelledAdapter:
    """The adapter under the names of the base. Raises InputRefused where two generations of names fit differently."""
    as_spelled = AsSpelled(adapter, base)
    attempts: list[Attempt] = [as_spelled]
    fits = as_spelled.matched == len(as_spelled.modules)
    if rules is not None and (rules.own or not fits):
        attempts += [AsLoaded(adapter, base, rules), AsOriginal(adapter, base, rules)]
    best = max(attempts, key=lambda attempt: attempt.matched)  # the first, where several match as many
    for other in attempts:
        if other is not best and other.matched == best.matched == len(best.modules):
            _refuse_two_answers(adapter, best, other)
    return Respelling(best).result() if isinstance(best, ConvertedNames) else as_spelled.spelled()


def _refuse_two_answers(adapter: Adapter, one: Attempt, other: Attempt) -> None:
    for module in one.modules:
        first, second = one.weights_of(module), other.weights_of(module)
        if first != second:
            raise InputRefused(
                f"the names of adapter {adapter.name} fit the base in two ways: {adapter.spelled(module)} is "
                f"{', '.join(first)} by {one.meaning}, and {', '.join(second)} by {other.meaning}. Nothing was "
                "written. Rename the adapter's modules as the base spells them, by --prefix where a prefix is enough"
            )


def unknown_names(rules: ArchitectureRules | None) -> str:
    """What is not known about the names of a base, for a message; empty where all is known."""
    if rules is None:
        return ""
    if not rules.is_known:
        return (
            f"The names that transformers {rules.version} gives the parts of {rules.architecture} are not in the table "
            "of this package."
        )
    saved_by = str(rules.config.get("transformers_version", ""))
    if _is_newer(saved_by, rules.version):
        return (
            f"The base was saved by transformers {saved_by}. This package has the names of transformers "
            f"{rules.version}: a newer one may rename more weights."
        )
    return ""


def _is_newer(one: str, other: str) -> bool:
    try:
        return Version(one).release[:2] > Version(other).release[:2]
    except InvalidVersion:
        return False


def respelled(
    adapters: Sequence[Adapter], specs: Iterable[TensorSpec], rules: ArchitectureRules | None
) -> list[Adapter]:
    """The adapters under the names of a module or graph; those that have these names already are the same objects.

    Raises MatchError for a layer without tensors, and where a pair belongs to a part of a tensor: only a merge into a
    checkpoint changes parts. Raises InputRefused as `spell`.
    """
    if rules is None or not adapters:
        return list(adapters)
    base, found = BaseTensors(specs), []
    for adapter in adapters:
        one = spell(adapter, base, rules)
        if one.spelling is Spelling.SAME:
            found.append(adapter)
            continue
        parts = [
            Misfit(adapter.name, name, "is a part of a tensor here; only a merge into a checkpoint can change it")
            for name in one.views
        ]
        if problems := [*one.misfits, *parts]:
            raise MatchError(problems, targets=len(adapter.pairs))
        found.append(replace(one.adapter, targets=(), notes=(*adapter.notes, *one.notes)))
    return found
