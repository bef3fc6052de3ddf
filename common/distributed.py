"""Many processes that train one network, as torchrun starts them: on one machine or on several. Without
torchrun there is one process, and every function here does nothing."""

import contextlib
import os
import re
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.cli import UserError, by_torchrun

ENVIRONMENT = os.environ if by_torchrun() else {}
RANK, LOCAL_RANK = (int(ENVIRONMENT.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
WORLD_SIZE, LOCAL_WORLD_SIZE = (int(ENVIRONMENT.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
PEER_LOST = "another process has died; torchrun's output says which"


@contextlib.contextmanager
def process_group(device):
    """Context manager: connects the processes; only the first prints. Raises `UserError` when one is gone,
    and on Apple GPUs, whose tensors no process can send to another."""
    if WORLD_SIZE == 1:
        yield
        return
    if device.type == "mps":
        raise UserError(
            "several processes cannot share an Apple GPU: start python train.py, or add --device cpu"
        )
    nccl = device.type == "cuda" and dist.is_nccl_available()  # Windows has none
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
    try:
        with open(os.devnull, "w", encoding="utf-8") as devnull:
            with contextlib.redirect_stdout(devnull if RANK else sys.stdout):
                yield
    except RuntimeError as error:
        if peer_lost(error):
            raise UserError(PEER_LOST)
        raise
    dist.destroy_process_group()  # not after an error: it would wait for those that are gone
    # Its threads may still be letting go of tensors: one that does so while Python ends aborts the process
    # (https://github.com/pytorch/pytorch/pull/179291).
    time.sleep(0.5)


def peer_lost(error):
    """Whether a RuntimeError says that another process is gone."""
    return WORLD_SIZE > 1 and re.search("peer|NCCL|timed out", str(error), re.IGNORECASE) is not None


def data_parallel(model, sync_bn=False):
    """The network as the training step calls it: its gradients are the mean over all processes. With
    `sync_bn` (CUDA only) batch norms see the whole batch, not only the shard of their process."""
    if WORLD_SIZE == 1:
        return model
    if sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return DistributedDataParallel(model)


def sync_gradients(model, enabled):
    """A context for a forward and a backward pass: gradients are averaged over the processes if `enabled`."""
    return contextlib.nullcontext() if enabled or WORLD_SIZE == 1 else model.no_sync()


def shard(tensor):
    """This process's share of a tensor's rows: every WORLD_SIZE-th."""
    return tensor[RANK::WORLD_SIZE]


def all_gather(part, count):
    """The tensor with `count` rows of which every process has its `shard`."""
    whole = part.new_zeros(count, *part.shape[1:])
    whole[RANK::WORLD_SIZE] = part
    return all_reduce_sum(whole)


def all_reduce_sum(tensor):
    """The sum over all processes, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(number):
    """The largest of the numbers that the processes give; waits for all of them, but for no GPU."""
    if WORLD_SIZE == 1:
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def broadcast_object(value):
    """The first process's `value`, in all of them."""
    objects = [value]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(objects, device="cpu")
    return objects[0]


def broadcast_buffers(model):
    """Gives all processes the batch norm statistics of the first one, which are those that are saved."""
    if WORLD_SIZE > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


@contextlib.contextmanager
def local_main_first():
    """Context manager: the first process of each machine goes first, to download and decode for all."""
    if LOCAL_RANK:
        all_reduce_max(0)
    yield
    if not LOCAL_RANK:
        all_reduce_max(0)
