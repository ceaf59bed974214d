"""Many GPUs: torchrun starts a process per GPU, and each takes whole prompt groups of a step.

torch.distributed appears here alone, and one process never touches it.

Rank r of W takes prompts r, r + W, r + 2W, ...: so neighbouring prompts are spread over the ranks, and
`updates` equal shares of a rank's prompts are, over all ranks, the same shares that one process would
take.
"""

import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from einops import rearrange
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from common import ConfigError, loading

RANK = int(os.environ.get("RANK", 0))  # as torchrun sets them
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def pick_device(name):
    """config's `device` -> a torch device's name; under torchrun each process has a GPU of its own"""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    with loading(f"device: {name}"):
        torch.empty(0, device=name)  # is there such a device?
    if name.startswith("cuda"):
        torch.cuda.set_device(name)  # Triton launches on the current one
        torch.set_float32_matmul_precision("high")  # TF32: what is float32 here needs no more
    return name


@contextmanager
def meeting(device):
    """Inside, the ranks can talk. One that hangs ends the run after half an hour."""
    if WORLD > 1:
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    yield
    if WORLD > 1:
        dist.barrier()  # rank 0 has written
        dist.destroy_process_group()


def mine(values):
    """The values, one per prompt, that are this rank's: a slice"""
    if len(values) % WORLD:
        raise ConfigError(
            f"{len(values)} prompts on {WORLD} ranks; expected a multiple, in stages and validation"
        )
    return values[RANK::WORLD]


def all_sum(tensor):
    """The sum over the ranks, in place"""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def total(number):
    """The sum of a number over the ranks"""
    return all_sum(torch.tensor(number, dtype=torch.float64)).item()


def sum_figures(figures):
    """{name: this rank's part} -> {name: sum over the ranks}"""
    return {name: total(value) for name, value in figures.items()}


def from_rank_0(figures):
    """{name: number} of rank 0, on every rank"""
    return sum_figures({name: value * (RANK == 0) for name, value in figures.items()})


def gather(values, P):
    """Rows of this rank's p = P / W prompts -> rows of all, prompt-major: (p*k, ...) -> (P*k, ...)"""
    if WORLD == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(WORLD)]
    dist.all_gather(parts, values.contiguous())
    return rearrange(torch.stack(parts), "w (p k) ... -> (p w k) ...", p=P // WORLD)


def sum_gradients(parameters):
    """p.grad summed over the ranks: one call for each tensor of a LoRA, which are small"""
    if WORLD > 1:
        for p in parameters:
            if p.grad is None:  # as where none of this rank's rewrites counts
                p.grad = torch.zeros_like(p)
            all_sum(p.grad)


def shard(transformer, device_type):
    """FSDP2, in place: each rank keeps its part of the frozen weights, and gathers a block's while it runs.

    A LoRA that is added afterwards is none of FSDP's: it stays whole on every rank.
    """
    mesh = init_device_mesh(device_type, (WORLD,))
    for blocks in transformer.children():
        if isinstance(blocks, torch.nn.ModuleList):
            for block in blocks:  # moved to the device one at a time: it never holds the whole
                fully_shard(block, mesh=mesh)
    # the root would stay whole otherwise
    fully_shard(transformer, mesh=mesh, reshard_after_forward=True)
