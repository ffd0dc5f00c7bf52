"""The contract of everything that runs a model, and the record of where its nodes ran."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from lora_export.errors import EnvironmentLacking
from lora_export.runtime.environment import PROVIDERS

Arrays = dict[str, NDArray[Any]]

# What has to run on the provider that was asked for. Shape arithmetic is put on the CPU on purpose.
COMPUTE = frozenset(
    {
        *("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Conv", "FusedConv", "ConvTranspose", "Einsum", "MatMulNBits"),
        *("MatMulInteger", "QLinearMatMul", "QLinearConv", "Attention", "MultiHeadAttention", "GroupQueryAttention"),
        *("PackedAttention", "QAttention", "LayerNormalization", "SimplifiedLayerNormalization"),
        *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "BatchNormalization", "GroupNorm"),
        *(
            "InstanceNormalization",
            "RMSNormalization",
            "EmbedLayerNormalization",
            "Softmax",
            "Gelu",
            "FastGelu",
            "LSTM",
        ),
        "GRU",
    }
)


class Runner(Protocol):
    """Something that answers inputs with outputs, both by name."""

    @property
    def axes(self) -> Mapping[str, tuple[int | None, ...]]: ...  # input -> sizes, None where they vary; {} if unknown
    @property
    def names_known(self) -> bool: ...  # whether the outputs' names mean something, or only their order does

    def run(self, inputs: Arrays) -> Arrays: ...


@dataclass(frozen=True)
class Placement:
    """Which provider ran which node, as onnxruntime's own assignment tells it."""

    requested_provider: str  # the provider's full name
    by_provider: Mapping[str, tuple[tuple[str, str], ...]]  # provider -> (node, operator) ...
    options: Mapping[str, str]
    version: str

    @property
    def operators(self) -> frozenset[str]:
        """What kinds of nodes there are, after the runtime's own fusions."""
        return frozenset(operator for nodes in self.by_provider.values() for _, operator in nodes)

    @property
    def compute(self) -> int:
        """How many nodes of the kinds that matter there are."""
        return sum(operator in COMPUTE for nodes in self.by_provider.values() for _, operator in nodes)

    @property
    def off_provider(self) -> tuple[tuple[str, str, str], ...]:
        """(provider, node, operator) of compute nodes that ran elsewhere."""
        return tuple(
            (provider, node, operator)
            for provider, nodes in self.by_provider.items()
            for node, operator in nodes
            if provider != self.requested_provider and operator in COMPUTE
        )

    def insist(self) -> None:
        """Raise EnvironmentLacking unless the asked provider did all the work."""
        if self.off_provider:
            some = ", ".join(f"{node} ({operator}) on {where}" for where, node, operator in self.off_provider[:5])
            raise EnvironmentLacking(
                f"{self.requested_provider} was asked for, but {len(self.off_provider)} of {self.compute} compute "
                f"nodes ran elsewhere: {some}"
            )
        if self.requested_provider != PROVIDERS["cpu"] and not self.by_provider.get(self.requested_provider):
            raise EnvironmentLacking(
                f"{self.requested_provider} was asked for, and onnxruntime tells of no node that ran on it"
            )
