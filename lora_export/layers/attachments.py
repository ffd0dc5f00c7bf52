"""What is attached to the layers of a module, and the weights that its code then reads.

Code that reads `.weight` or `.in_proj_weight` directly gets W + ΔW, with DoRA multiplied by
m / ‖W + factor * scale * B A‖. The fast path of nn.TransformerEncoderLayer and nn.MultiheadAttention do so. A and B are
stored in fp32 (fp64 for fp64 weights). Sums are computed in their dtype, and rounded once to the dtype of the layer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lora_export.errors import InputRefused
from lora_export.layers.frozen_experts import ExpertPairs
from lora_export.layers.frozen_linear import float_weight
from lora_export.layers.module_tensors import CONVOLUTION_TYPES, conv1d, is_in_shares, layout_of, oriented, tensor_name
from lora_export.layers.torch_internals import computes_by_groups, own_buffers, own_modules, own_parameters
from lora_export.lora import EVERY_ROW
from lora_export.pairs.exact_transforms import exact_change
from lora_export.pairs.transforms import WeightTransform
from lora_export.plan import Layout, StoredRegion

ATTACHMENT = "_lora_export"  # the key of an Attachment in the __dict__ of its module
BRANCH_PARTS = ("lora_A", "lora_B", "lora_magnitude")  # the nn.ParameterDicts that hold a layer's branches
LEAST_OF_AN_EXPERT = 1 << 16  # weights: with fewer, a product for each expert takes longer than one sum for all
TRAINED_ROWS, ROW_INDICES = "lora_rows", "lora_row_indices"  # of a table: a parameter, and a buffer of their indices


@dataclass(frozen=True)
class Branch:
    """One pair beside one weight."""

    adapter: str
    module: str  # the adapter's own name for the layer
    weight: str  # the attribute of the layer
    parameter: str  # the key of A in the layer's `lora_A`, of B in `lora_B`, of DoRA's magnitude in `lora_magnitude`
    scale: float  # the pair's scale times the adapter's strength
    layout: Layout
    dora: bool
    region: StoredRegion | None = field(default=None, compare=False)  # of the weight, where it changes a part alone
    frozen: bool = False  # not trained; its x is not dropped
    transform: WeightTransform | None = field(default=None, compare=False)  # in place of A and B
    invocation: tuple[int, ...] = ()  # it acts from the last occurrence of these tokens on; empty: on all


@dataclass(frozen=True)
class ReplacedTensor:
    """A tensor that replaces one of the base. Without names, it is the base's own with some rows changed."""

    adapter: str
    name: str  # the adapter's own name for it
    attribute: str  # of the layer
    base: Tensor  # the tensor that it replaces


@dataclass(frozen=True)
class TrainedRows:
    """Rows of a table that are trained alone."""

    adapter: str
    name: str  # the adapter's own name for the table


@dataclass
class Attachment:
    """All that `attach` changed in one module, for `detach` to undo."""

    original: type[nn.Module]
    branches: tuple[Branch, ...] = ()
    replaced: tuple[ReplacedTensor, ...] = ()
    rows: TrainedRows | None = None
    factor: float = 1.0  # `scale_adapters` changes it
    dropout: float = 0.0  # of what A gets, in train mode
    is_on: Mapping[Branch, Tensor] = field(default_factory=dict)  # bools that `switched_branches` gives


# The functions below read the owner's dictionaries. An AttributeError inside a property would make
# nn.Module.__getattr__ return the base's tensor, and the adapter would silently be missing.


def is_attached(owner: nn.Module) -> bool:
    """Whether `attach` has changed this one module."""
    return ATTACHMENT in owner.__dict__


def attachment_of(owner: nn.Module) -> Attachment:
    """The attachment of a module. Raises KeyError unless `is_attached`."""
    found: Attachment = owner.__dict__[ATTACHMENT]
    return found


def attached_modules(module: nn.Module) -> list[nn.Module]:
    """Every module below (and with) this one that has an attachment. Raises InputRefused where none has."""
    owners = [owner for owner in module.modules() if is_attached(owner)]
    if not owners:
        raise InputRefused("no adapter is attached to this module")
    return owners


def branch_parameter(owner: nn.Module, part: str, branch: Branch) -> Tensor:
    """The A, B or magnitude of a branch, by the `part` (see BRANCH_PARTS)."""
    found: Tensor = cast(nn.ParameterDict, own_modules(owner)[part])[branch.parameter]
    return found


def low_rank_factors(owner: nn.Module, branch: Branch) -> tuple[Tensor, Tensor]:
    """A (rank, in, ...) and B (out, rank, 1...)."""
    return branch_parameter(owner, "lora_A", branch), branch_parameter(owner, "lora_B", branch)


def branch_tensors(module: nn.Module) -> list[Tensor]:
    """The A, B and magnitudes of all branches below a module, trained or frozen."""
    parts = [own_modules(owner).get(part) for owner in attached_modules(module) for part in BRANCH_PARTS]
    return [parameter.data for part in parts if part is not None for parameter in part.parameters()]


def adapted_weight(owner: nn.Module, attribute: str) -> Tensor | None:
    """W + ΔW in the layout and dtype of W. Computed in the dtype of A, rescaled for DoRA, rounded once.

    Of a W in shares, the share: PyTorch reads it here, and nothing computes with it. Where a branch of it is switched
    by a tensor, or acts on some tokens only, a tensor of the same shape and dtype without values, with which PyTorch
    refuses to compute.
    """
    weight = own_parameters(owner)[attribute]
    if weight is not None and is_in_shares(weight):
        return weight
    attachment = attachment_of(owner)
    if weight is not None and attachment.rows is not None:  # never with branches
        rows, indices = trained_rows(owner)
        return weight.index_copy(0, indices, rows.to(weight.dtype))
    branches = [branch for branch in attachment.branches if branch.weight == attribute]
    if weight is None or not branches or not attachment.factor:
        return weight
    if not attachment.is_on.keys().isdisjoint(branches) or any(branch.invocation for branch in branches):
        return torch.empty(weight.shape, dtype=weight.dtype, device="meta")  # there would be a W for each row or token
    if branches[0].transform is not None:
        return _transformed(owner, weight, branches[0], branches[0].transform)
    if branches[0].region is not None:
        return _sum_of_parts(owner, weight, branches).to(weight.dtype)
    total = weight_sum(owner, weight, branches)  # (out, in, ...)
    for branch in branches:
        if branch.dora:
            total = total * per_output(dora_factor(owner, branch, total), total.ndim)
    return oriented(total, branches[0].layout).to(weight.dtype)


def _transformed(owner: nn.Module, weight: Tensor, branch: Branch, transform: WeightTransform) -> Tensor:
    """W + factor * scale * (T(W) - W) in the layout and dtype of W, computed in fp64 and rounded once."""
    record_branch(branch)
    before = oriented(weight.detach().double(), branch.layout)
    change, _ = exact_change(transform, before.cpu().numpy())
    total = before + torch.from_numpy(change).to(before.device) * (attachment_of(owner).factor * branch.scale)
    return oriented(total, branch.layout).to(weight.dtype)


def _sum_of_parts(owner: nn.Module, weight: Tensor, branches: Sequence[Branch]) -> Tensor:
    """W + ΔW in the dtype of A, in the shape of W. Each branch changes a part of W.

    Whole blocks of rows, such as experts, are summed by one product for all of them. A sum for each part would copy the
    gradient of the whole W as often as there are parts.
    """
    factor, dtype = attachment_of(owner).factor, low_rank_factors(owner, branches[0])[0].dtype
    total = weight.to(dtype).contiguous()
    with _without_autocast(total.device.type):
        for blocks in _blocks_of_rows(owner, branches):
            total = _sum_of_blocks(owner, total, blocks, factor * blocks[0].scale)
        if rest := [branch for branch in branches if not _is_block_of_rows(branch)]:
            total = total.clone() if total is weight else total
        for branch in rest:
            a, b = low_rank_factors(owner, branch)
            part_of(total, _region(branch)).add_(oriented(b @ a, branch.layout), alpha=factor * branch.scale)
    return total


def _without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """A sum in half precision would lose the change. Where autocast is off, a traced program gets no operator of it."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _is_block_of_rows(branch: Branch) -> bool:
    """Whether W can be cut into blocks of equal sizes, of which the branch changes one."""
    region = _region(branch)
    rows = region.cut_shape[0]
    return region.columns == EVERY_ROW and region.rows.start % rows == 0 and region.shape[0] % rows == 0


def _region(branch: Branch) -> StoredRegion:
    assert branch.region is not None
    return branch.region


def _blocks_of_rows(owner: nn.Module, branches: Sequence[Branch]) -> list[list[Branch]]:
    """The branches of blocks of rows, together where one product computes them: of one shape, layout and scale."""
    found: dict[Any, list[Branch]] = {}
    for branch in filter(_is_block_of_rows, branches):
        a, b = low_rank_factors(owner, branch)
        found.setdefault((a.shape, b.shape, _region(branch).shape, branch.layout, branch.scale), []).append(branch)
    return list(found.values())


def _sum_of_blocks(owner: nn.Module, total: Tensor, branches: Sequence[Branch], scale: float) -> Tensor:
    """W + scale * B A, in the shape of W: A and B of all blocks of rows in two stacks."""
    first = _region(branches[0])
    numbers, a, b = _stacked(owner, branches, total.dtype)
    left, right = (a.mT, b.mT) if branches[0].layout.is_transposed else (b, a)
    blocks = total.view(-1, first.cut_shape[0], first.shape[1])
    if numbers == list(range(len(blocks))):
        return torch.baddbmm(blocks, left, right, alpha=scale).view(total.shape)
    index = torch.tensor(numbers, device=total.device)
    return blocks.index_add(0, index, torch.bmm(left, right), alpha=scale).view(total.shape)


def _stacked(owner: nn.Module, branches: Sequence[Branch], dtype: torch.dtype) -> tuple[list[int], Tensor, Tensor]:
    """The numbers of blocks of rows, in order, with the stacks of their A and B."""
    ordered = sorted(branches, key=lambda branch: _region(branch).rows.start)
    numbers = [_region(branch).rows.start // _region(branch).cut_shape[0] for branch in ordered]
    factors = [low_rank_factors(owner, branch) for branch in ordered]
    a, b = (torch.stack(side).to(dtype) for side in zip(*factors, strict=True))
    return numbers, a, b


def pairs_of_experts(owner: nn.Module, attribute: str) -> ExpertPairs | None:
    """The pairs of a frozen weight (experts, out, in) in training, where each expert has one, and all have one scale.

    None on a GPU and in half precision, where another product of experts is faster.
    """
    attachment, weight = attachment_of(owner), own_parameters(owner)[attribute]
    branches = [branch for branch in attachment.branches if branch.weight == attribute]
    if weight is None or not branches or not attachment.factor or attachment.is_on or is_recording():
        return None
    if not computes_by_groups(owner):  # code of others may do with a weight what its subclass does not see
        return None
    if weight.requires_grad or is_in_shares(weight) or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    if not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return None
    regions = [branch.region for branch in branches]
    whole = weight.ndim == 3 and all(one is not None and one.cut_shape == weight.shape[1:] for one in regions)
    if not whole or branches[0].layout.is_transposed or weight[0].numel() < LEAST_OF_AN_EXPERT:
        return None
    if len(_blocks_of_rows(owner, branches)) != 1 or any(branch.frozen for branch in branches):
        return None
    numbers, a, b = _stacked(owner, branches, weight.dtype)
    is_each = numbers == list(range(len(weight))) and a.requires_grad
    return ExpertPairs(weight, a, b, attachment.factor * branches[0].scale) if is_each else None


def trained_rows(owner: nn.Module) -> tuple[Tensor, Tensor]:
    """The rows that are trained (count, width), and their indices (count,)."""
    rows, indices = own_parameters(owner)[TRAINED_ROWS], own_buffers(owner)[ROW_INDICES]
    assert rows is not None and indices is not None
    return rows, indices


def part_of(tensor: Tensor, region: StoredRegion) -> Tensor:
    """A view of a part of a contiguous tensor."""
    return tensor.view(region.shape)[region.rows, region.columns]


def weight_sum(owner: nn.Module, weight: Tensor, branches: Sequence[Branch]) -> Tensor:
    """W + ΔW as (out, in, ...), in the dtype of A, before DoRA rescales it."""
    changes, factor = [], attachment_of(owner).factor
    for branch in branches:
        record_branch(branch)
        a, b = low_rank_factors(owner, branch)
        product = b.flatten(1) @ a.flatten(1)
        changes.append(product.mul_(factor * branch.scale).reshape(b.shape[0], *a.shape[1:]))
    change = sum(changes[1:], start=changes[0])
    total: Tensor = change.add_(oriented(float_weight(weight, change.dtype), branches[0].layout).to(change.dtype))
    return total


def where_on(owner: nn.Module, branch: Branch, changed: Tensor, unchanged: Tensor) -> Tensor:
    """What a layer computes with a branch; what it computes without it where the branch is switched off."""
    is_on = attachment_of(owner).is_on.get(branch)
    return changed if is_on is None else torch.where(is_on, changed, unchanged)


def dora_factor(owner: nn.Module, branch: Branch, total: Tensor) -> Tensor:
    """DoRA's factor for each output (out,): m / ‖W + ΔW‖. No gradient flows through the norm."""
    norm: Tensor = torch.linalg.vector_norm(total.detach().flatten(1), dim=1)
    return branch_parameter(owner, "lora_magnitude", branch) / norm


# Where a context asks for it, the branches that are computed. A proof must know which pairs its inputs reach.
_RECORDED: ContextVar[set[Branch] | None] = ContextVar("_RECORDED", default=None)


@contextlib.contextmanager
def recorded_branches() -> Iterator[set[Branch]]:
    """The branches that are computed while the context is active, for at least one row of input."""
    branches: set[Branch] = set()
    token = _RECORDED.set(branches)
    try:
        yield branches
    finally:
        _RECORDED.reset(token)


def is_recording() -> bool:
    """Whether a context asks for the branches that are computed. In a module that torch.compile traces, none does."""
    return not torch.compiler.is_compiling() and _RECORDED.get() is not None


def record_branch(branch: Branch) -> None:
    """Add a branch to the recorded ones, where a context asks for them."""
    if not torch.compiler.is_compiling() and (recorded := _RECORDED.get()) is not None:
        recorded.add(branch)


def per_output(values: Tensor, dimensions: int) -> Tensor:
    """Reshape one value per output (out,) to (out, 1, ...) with so many dimensions."""
    return values.reshape(-1, *[1] * (dimensions - 1))


def adapted_bias(owner: nn.Module) -> Tensor | None:
    """The bias plus the adapters' shift, rounded once to the dtype of the bias.

    Raises AttributeError where the owner has no such parameter, which is then looked up as without adapters.
    """
    if "bias" not in own_parameters(owner):
        raise AttributeError("bias")
    bias, shift = own_parameters(owner)["bias"], own_buffers(owner).get("lora_shift")
    factor, branches = attachment_of(owner).factor, attachment_of(owner).branches
    for branch in branches:
        if branch.weight == "bias" and branch.transform is not None and bias is not None and factor:
            return _transformed(owner, bias, branch, branch.transform)
    if bias is None or shift is None or not factor:
        return bias
    return (bias.to(shift.dtype) + factor * shift).to(bias.dtype)


# --- Weights that are only multiplied by an input, so that each product can be observed by itself ---


class MatrixWeight(NamedTuple):
    """The weight W of a layer that returns x Wᵀ of one input, with a bias at most."""

    name: str
    owner: nn.Module  # the module that holds the tensor
    attribute: str
    layout: Layout
    attention: nn.MultiheadAttention | None = None  # the module that computes with W, if its owner is never called

    @property
    def tensor(self) -> Tensor:
        """The stored tensor, without adapters."""
        return cast(Tensor, own_parameters(self.owner)[self.attribute])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in), a convolution's kernel flattened."""
        first, *others = self.tensor.shape
        return (math.prod(others), first) if self.layout.is_transposed else (first, math.prod(others))

    @property
    def has_bias(self) -> bool:
        return own_parameters(self.owner).get(self._bias) is not None

    @property
    def bias(self) -> Tensor | None:
        """(out,), with the shift of the adapters."""
        return cast(Tensor, getattr(self.owner, self._bias)) if self.has_bias else None

    @property
    def _bias(self) -> str:
        return "in_proj_bias" if self.attribute == "in_proj_weight" else "bias"


def find_matrix_weights(module: nn.Module) -> list[MatrixWeight]:
    """The weights of linear layers, convolutions, embeddings and attention projections, attached or not.

    A tied tensor is listed once, under its first name. A subclass with a `forward` of its own is left out.
    """
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding, *CONVOLUTION_TYPES, *conv1d())
    known = {kind.forward for kind in kinds}
    parents = {child: parent for parent in module.modules() for child in parent.children()}
    found = []
    for path, owner in module.named_modules():
        original = attachment_of(owner).original if is_attached(owner) else type(owner)
        attention = owner if isinstance(owner, nn.MultiheadAttention) else parents.get(owner)
        attention = attention if isinstance(attention, nn.MultiheadAttention) else None
        attribute = "in_proj_weight" if attention is owner else "weight"
        if (attention is owner or original.forward in known) and own_parameters(owner).get(attribute) is not None:
            layout = layout_of(owner, attribute)
            found.append(MatrixWeight(tensor_name(path, attribute), owner, attribute, layout, attention))
    return found
