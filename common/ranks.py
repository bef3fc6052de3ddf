"""Many processes that train one network, as torchrun starts them: on one machine or on several. Without
torchrun there is one process, and all of this does nothing."""

import contextlib
import os
import re
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.cli import UserError

RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))  # LOCAL: on its machine
LOST = "another process is gone, torchrun tells which"
WORLD, LOCAL_WORLD = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))  # how many


@contextlib.contextmanager
def joined(device):
    """Within it the processes are connected, and only the first one prints to stdout. Raises `UserError` when
    another one is gone."""
    if WORLD == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if RANK else sys.stdout):
            yield
    except RuntimeError as error:
        if lost(error):
            raise UserError(LOST)
        raise
    dist.destroy_process_group()  # not after an error: it would wait for those that are gone
    # Its threads may still be letting go of tensors: one that does so while Python ends aborts the process
    # (https://github.com/pytorch/pytorch/pull/179291).
    time.sleep(0.5)


def lost(error):
    """Whether a RuntimeError says that another process is gone."""
    return WORLD > 1 and re.search("peer|NCCL|timed out", str(error), re.IGNORECASE) is not None


def parallel(model, sync_bn=False):
    """The network as the training step calls it: its gradients are the mean over all processes. `sync_bn`
    (CUDA only) makes batch norms see the whole batch, not only the part of their process."""
    if WORLD == 1:
        return model
    if sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return DistributedDataParallel(model)


def meeting(model, meet):
    """A context for a forward and a backward pass, in which gradients of the processes `meet` or do not."""
    return contextlib.nullcontext() if meet or WORLD == 1 else model.no_sync()


def share(tensor):
    """This process's part of a tensor's rows: every WORLD-th."""
    return tensor[RANK::WORLD]


def gathered(part, count):
    """The tensor with `count` rows of which every process has its `share`."""
    if WORLD == 1:
        return part
    whole = part.new_zeros(count, *part.shape[1:])
    whole[RANK::WORLD] = part
    return add_up(whole)


def add_up(tensor):
    """The sum over all processes, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def largest(number):
    """The largest of the numbers that the processes give; waits for all of them, but for no GPU."""
    if WORLD == 1:
        return number
    told = torch.tensor(number)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return told.item()


def of_first(value):
    """What the first process gives, in all of them."""
    box = [value]
    if WORLD > 1:
        dist.broadcast_object_list(box, device="cpu")
    return box[0]


def same_buffers(model):
    """Gives all processes the first one's statistics of batch norm, which are those that are saved."""
    if WORLD > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


@contextlib.contextmanager
def first_ahead():
    """Within it the first process of each machine is alone: it downloads and decodes for the others."""
    if LOCAL_RANK:
        largest(0)
    yield
    if not LOCAL_RANK:
        largest(0)
