"""Adapters, plans and merges on the terminal."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.filesize import decimal

from lora_export.errors import count, first_of, one_line
from lora_export.lora import Adapter, LoraPair
from lora_export.options.spelling import named
from lora_export.pairs.open_shape import OpenPair, known_shape
from lora_export.plan import Plan
from lora_export.report.console import AnyConsole, print_line, print_table
from lora_export.weights.merge_report import LOW_RETENTION, MergeReport, OutputResult, QuantisationLoss, StepResult

if TYPE_CHECKING:
    from lora_export.adapters.low_rank import LayerShare

NO_EFFECT = "this adapter changes nothing: every B, A or scale is zero, as in a new adapter"


def print_adapter(to: AnyConsole, adapter: Adapter) -> None:
    """Print the contents of an adapter, a row for each module. ‖ΔW‖ is the Frobenius norm of s·BA at weight 1."""
    contents = contents_of(adapter)
    print_line(to, f"{adapter.name}: {adapter.format}, {contents}, {adapter.parameters:,} parameters", style="bold")
    for what, value in adapter_facts(adapter):
        print_line(to, one_line(f"  {what}: {value}"))
    rows = [["module", "rank", "scale", "shape", "‖ΔW‖", ""]]
    for module, pair in adapter.pairs.items():
        figures = ["", f"{pair.scale:g}", "the base's", ""]
        if not isinstance(pair, OpenPair):
            norm = "" if pair.needs_weight else f"{pair.norm:.4g}"
            figures = [f"{pair.rank}", f"{pair.scale:g}", shape_text(pair.shape), norm]
        rows.append([module, *figures, kind_of_pair(pair)])
    print_table(to, rows)
    if any(pair.magnitude is not None for pair in adapter.pairs.values()):
        print_line(to, "DoRA rescales W + ΔW, so the whole change also depends on the base's weights")
    if any(pair.needs_weight for pair in adapter.pairs.values()):
        print_line(
            to, "the changes follow from the base's weights, which the file does not have: they have no norm here"
        )
    for name, tensor in adapter.replaced.items():
        print_line(to, f"replaced as a whole: {name}  {shape_text(tensor.shape)} {tensor.dtype}")
    for name, rows_of_table in adapter.token_rows.items():
        print_line(to, f"rows replaced: {name}  {shape_text(rows_of_table.values.shape)} {rows_of_table.values.dtype}")
    for name, change in adapter.biases.items():
        print_line(to, f"added to a bias: {name}  {shape_text(change.shape)}")
    if adapter.is_identity:
        print_line(to, NO_EFFECT, style="yellow")
    for note in adapter.notes:
        print_line(to, f"note: {note}")


def contents_of(adapter: Adapter) -> str:
    """How many pairs, whole tensors, biases and rows an adapter has."""
    transforms = len(adapter.beyond_pairs["transforms"])
    numbers = {
        ("low-rank pair", "low-rank pairs"): len(adapter.pairs) - transforms,
        ("weight that is transformed", "weights that are transformed"): transforms,
        ("whole tensor", "whole tensors"): len(adapter.replaced),
        ("bias", "biases"): len(adapter.biases),
        ("row", "rows"): sum(rows.indices.size for rows in adapter.token_rows.values()),
    }
    return ", ".join(f"{n} {one if n == 1 else several}" for (one, several), n in numbers.items() if n) or "empty"


def kind_of_pair(pair: LoraPair) -> str:
    """DoRA or another method than LoRA, and the kind of layer where it is not linear."""
    layer = "embedding" if pair.embedding else "convolution" if len(known_shape(pair)) > 2 else ""
    return " ".join(filter(None, [pair.kind if pair.depends_on_weight else "", layer]))


def shape_text(shape: Sequence[int]) -> str:
    """`32 x 16`; `any` for a size that the file does not show."""
    return " x ".join(str(size or "any") for size in shape)


Item = TypeVar("Item")


def kind_of(name: str) -> str:
    """A name without the numbers of its layers and experts. In flattened names, these are between two `_`."""
    return re.sub(r"(^|(?<=[.\[]))\d+(?=[.\],]|$)|(?<=_)\d+(?=_)", "*", name)


def by_kind(items: Iterable[Item], name: Callable[[Item], str], same: Callable[[Item], Hashable]) -> list[list[Item]]:
    """The items in groups: those whose names have one kind and for which `same` is equal, in the order of the first."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault((kind_of(name(item)), same(item)), []).append(item)
    return list(groups.values())


def title(names: list[str]) -> str:
    """The name of a group: its kind, or the name itself where it has one member."""
    return names[0] if len(names) == 1 else kind_of(names[0])


_LONGEST = 100  # characters of a value that are shown
_MOST_TAGS = 5
_LONGEST_TABLE = 1_000_000  # characters of a table of tags
# Keys in the headers of image and video models' adapters (sd-scripts, modelspec, ai-toolkit), and what they are.
HEADER_FACTS = {
    "modelspec.title": "title",
    "ss_output_name": "title",
    "modelspec.trigger_phrase": "trigger words",
    "trigger_word": "trigger words",
    "trigger_words": "trigger words",
    "activation_text": "trigger words",
    "modelspec.architecture": "trained for",
    "ss_base_model_version": "trained for",
    "ss_sd_model_name": "trained on",
    "ss_network_module": "trained by",
    "software": "trained by",
    "ss_training_comment": "comment",
}
_TAGS = "ss_tag_frequency"


def adapter_facts(adapter: Adapter) -> Iterator[tuple[str, str]]:
    """Facts that a user looks for, as (what, value). Values are texts from the file, shortened."""
    if adapter.scale_source:
        yield "scales", adapter.scale_source
    if adapter.invocation_tokens:
        yield "acts from the last of these tokens on", ", ".join(map(str, adapter.invocation_tokens))
    header = adapter.metadata.get("header")
    for key, value in adapter.metadata.items():
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            yield key, _shortened(str(value))
    if isinstance(header, Mapping):
        yield from _header_facts(header)
    if adapter.sha256:
        yield "SHA-256", adapter.sha256
    if adapter.file_sha256:
        yield "SHA-256 of its tensors' file", adapter.file_sha256


def _header_facts(header: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    shown: set[tuple[str, str]] = set()
    for key, what in HEADER_FACTS.items():
        value = header.get(key)
        if isinstance(value, str) and value.strip() and (what, value) not in shown:
            shown.add((what, value))
            yield what, _shortened(value)
    if tags := _frequent_tags(header.get(_TAGS)):
        yield "most frequent tags", ", ".join(map(_shortened, tags))
    yield "header", f"{count(len(header), 'entry', 'entries')} ({named('json', True)} lists them)"


def _frequent_tags(recorded: Any) -> list[str]:
    """The tags of the training images by their number, over all folders of images."""
    if not isinstance(recorded, str) or len(recorded) > _LONGEST_TABLE:
        return []
    try:
        table = json.loads(recorded)
    except (ValueError, RecursionError):
        return []
    counts: Counter[str] = Counter()
    for tags in table.values() if isinstance(table, dict) else ():
        for tag, number in tags.items() if isinstance(tags, dict) else ():
            if type(number) is int:
                counts[tag.strip()] += number
    return [tag for tag, _ in counts.most_common(_MOST_TAGS)]


def _shortened(value: str) -> str:
    return value if len(value) <= _LONGEST else f"{value[:_LONGEST]}..."


LISTED_LAYERS = 5


def print_shares(
    to: AnyConsole, output: Path, layers: Sequence[LayerShare], tensors: Sequence[str] = (), *, whole: bool = False
) -> None:
    """Print one line for the adapter, and the layers of which it holds least; with `whole` all layers.

    `tensors` are those that the adapter saves whole.
    """
    from lora_export.adapters.low_rank import total_share  # a merge has no shares

    ranks = sorted({layer.rank for layer in layers})
    rank = f" of rank {ranks[0]}" if len(ranks) == 1 else f" of rank {ranks[0]} to {ranks[-1]}" if ranks else ""
    share = f", {_percent(total_share(layers))} of ‖ΔW‖²" if ranks else ""
    to.print(f"wrote {one_line(str(output))}: {count(len(layers), 'pair')}{rank}{share}")
    if tensors:
        names = first_of(tensors, len(tensors) if whole else LISTED_LAYERS)
        to.print(one_line(f"{count(len(tensors), 'tensor')} saved whole: {names}"))
    least = sorted(layers, key=lambda layer: layer.share)[: None if whole else LISTED_LAYERS]
    if not least or (not whole and all(layer.share > 0.9995 for layer in least)):
        return
    rows = [["layers with the least share" if not whole else "layer", "shape", "rank", "of", "‖ΔW‖", "share"]]
    for layer in least:
        ranks_and_norm = [f"{layer.rank}", f"{layer.of_rank}", f"{layer.norm:.4g}"]
        rows.append([layer.module, shape_text(layer.shape), *ranks_and_norm, _percent(layer.share)])
    print_table(to, rows)
    if len(layers) > len(least):
        more = count(len(layers) - len(least), "more layer")
        to.print(f"{more}, with the same share or a higher one (-v)")


def _percent(share: float) -> str:
    """A share as a percentage; 100 % only where nothing is missing at the precision shown."""
    text = f"{share:.1%}"
    return text if share >= 1 or text != "100.0%" else "over 99.9%"


SHOWN_RESULTS = 5  # weights of a merge report


def print_plan(to: AnyConsole, plan: Plan, most: int | None = None) -> None:
    """Print what `dry_run` shows: the counts, the notes, and what is done to each weight, at most to so many."""
    lines = str(plan).splitlines()
    head = len(lines) - len(plan.steps)
    shown = lines if most is None else lines[: head + most]
    print_line(to, "\n".join(shown))
    if most and (more := len(lines) - len(shown)):
        print_line(to, f"  and {count(more, 'weight')} more (-v)")


def print_merge(to: AnyConsole, report: MergeReport, output: Path | None = None, *, whole: bool = False) -> None:
    """Print what a merge did in one line; the weights too with `whole`, or where rounding took over a tenth of one."""
    print_line(to, _merge_summary(report, output), style="bold")
    if whole or not all(result.arrived >= LOW_RETENTION for result in report.results):
        _print_retention(to, report)
    measured = {result.weight: result.outputs for result in report.results if result.outputs is not None}
    if measured:
        _print_outputs(to, measured, whole=whole)
    if report.layers:
        _print_layers(to, report, whole=whole)
    if report.quantisation:
        print_line(to, _quantisation_summary(report.quantisation))
    if report.quantisation and whole:
        _print_quantisation(to, report.quantisation)


def _print_first(
    to: AnyConsole, header: Sequence[str], rows: Sequence[Sequence[str]], others: str, marked: Iterable[int] = ()
) -> None:
    print_table(to, [header, *rows[:SHOWN_RESULTS]], marked)
    if len(rows) > SHOWN_RESULTS:
        print_line(to, f"{count(len(rows) - SHOWN_RESULTS, 'more weight')}, with {others}")


def _print_retention(to: AnyConsole, report: MergeReport) -> None:
    # NaN comes first: a weight whose retention is not known needs attention most.
    results = sorted(report.results, key=lambda result: -math.inf if math.isnan(result.retention) else result.retention)
    header = ["weights with the lowest retention", "‖ΔW‖/‖W‖", "retention", "noise", "entries changed"]
    low = {number for number, result in enumerate(results, 1) if not result.retention >= LOW_RETENTION}
    _print_first(to, header, [_result_row(result) for result in results], "the same retention or a higher one", low)


def _print_outputs(to: AnyConsole, measured: Mapping[str, OutputResult], *, whole: bool) -> None:
    """What calibration did to the outputs of layers, beside what the nearest numbers do."""
    own, nearest = ([getattr(one, name) for one in measured.values()] for name in ("error", "nearest_error"))
    calibrated = sum(one.is_calibrated for one in measured.values())
    print_line(
        to,
        f"{calibrated} of {count(len(measured), 'layer')} calibrated; error of outputs on held-out inputs, relative "
        f"to the adapters' effect: {min(own):.3g} to {max(own):.3g}, with the nearest numbers {min(nearest):.3g} to "
        f"{max(nearest):.3g}",
    )
    header = ["layers with the largest output error", "output error", "nearest", "of the effect", "nearest"]
    worst = sorted(measured.items(), key=lambda pair: -pair[1].error)
    rows = [
        [name, *(f"{value:.3g}" for value in (one.error, one.nearest_error, one.retention, one.nearest_retention))]
        for name, one in worst
    ]
    if whole:
        _print_first(to, header, rows, "the same error or a smaller one")


def _print_layers(to: AnyConsole, report: MergeReport, *, whole: bool) -> None:
    """How many layers of a quantised base were kept, which were promoted and why, and the size beside the base's."""
    promoted = [layer for layer in report.layers if not layer.is_kept]
    kept = len(report.layers) - len(promoted)
    print_line(
        to,
        f"quantised layers with a change: {kept} kept in their scheme, {len(promoted)} promoted; "
        f"{decimal(report.bytes)}, {report.bytes / report.base_bytes:.2f} times the base",
    )
    header = ["layers that were promoted first", "scheme", "stored", "retention", "noise", "why"]
    figures = [
        [f"{value:.3g}" if value is not None else "-" for value in (each.retention, each.noise)]
        for each in report.layers
    ]
    shown = zip(report.layers, figures, strict=True)
    rows = [[each.weight, each.scheme, each.stored, *own, each.why] for each, own in shown if whole or not each.is_kept]
    if rows:
        _print_first(to, header, sorted(rows, key=lambda row: not row[-1]), "the same columns in the JSON document")


def _quantisation_summary(losses: Sequence[QuantisationLoss]) -> str:
    """The range of the errors, and how they compare with the changes of the adapters."""
    errors = [loss.relative_error for loss in losses]
    ratios = [loss.error / loss.change for loss in losses if loss.change]
    beside = f", ‖Q-W‖/‖ΔW‖ of {len(ratios)} of them: {min(ratios):.3g} to {max(ratios):.3g}" if ratios else ""
    weights = count(len(losses), "dequantised weight")
    return f"quantisation error ‖Q-W‖/‖W‖ of {weights}: {min(errors):.3g} to {max(errors):.3g}{beside}"


def _print_quantisation(to: AnyConsole, losses: Sequence[QuantisationLoss]) -> None:
    header = ["weights with the largest quantisation error", "scheme", "‖Q-W‖/‖W‖", "‖Q-W‖", "‖ΔW‖"]
    rows = []
    for loss in sorted(losses, key=lambda loss: -loss.relative_error):
        change = "-" if loss.change is None else f"{loss.change:.3g}"
        rows.append([loss.weight, loss.scheme, f"{loss.relative_error:.3g}", f"{loss.error:.3g}", change])
    _print_first(to, header, rows, "the same error or a smaller one")


def _merge_summary(report: MergeReport, output: Path | None) -> str:
    merged = f"{count(len(report.results), 'weight')} merged"
    if names := report.replaced_weights:
        merged += f", {count(len(names), 'tensor')} replaced ({first_of(names, SHOWN_RESULTS)})"
    speed = f" ({decimal(int(report.bytes / report.seconds))}/s)" if report.seconds > 0 else ""
    where = f" to {one_line(str(output))}" if output else ""
    return (
        f"{merged}; {decimal(report.bytes)} written{where} in {report.seconds:.2f} s{speed}, "
        f"{decimal(report.copied)} of them copied unchanged"
    )


def _result_row(result: StepResult) -> list[str]:
    changed = result.changed / result.elements if result.elements else math.nan
    figures = [f"{result.relative_change:.3g}", f"{result.retention:.4f}", f"{result.noise:.3g}", f"{changed:.1%}"]
    return [result.weight, *figures]
