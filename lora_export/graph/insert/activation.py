"""Adapters that act on some tokens only: from the last occurrence of their invocation tokens on (aLoRA).

The graph finds the tokens in its `input_ids`, with operators that every runtime has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from lora_export.errors import InputRefused
from lora_export.graph.cache_names import IDS
from lora_export.graph.insert.batch_axis import infer_shapes, value_before_reshape
from lora_export.graph.insert.node_factory import Dim, NodeFactory, NodeList, layer_input, sizes_of
from lora_export.graph.site import Site
from lora_export.options.spelling import named
from lora_export.plan import Plan

_MIN_OPSET = 13  # Unsqueeze takes its axes as an input
_PATH = "/active_tokens"
_BOOL = ir.DataType.BOOL
_Invocation = tuple[int, ...]


class ActiveTokens:
    """The tokens on which each adapter of a plan acts, as values of a graph: 1 or 0, (batch, tokens, 1).

    Raises InputRefused for a graph that has no whole texts as `input_ids`.
    """

    def __init__(self, factory: NodeFactory, plan: Plan):
        self.factory = factory
        self.invocations = {one.name: one.invocation_tokens for one in plan.adapters if one.invocation_tokens}
        self.by_invocation: dict[_Invocation, ir.Value] = {}
        self.gates: dict[tuple[_Invocation, str, bool], ir.Value] = {}
        if self.invocations:
            factory.require_opset(_MIN_OPSET, "an adapter that acts on some tokens only")
            self.ids = _ids_of(factory.model)

    def acts_on_some(self, adapter: str) -> bool:
        """Whether an adapter acts on some tokens only."""
        return adapter in self.invocations

    def gate(self, site: Site, adapter: str) -> ir.Value:
        """What x·A of a linear layer is multiplied by, for an adapter that acts on some tokens only.

        It is (batch, tokens, 1), or (batch * tokens, 1) where the layer's input is flattened. Raises InputRefused where
        the layer's input does not have the tokens of the texts.
        """
        invocation, is_flat = self.invocations[adapter], self._is_flat(site)
        key = invocation, site.dtype, is_flat
        if key not in self.gates:
            self.gates[key] = self._made(*key)
        return self.gates[key]

    def _made(self, invocation: _Invocation, dtype: str, is_flat: bool) -> ir.Value:
        if invocation not in self.by_invocation:
            nodes = NodeList(self.factory, _PATH)
            self.by_invocation[invocation] = _active(nodes, self.ids, invocation)
            self.factory.model.graph.insert_before(self.factory.model.graph[0], nodes.nodes)
        active = self.by_invocation[invocation]
        nodes = NodeList(self.factory, _PATH)
        gate = nodes.cast(active, ir.DataType.from_numpy(np.dtype(dtype)))
        if is_flat:
            gate = nodes.add("Reshape", [gate, self.factory.constant(_PATH, "rows", np.array([-1, 1]))], None)
        if nodes.nodes:
            nodes.insert_behind(active)
        return gate

    def _is_flat(self, site: Site) -> bool:
        """Whether the tokens of all texts are the rows of a layer's input. Raises InputRefused for other inputs."""
        x = layer_input(site)
        if x.shape is None:
            infer_shapes(self.factory.model)
        if site.is_linear and not site.is_convolution and not site.node.attributes.get_int("transA", 0):
            if self._has_tokens(x) and len(sizes_of(x)) == 3:
                return False
            before = value_before_reshape(x)
            if before is not None and self._has_tokens(before) and _flattens_tokens(before, x):
                return True
        raise InputRefused(
            f"{site.name}: an activated LoRA acts beside linear layers on (batch, tokens, features). The input of "
            f"{site.node.op_type} is {x.shape}"
        )

    def _has_tokens(self, value: ir.Value) -> bool:
        """Whether the first dimensions of a value are those of the ids, for certain."""
        own: list[Dim] = [] if value.shape is None else list(value.shape)[:2]
        are_known = all(isinstance(size, int) or size.value is not None for size in own)
        return are_known and own == sizes_of(self.ids)


def _flattens_tokens(before: ir.Value, x: ir.Value) -> bool:
    """Whether the features of (batch, tokens, ...) are the rows of x: those of one token are one row."""
    features = sizes_of(before)[2:]
    if x.shape is None or not all(isinstance(size, int) for size in features):
        return False
    return len(x.shape) == 2 and sizes_of(x)[1] == math.prod(size for size in features if isinstance(size, int))


def _ids_of(model: ir.Model) -> ir.Value:
    """The input with the token ids, (batch, tokens)."""
    inputs: Mapping[str, ir.Value] = {str(value.name): value for value in model.graph.inputs}
    if past := next((name for name in inputs if name.startswith("past")), None):
        raise InputRefused(
            f"an activated LoRA needs whole texts, and the graph takes a cache of earlier tokens (`{past}`), which "
            f"does not show where the invocation tokens were. Leave out {named('with_cache')} and {named('task')}"
        )
    ids = inputs.get(IDS)
    if ids is None or ids.shape is None or len(ids.shape) != 2:
        raise InputRefused(
            f"an activated LoRA (alora_invocation_tokens) finds its tokens in an input `{IDS}` of (batch, tokens). The "
            f"graph takes {', '.join(inputs)}"
        )
    return ids


def _active(nodes: NodeList, ids: ir.Value, invocation: _Invocation) -> ir.Value:
    """1 from the first token of the last occurrence of `invocation` on, else 0: float32 (batch, tokens, 1).

    One channel for each token of the invocation is 1 where this token is. A convolution by an identity adds up the
    channels, each one place further on: an occurrence begins where all are 1. An occurrence is the last one where as
    many begin up to here as in the whole row.
    """
    (batch, tokens), length = sizes_of(ids), len(invocation)

    def constant(name: str, array: object, dtype: type[np.generic]) -> ir.Value:
        return nodes.factory.constant(_PATH, name, np.asarray(array, dtype))

    assert ids.dtype is not None
    wanted = constant("invocation", np.reshape(invocation, (length, 1)), ids.dtype.numpy().type)
    by_row = nodes.add("Unsqueeze", [ids, constant("axis", [1], np.int64)], [batch, 1, tokens])
    equal = nodes.add("Equal", [by_row, wanted], [batch, length, tokens], _BOOL)
    found = nodes.cast(equal, ir.DataType.FLOAT)
    diagonal = constant("diagonal", np.eye(length)[None], np.float32)
    count = nodes.add("Conv", [found, diagonal], [batch, 1, tokens], pads=[0, length - 1])
    begins = nodes.add("Greater", [count, constant("most", length - 0.5, np.float32)], [batch, 1, tokens], _BOOL)
    begins = nodes.cast(begins, ir.DataType.FLOAT)
    so_far = nodes.add("CumSum", [begins, constant("along", 2, np.int64)], [batch, 1, tokens])
    whole = nodes.add("Gather", [so_far, constant("last", [-1], np.int64)], [batch, 1, 1], axis=2)
    is_last = nodes.add("Equal", [so_far, whole], [batch, 1, tokens], _BOOL)
    is_any = nodes.add("Greater", [whole, constant("none", 0.5, np.float32)], [batch, 1, 1], _BOOL)
    active = nodes.add("And", [is_last, is_any], [batch, 1, tokens])
    return nodes.add("Transpose", [nodes.cast(active, ir.DataType.FLOAT)], [batch, tokens, 1], perm=[0, 2, 1])
