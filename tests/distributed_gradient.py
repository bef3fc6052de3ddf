"""One of several processes that compute the gradient of a batch; test_distributed.py starts it with torchrun,
and calls `gradient` itself for what one process computes."""

import sys

import torch

import train
from common import data, distributed
from common.muon import Muon
from MyResnet import ResNet18


def gradient(micro_batches):
    """The gradients of all weights and the convolutions after a step of Muon, all in float64, and [loss,
    accuracy], of a batch of 14 noisy images; batch norms do not look at the batch."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (20,))
    settings = train.RECIPES["standard"] | dict(precision="fp32")
    (batch,) = data.epoch_batches(20, 14, seed=1, epoch=0, shift=4, flip=True)
    network = ResNet18().double().eval()
    model = distributed.data_parallel(network)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    result = train.backward(model, images, labels, batch, 40, settings, scaler, micro_batches)
    convolutions = [p for p in network.parameters() if p.ndim == 4]
    Muon(convolutions, lr=0.1, momentum=0.9, precision="fp32").step()
    return [p.grad for p in network.parameters()] + [p.detach() for p in convolutions], result


if __name__ == "__main__":
    torch.Tensor.float = torch.Tensor.double  # the training step makes its numbers float32 by this
    with distributed.process_group(torch.device("cpu")):
        results = gradient(micro_batches=int(sys.argv[2]))
        logits = distributed.all_gather(
            distributed.shard(torch.arange(7.0)), 7
        )  # fewer for some than for others
        if distributed.RANK == 0:
            torch.save((*results, logits), sys.argv[1])
