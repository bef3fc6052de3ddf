"""ResNet-18, written out from Table 1 of "Deep Residual Learning for Image Recognition"
(He, Zhang, Ren, Sun 2015, https://arxiv.org/abs/1512.03385).

The modules of the network are the rows of that table, and `python MyResnet.py` prints it."""

import re
from collections import OrderedDict

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common import cli


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a way around them (figure 2 of the paper).

    [N, in_channels, H, W] → [N, out_channels, H/stride, W/stride], not negative. Where the shape
    changes, the way around is a 1×1 convolution (the paper's option B)."""

    def __init__(self, in_channels, out_channels, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        self.relu2 = nn.ReLU()  # not relu1 again: a hook on a ReLU must see one use of it

    def forward(self, x):
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + self.shortcut(x))


class ResNet18(nn.Module):
    """The 18-layer column of the paper's Table 1.

    [N, 3, H, W] normalised pictures (H, W ≥ 32; the table is for 224) → [N, num_classes] logits.
    At 224 the stages give 112×112×64, 56×56×64, 28×28×128, 14×14×256 and 7×7×512. The weights
    start as in He et al. 2015, https://arxiv.org/abs/1502.01852."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.conv1 = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
                bn=nn.BatchNorm2d(64),
                relu=nn.ReLU(),
            )
        )
        self.conv2_x = nn.Sequential(
            OrderedDict(
                pool=nn.MaxPool2d(3, stride=2, padding=1),
                block1=BasicBlock(64, 64),
                block2=BasicBlock(64, 64),
            )
        )
        self.conv3_x = self._stage(64, 128)
        self.conv4_x = self._stage(128, 256)
        self.conv5_x = self._stage(256, 512)
        self.avgpool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(512, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(in_channels, out_channels):
        return nn.Sequential(
            OrderedDict(
                block1=BasicBlock(in_channels, out_channels, stride=2),
                block2=BasicBlock(out_channels, out_channels),
            )
        )

    def forward(self, x):
        x = self.conv1(x)
        x = self.conv2_x(x)
        x = self.conv3_x(x)
        x = self.conv4_x(x)
        x = self.conv5_x(x)
        x = self.avgpool(x)
        return self.fc(x)


# torchvision's names for the same tensors: (theirs, ours), each a prefix or a part of a key
_STEM = (("conv1.", "conv1.conv."), ("bn1.", "conv1.bn."))
_STAGE = re.compile(r"layer(\d)\.(\d)\.(downsample)?")
_OUR_STAGE = re.compile(r"conv(\d)_x\.block(\d)\.(shortcut)?")


def from_torchvision(state_dict):
    """The state dict of a `torchvision.models.resnet18`, renamed for `ResNet18`; same tensors."""

    def rename(key):
        for theirs, ours in _STEM:
            if key.startswith(theirs):
                return ours + key.removeprefix(theirs)
        return _STAGE.sub(
            lambda m: f"conv{int(m[1]) + 1}_x.block{int(m[2]) + 1}." + ("shortcut" if m[3] else ""),
            key,
        )

    return {rename(key): tensor for key, tensor in state_dict.items()}


def to_torchvision(state_dict):
    """The state dict of a `ResNet18`, renamed for `torchvision.models.resnet18`; same tensors."""

    def rename(key):
        for theirs, ours in _STEM:
            if key.startswith(ours):
                return theirs + key.removeprefix(ours)
        return _OUR_STAGE.sub(
            lambda m: f"layer{int(m[1]) - 1}.{int(m[2]) - 1}." + ("downsample" if m[3] else ""),
            key,
        )

    return {rename(key): tensor for key, tensor in state_dict.items()}


def table(size=224, num_classes=10):
    """The network stage by stage, for pictures of size×size: a list of rows (stage, output size,
    kernels, parameters, multiply-adds of one picture), the last with the totals."""
    with torch.device("meta"):  # shapes only: nothing is allocated or computed
        model, x = ResNet18(num_classes).eval(), torch.empty(1, 3, size, size)
    rows = []
    for name, stage in model.named_children():
        with FlopCounterMode(display=False) as counter:
            x = stage(x)
        rows.append(
            (
                name,
                "×".join(map(str, [*x.shape[2:], x.shape[1]])),
                _kernels(stage),
                sum(p.numel() for p in stage.parameters()),
                counter.get_total_flops() // 2,  # a multiply-add is two operations
            )
        )
    return rows + [("total", "", "", sum(r[3] for r in rows), sum(r[4] for r in rows))]


def _kernels(stage):
    """What a stage is made of, in the words of the paper's table."""
    words = []
    for module in stage.children() if isinstance(stage, nn.Sequential) else [stage]:
        if isinstance(module, nn.Conv2d):
            k, s = module.kernel_size[0], module.stride[0]
            words.append(f"{k}×{k}, {module.out_channels}, stride {s}")
        elif isinstance(module, nn.MaxPool2d):
            words.append(f"{module.kernel_size}×{module.kernel_size} max pool, stride 2")
        elif isinstance(module, BasicBlock):
            words.append(f"[3×3, {module.conv1.out_channels}; 3×3, {module.conv2.out_channels}]")
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            words.append("average pool")
        elif isinstance(module, nn.Linear):
            words.append(f"{module.in_features}-d to {module.out_features}-d")
    if len(words) > 1 and words[-1] == words[-2]:
        words[-2:] = [f"{words[-1]} ×2"]
    return ", ".join(words)


@cli.command
def main(argv=None):
    cli.parser(__doc__).parse_args(argv)
    layout = "{:<8}  {:<11}  {:<46}  {:>10}  {:>13}"
    print("ResNet-18 for CIFAR-10, one 224×224 picture")
    print(layout.format("stage", "output size", "kernels", "parameters", "multiply-adds"))
    for stage, output, kernels, parameters, multiply_adds in table():
        print(layout.format(stage, output, kernels, f"{parameters:,}", f"{multiply_adds:,}"))


if __name__ == "__main__":
    main()
