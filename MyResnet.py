"""ResNet-18, written out from Table 1 of "Deep Residual Learning for Image Recognition" (He, Zhang, Ren, Sun
2015, https://arxiv.org/abs/1512.03385).

The modules of the network are the rows of that table, and `python MyResnet.py` prints it."""

import argparse
import re
import signal
import sys
from collections import Counter, OrderedDict

import torch
from torch import nn


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a shortcut around them (figure 2 of the paper), a 1×1 convolution where the
    shape changes (option B): [N, in_channels, H, W] → [N, out_channels, H/stride, W/stride], not negative."""

    def __init__(self, in_channels, out_channels, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_channels))
        self.relu2 = nn.ReLU()  # not relu1 again: a hook on a ReLU must see one use of it

    def forward(self, x):
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + self.shortcut(x))


def sequential(**modules):
    """An `nn.Sequential` whose modules have names."""
    return nn.Sequential(OrderedDict(modules))


class ResNet18(nn.Module):
    """The 18-layer column of the paper's Table 1: [N, 3, H, W] normalised images (H, W ≥ 32; the table is for
    224) → [N, num_classes] logits. At 224 the stages give 112×112×64, 56×56×64, 28×28×128, 14×14×256 and
    7×7×512. The weights start as in He et al. 2015, https://arxiv.org/abs/1502.01852."""

    def __init__(self, num_classes=10):
        super().__init__()
        conv = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.conv1 = sequential(conv=conv, bn=nn.BatchNorm2d(64), relu=nn.ReLU())
        pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.conv2_x = sequential(pool=pool, block1=BasicBlock(64, 64), block2=BasicBlock(64, 64))
        self.conv3_x = sequential(block1=BasicBlock(64, 128, stride=2), block2=BasicBlock(128, 128))
        self.conv4_x = sequential(block1=BasicBlock(128, 256, stride=2), block2=BasicBlock(256, 256))
        self.conv5_x = sequential(block1=BasicBlock(256, 512, stride=2), block2=BasicBlock(512, 512))
        self.avgpool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(512, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.conv1(x)
        x = self.conv2_x(x)
        x = self.conv3_x(x)
        x = self.conv4_x(x)
        x = self.conv5_x(x)
        x = self.avgpool(x)
        return self.fc(x)


def torchvision_name(name):
    """What `torchvision.models.resnet18` calls the parameter or buffer `name` of `ResNet18`."""
    name = re.sub(r"^conv1\.(conv|bn)\.", r"\g<1>1.", name)
    name = re.sub(r"^conv(\d)_x\.block(\d)", lambda m: f"layer{int(m[1]) - 1}.{int(m[2]) - 1}", name)
    return name.replace("shortcut", "downsample")


def to_torchvision(state_dict):
    """The state dict of a `ResNet18`, renamed for `torchvision.models.resnet18`; same tensors."""
    return {torchvision_name(name): tensor for name, tensor in state_dict.items()}


def from_torchvision(state_dict):
    """The state dict of a `torchvision.models.resnet18`, renamed for `ResNet18`; same tensors."""
    names = {torchvision_name(name): name for name in ResNet18().state_dict()}
    return {names.get(name, name): tensor for name, tensor in state_dict.items()}


KERNELS = {  # how the paper's table writes them
    nn.Conv2d: "{0.kernel_size[0]}×{0.kernel_size[0]}, {0.out_channels}, stride {0.stride[0]}",
    nn.MaxPool2d: "{0.kernel_size}×{0.kernel_size} max pool, stride {0.stride}",
    BasicBlock: "[3×3, {0.conv1.out_channels}; 3×3, {0.conv2.out_channels}]",
    nn.AdaptiveAvgPool2d: "average pool",
    nn.Linear: "{0.in_features}-d to {0.out_features}-d",
}


def table(size=224, num_classes=10):
    """The rows of the paper's table, for one size×size image: (stage, output size, kernels, parameters,
    multiply-adds)."""
    from torch.utils.flop_counter import FlopCounterMode  # needs 80 MB of memory: only where it is used

    model, x = ResNet18(num_classes).eval(), torch.zeros(1, 3, size, size)
    for name, stage in model.named_children():
        with FlopCounterMode(display=False) as counter:
            x = stage(x)
        size = "×".join(map(str, [*x.shape[2:], x.shape[1]]))
        modules = list(stage.children()) or [stage]
        counts = Counter(KERNELS[type(m)].format(m) for m in modules if type(m) in KERNELS)
        kernels = ", ".join(f"{kernel} ×{n}" if n > 1 else kernel for kernel, n in counts.items())
        parameters = sum(p.numel() for p in stage.parameters())
        yield name, size, kernels, parameters, counter.get_total_flops() // 2  # each is two operations


def main(argv=()):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message} (--help lists the flags)\n")
    parser.parse_args(argv)
    layout = "{:<8}  {:<11}  {:<46}  {:>10}  {:>13}"
    print("ResNet-18 for CIFAR-10, one 224×224 image")
    print(layout.format("stage", "output size", "kernels", "parameters", "multiply-adds"))
    rows = list(table())
    for row in [*rows, ("total", "", "", sum(row[3] for row in rows), sum(row[4] for row in rows))]:
        print(layout.format(*row[:3], f"{row[3]:,}", f"{row[4]:,}"))


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that leaves, as `| head -1`, ends it quietly
    if sys.stdout:  # None if it is closed
        sys.stdout.reconfigure(errors="replace")  # not every encoding has ×
    main(sys.argv[1:])
