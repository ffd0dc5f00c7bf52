"""Writes into parts of a tensor (`x[:, 1:] = y`) in an exported program, as operators that return the whole tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

# An operator that returns a part -> the one that returns the whole with another part; it takes the same arguments.
WHOLE_OF: Mapping[Any, Any] = {
    torch.ops.aten.slice.Tensor: torch.ops.aten.slice_scatter.default,
    torch.ops.aten.select.int: torch.ops.aten.select_scatter.default,
}


def return_whole(graph: Graph, is_new: Callable[[Node], bool]) -> None:
    """Exchange each write into a part of a tensor whose memory nothing else reads.

    `is_new` tells whether a node returns memory of its own, and writes into no other.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        _return_whole(node, is_new)


def _return_whole(write: Node, is_new: Callable[[Node], bool]) -> None:
    part, source = write.args[:2]
    if not isinstance(part, Node) or not isinstance(source, Node) or write.users or not _are_alike(part, source):
        return
    parts: list[Node] = []
    whole = part
    while whole.target in WHOLE_OF and list(whole.users) == [parts[-1] if parts else write]:
        parts.append(whole)
        whole = whole.args[0]  # type: ignore[assignment]
    readers = [user for user in whole.users if user is not (parts[-1] if parts else write)]
    if not parts or not is_new(whole) or any(user.op == "output" for user in readers):
        return
    if not all(write < user or _ends_before(user, write, is_new) for user in readers):
        return
    changed = source
    for each in parts:
        outer: Any = each.args[0]
        with write.graph.inserting_before(write):
            changed = write.graph.call_function(WHOLE_OF[each.target], (outer, changed, *each.args[1:]), each.kwargs)
        changed.meta = dict(outer.meta)
    whole.replace_all_uses_with(changed, delete_user_cb=lambda user: write < user)
    for node in (write, *parts[:1]):  # the outer parts are read by what takes the place of the inner one
        write.graph.erase_node(node)


def _are_alike(one: Node, other: Node) -> bool:
    """Whether two nodes return tensors of one shape and dtype: a write would convert and repeat others."""
    values = one.meta.get("val"), other.meta.get("val")
    if not all(isinstance(each, torch.Tensor) for each in values):
        return False
    return str(values[0].shape) == str(values[1].shape) and values[0].dtype == values[1].dtype  # type: ignore[union-attr]


def _ends_before(reader: Node, write: Node, is_new: Callable[[Node], bool]) -> bool:
    """Whether nothing reads, through this node, what is written later."""
    return reader < write and (is_new(reader) or all(_ends_before(user, write, is_new) for user in reader.users))
