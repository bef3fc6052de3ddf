"""The test accuracy of weights, with nothing of these scripts but the names of the weights: torchvision's
resnet18, its ImageFolder, and PIL's resize, in fp32: python -m tests.independent_accuracy --data DIR"""

import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms
from tqdm import tqdm

sys.path.append(str(Path(__file__).parent.parent))  # for `python tests/independent_accuracy.py`

from common import cli
from common.network import REFERENCE
from MyResnet import to_torchvision


@cli.command
def main(argv=None):
    parser = cli.parser(__doc__, "device")
    parser.add_argument("--data", default="data", metavar="DIR", help="images in DIR/test/<class>/")
    parser.add_argument("--weights", default=REFERENCE, metavar="FILE", help="default: the shipped network")
    args = parser.parse_args(argv)
    saved = torch.load(args.weights, map_location="cpu", weights_only=True)
    model = models.resnet18(num_classes=len(saved["classes"])).eval()
    model.load_state_dict(to_torchvision({name: t.float() for name, t in saved["model"].items()}))
    size, device = saved["size"], args.device.replace("auto", "cpu")
    steps = (
        transforms.Resize((size, size)),
        transforms.ToTensor(),
        transforms.Normalize(saved["mean"], saved["std"]),
    )
    images = datasets.ImageFolder(Path(args.data, "test"), transforms.Compose(steps))
    assert images.classes == saved["classes"]
    right, model = 0, model.to(device)
    with torch.inference_mode():
        for x, labels in tqdm(DataLoader(images, 100), leave=False):
            right += int((model(x.to(device)).argmax(1).cpu() == labels).sum())
    print(f"{right:,} of {len(images):,} test images right, {right / len(images):.2%}")


if __name__ == "__main__":
    main()
