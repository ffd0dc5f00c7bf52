"""The names of a graph's weights in a base checkpoint, by their content (`content_match`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from lora_export.errors import InputRefused, listed
from lora_export.graph.content_match import BaseView, ContentIndex, ContentMatch
from lora_export.graph.exporter_names import Named, folded_from, module_of_node, parameter_of
from lora_export.graph.site import NameSource, Site
from lora_export.plan import Layout
from lora_export.weights.checkpoint import Checkpoint


class _SiteNames(NamedTuple):
    """A site as the exporter names it and as the base names it. The same object where the base does not know it."""

    by_exporter: Site
    by_base: Site

    @property
    def is_in_base(self) -> bool:
        return self.by_base is not self.by_exporter

    @property
    def is_confirmed(self) -> bool:
        """Whether the base has this tensor under the exporter's name. A prefix may differ."""
        exporter, base = self
        return self.is_in_base and bool(exporter.name) and base.named_by is exporter.named_by


def name_by_base(sites: list[Site], checkpoint: Checkpoint) -> tuple[Named, list[Site], list[str]]:
    """Name sites by the content of the base. Returns named sites, unnamed sites, and names that the base lacks.

    Names are spelled as in the base. Several parameters in one packed weight become one site each. Raises InputRefused
    where the base has another tensor under an exporter's name.
    """
    # Only these: a convolution of a Mamba has thousands of outputs, and would count as so many experts.
    base = ContentIndex(checkpoint, {tuple(sorted(site.shape)) for site in sites if site.expert is not None})
    pairs = [_SiteNames(site, known) for site in sites for known in _sites_in_base(site, base)]
    _refuse_contradictions(pairs, base)
    named: Named = {}
    unnamed: list[Site] = []
    for site in _with_prefix(_without_tied_heads(pairs), *_prefix_change(pairs)):
        if site.name:
            named.setdefault(site.name, []).append(site)
        else:
            unnamed.append(site)
    missing = {pair.by_exporter.name for pair in pairs if pair.by_exporter.name and not pair.is_in_base}
    return named, unnamed, sorted(missing)


def _sites_in_base(site: Site, base: ContentIndex) -> Iterator[Site]:
    """A site as its name or its content identifies it in the base: one weight, or one for each block.

    Yields the unchanged site where the base has neither.
    """
    spelled = base.spelling_of(site.name)
    view = base.view_equal_to(spelled, site) if spelled else None
    if view is not None:
        yield replace(site, name=spelled, transposed=_is_transposed(site, view))
        return
    matches = list(base.matches(site))
    for match in matches:
        block = range(match.start, match.stop) if len(matches) > 1 else None
        views = _preferred_views(site, match, base)
        if len(views) == 1:
            (view,) = views
            transposed = _is_transposed(site, view)
            yield replace(site, name=view.name, named_by=NameSource.CONTENT, block=block, transposed=transposed)
        elif block is not None or (views and not site.name):
            equal_tensors = tuple(view.name for view in views)
            yield replace(site, name="", named_by=NameSource.NONE, block=block, equal_tensors=equal_tensors)
        else:
            yield site


def _refuse_contradictions(pairs: Iterable[_SiteNames], base: ContentIndex) -> None:
    """Raise InputRefused where the base has other content under an exporter's name."""
    contradictions: dict[Site, list[str]] = {}
    for pair in pairs:
        exporter, known = pair
        if exporter.name in base.matrices and not pair.is_confirmed:
            names = [known.name if pair.is_in_base else "", *known.equal_tensors]
            contradictions.setdefault(exporter, []).extend(filter(None, names))
    problems = [
        f"{site.location}: {site.name} by {site.named_by}, {' and '.join(others) or 'no tensor'} by content"
        for site, others in contradictions.items()
    ]
    if problems:
        raise InputRefused(
            f"{base.path} is not the base of this graph, or the weights of one of them have changed. {len(problems)} "
            f"weights of the graph differ from the tensors of the same name in the base:",
            listed(problems, 10),
        )


def _without_tied_heads(pairs: Sequence[_SiteNames]) -> Iterator[_SiteNames]:
    """Undo the content name of a linear layer that reads an embedding's table: a tied head.

    An adapter of the embedding changes the lookup and not the head.
    """
    embeddings = {known.name for _, known in pairs if known.layout is Layout.EMBEDDING and known.name}
    for exporter, known in pairs:
        if known.is_linear and known.named_by is NameSource.CONTENT and known.name in embeddings:
            equal_tensors = () if exporter.name else (known.name,)
            yield _SiteNames(exporter, replace(exporter, equal_tensors=equal_tensors))
        else:
            yield _SiteNames(exporter, known)


def _prefix_change(pairs: Iterable[_SiteNames]) -> tuple[str, str]:
    """The prefix to remove from an exporter's name and the one to add, where all confirmed names agree.

    Two empty strings where they do not.
    """
    changes = set()
    for exporter, known in (pair for pair in pairs if pair.is_confirmed):
        longer, shorter = sorted((exporter.name, known.name), key=len, reverse=True)
        prefix = longer.removesuffix(shorter)
        changes.add((prefix, "") if longer == exporter.name else ("", prefix))
    return changes.pop() if len(changes) == 1 else ("", "")


def _with_prefix(pairs: Iterable[_SiteNames], removed: str, added: str) -> Iterator[Site]:
    """The sites by the base. Names that it lacks get the prefix of all others."""
    for exporter, known in pairs:
        is_unchanged = known.name and known.name == exporter.name and known.name.startswith(removed)
        yield replace(known, name=added + known.name.removeprefix(removed)) if is_unchanged else known


def _is_transposed(site: Site, view: BaseView) -> bool | None:
    """Whether the base's parameter is the transpose of the stored matrix. None for other weights than matrices."""
    return view.is_transposed is (site.layout is not Layout.IN_OUT) if site.is_linear else None


def _preferred_views(site: Site, match: ContentMatch, base: ContentIndex) -> list[BaseView]:
    """Of equal tensors, the one that the exporter's records name, where they name exactly one."""
    if len(match.views) < 2:
        return list(match.views)
    module = module_of_node(site.node)[0]
    recorded = {site.name, parameter_of(site.value)[0], f"{module}.weight" if module else ""}
    recorded |= set(folded_from(site.value))
    names = {base.spelling_of(name) for name in recorded if name}
    preferred = [view for view in match.views if view.name in names]
    return preferred if len(preferred) == 1 else list(match.views)
