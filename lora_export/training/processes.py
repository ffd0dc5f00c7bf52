"""The processes of one training, started by `accelerate launch` or `torchrun`. A training of one process is the rule.

Only A, B and what is saved whole have gradients: they fit into one buffer, which is summed once a step. The model needs
no wrapper for that.

A frozen base may be in shares (FSDP, by PyTorch's `fully_shard`): each process keeps its share of every block's
weights, and gathers the others while the block computes, forwards and backwards. What is trained stays whole.
"""

from __future__ import annotations

import atexit
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn

from lora_export.errors import InputRefused, WrongUsage
from lora_export.layers.frozen_linear import is_4bit
from lora_export.layers.module_tensors import is_in_shares
from lora_export.models.stored_parameter import read_stored
from lora_export.options.spelling import named

if dist.is_available():
    # Its functions take the group as their default, if there is one when it is imported, and keep it alive.
    import torch.distributed.nn.functional

# Variables of a launcher -> how it would distribute a model, which only accelerate's wrappers can train then
SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}


def refuse_sharding() -> None:
    """Raise WrongUsage where a launcher asks for a base that is distributed over the processes."""
    wanted = [name for variable, name in SHARDING.items() if os.environ.get(variable, "").lower() in ("true", "1")]
    if wanted:
        raise WrongUsage(
            f"accelerate is configured for {', '.join(wanted)}, which this training does not use. Launch it as "
            f"plain data parallelism, or with torchrun. {named('shard_base', True)} shares the frozen weights among "
            f"the processes (FSDP), and a base in 4 bits takes an eighth of the memory: {named('quantize_base', 'nf4')}"
        )


def leave_at_exit() -> None:
    """Leave the group of processes when this one ends: a process in which its threads still run is aborted."""
    if dist.is_available() and dist.is_initialized():
        atexit.unregister(_leave)
        atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():  # the user's own program may have left it
        dist.destroy_process_group()


def world_size() -> int:
    """How many processes train."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of the processes this is: 0 writes files and messages."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_processes(values: Sequence[float], device: torch.device | str) -> list[float]:
    """The sums of these numbers over all processes, in fp64."""
    if world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return [float(value) for value in tensor]


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all processes, in place. A parameter without a gradient counts as zero."""
    if world_size() == 1:
        return
    trained = list(parameters)
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for parameter in trained:
        assert parameter.grad is not None
        by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def take_from_first(tensors: Iterable[torch.Tensor], device: torch.device | str) -> None:
    """Copy the values of process 0 into these tensors of every process, in place, by way of the training's device."""
    if world_size() > 1:
        for tensor in tensors:
            moved = tensor.to(device)
            dist.broadcast(moved, src=0)
            tensor.copy_(moved)


def wait_for_all() -> None:
    """Wait until every process has come here."""
    if world_size() > 1:
        dist.barrier()


LEAST_BLOCKS = 2


def shard_base(module: nn.Module, device: str) -> None:
    """Leave to each process its share of the frozen weights of every block, in place, on this device.

    A block is an entry of a model's outermost nn.ModuleLists: the layers of a transformer. What is outside of them,
    such as embeddings and the head, stays whole, and so does every parameter that is trained. All processes must run
    the module equally often from then on. Weights that are read from a file when they are needed are read here, one
    block at a time.

    Raises InputRefused for a module without such blocks, and for weights of 4 bits.
    """
    lists = list(_outermost_lists(module))
    if not lists:
        raise InputRefused(
            "the base has no blocks whose weights the processes could share: a module with an nn.ModuleList of "
            f"layers has. Leave out {named('shard_base', True)}"
        )
    if any(is_4bit(parameter) for parameter in module.parameters()):
        raise InputRefused(
            "weights of 4 bits are not shared by processes: leave out "
            f"{named('shard_base', True)} or {named('quantize_base')}"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # takes a second to import

    mesh = init_device_mesh(device, (world_size(),))
    for parent, blocks in lists:
        for block in blocks:
            read_stored(block)
            trained = {parameter for parameter in block.parameters() if parameter.requires_grad}
            fully_shard(block, mesh=mesh, ignored_params=trained)
        if parent is not module:  # whose class has to stay
            # The parent has no weights in shares. It lets the next block be gathered while one computes.
            others = {parameter for parameter in parent.parameters() if not is_in_shares(parameter)}
            fully_shard(parent, mesh=mesh, ignored_params=others)
    read_stored(module)
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if not is_in_shares(tensor):
            tensor.data = tensor.data.to(device)


def move(module: nn.Module, device: torch.device | str) -> None:
    """Move a module to a device, in place. A base in shares is on its device already."""
    if not is_sharded(module):
        module.to(device)


def is_sharded(module: nn.Module) -> bool:
    """Whether the processes share the module's weights, so that all must run it equally often."""
    return any(map(is_in_shares, module.parameters()))


def _outermost_lists(module: nn.Module) -> Iterator[tuple[nn.Module, Sequence[nn.Module]]]:
    """Each module that has a list of blocks, and the blocks."""
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) >= LEAST_BLOCKS:
            yield module, list(child)
        else:
            yield from _outermost_lists(child)
