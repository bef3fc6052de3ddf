"""Images a second in training and evaluation, and peak memory: train.py against two baselines, in processes
of their own that take turns.

The baseline is the assignment as it is usually written: torchvision's Resize, ToTensor and Normalize in a
DataLoader, fp32. The tuned baseline resizes batches on the device, channels last, in the precision that
train.py would choose. Also what micro-batches, the live page and a second process change.

python -m benchmarks.throughput"""

import json
import math
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

sys.path.append(str(Path(__file__).parent.parent))  # for `python benchmarks/throughput.py`

import train
from common import cli, data, distributed
from common.device import autocast, memory_format, select_device, select_precision
from common.run import Run
from Myvisdom import Page

BATCH = 128


class Noise(datasets.CIFAR10):
    """torchvision's CIFAR10, with `count` random images instead of those in its files."""

    def __init__(self, count, transform):
        generator = np.random.default_rng(0)
        self.data = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        self.targets = generator.integers(0, 10, count).tolist()
        self.transform, self.target_transform = transform, None


def median_rate(moments):
    """The median of images a second between moments that are a batch apart; the first two warm up."""
    return np.median(BATCH / np.diff(moments)[2:])


def baseline(device, size, steps, workers, tuned):
    """(images a second in training, in evaluation, peak GB) of the baseline, or of the `tuned` one."""
    device = torch.device(device)  # without what `select_device` sets
    normalize = transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    resize = [] if tuned else [transforms.Resize(size)]
    noise = Noise(steps * BATCH, transforms.Compose([*resize, transforms.ToTensor(), normalize]))
    loader = DataLoader(noise, BATCH, shuffle=True, num_workers=workers)
    layout = memory_format(device) if tuned else torch.contiguous_format
    precision = select_precision("auto", device) if tuned else "fp32"
    model = models.resnet18(num_classes=10).to(device, memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    rates = []
    for training in True, False:
        model.train(training)
        moments = [time.perf_counter()]
        for images, labels in loader:
            images, labels = images.to(device, memory_format=layout), labels.to(device)
            if tuned:
                images = F.interpolate(images, (size, size), mode="bilinear")
            with autocast(device, precision), torch.set_grad_enabled(training):
                logits = model(images)
                loss = F.cross_entropy(logits, labels)
            if training:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            loss.item(), (logits.argmax(1) == labels).sum().item()  # for the running means
            moments.append(time.perf_counter())
        rates.append(median_rate(moments))
    return *rates, peak_memory(device)


def project(device, size, steps, micro_batches=1, page=False):
    """The same of train.py's own loop and evaluation."""
    device = select_device(device)
    images = torch.randint(256, (steps * BATCH, 3, 32, 32), dtype=torch.uint8, device=device)
    labels = torch.randint(10, (len(images),), device=device)
    dataset = data.Dataset(images, labels, images[:BATCH], labels[:BATCH], data.CIFAR10_CLASSES, "noise")
    settings = train.new_settings(train.parse(f"--epochs 1 --size {size}".split()), device)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # which is free
    with distributed.process_group(device), tempfile.TemporaryDirectory() as out:
        run = Run(settings | dict(name="throughput"), dataset, Path(out), device)
        page_class = Page if page else train.NoPage
        page = page_class(run.history, run.settings, dataset.classes, steps, port)
        train.train(run, dataset, page, save_every=60, micro_batches=micro_batches)
        began = time.perf_counter()
        train.evaluate(run.model, images, labels, size, settings)
        evaluation = len(images) / (time.perf_counter() - began)
    moments = run.history["clock"][:-1]  # the last step's result is read at once
    return median_rate(moments), evaluation, peak_memory(device)


def peak_memory(device):
    """The most that this process ever had, in GB: on a GPU what its tensors took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # on Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def measure(pipeline, processes=1, **options):
    """What `pipeline` returns in a process of its own, since the allocator's settings are those of a whole
    process, or in so many `processes` by torchrun, which gives each of them one thread."""
    command = [sys.executable]
    if processes > 1:
        command += f"-m torch.distributed.run --standalone --nproc-per-node {processes}".split()
    command += [__file__, "--child", json.dumps([pipeline.__name__, options])]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        print(result.stderr, file=sys.stderr)
        raise cli.UserError(f"this measurement failed: {' '.join(command[1:])}")
    return json.loads(result.stdout.splitlines()[-1])


def spread(values):
    """The median of some values, and their range."""
    return f"{np.median(values):.1f} ({min(values):.1f}–{max(values):.1f})".ljust(28)


@cli.command
def main(argv=None):
    parser = cli.parser(__doc__, "device")
    add, sizes = parser.add_argument, sorted(train.RECIPES["standard"]["sizes"], reverse=True)
    add("--sizes", type=cli.number(int, 32, 1024), nargs="+", default=sizes, metavar="PX",
        help="image sizes to measure at (default: those of the default recipe)")  # fmt: skip
    add("--steps", type=cli.number(int, 6), default=10, metavar="N", help="steps of 128 images (default: 10)")
    add("--rounds", type=cli.number(int, 1), default=3, metavar="N", help="how often (default: 3)")
    add("--workers", type=cli.number(int, 0), nargs="+", default=[0, 1, 2], metavar="N",
        help="workers of the baselines' DataLoader; the best number is taken (default: 0 1 2)")  # fmt: skip
    add("--child", help="used by the script itself")
    args = parser.parse_args(argv)
    if args.child:
        name, options = json.loads(args.child)
        result = dict(baseline=baseline, project=project)[name](**options)
        return print(json.dumps(result)) if distributed.RANK == 0 else None
    device, rounds = select_device(args.device), range(args.rounds)
    print(f"{device}, {torch.get_num_threads()} threads, {select_precision('auto', device)}, "
          f"torch {torch.__version__}; medians of {args.rounds} rounds (and their range)")  # fmt: skip
    for size in args.sizes:
        job, runs = dict(device=str(device), size=size, steps=args.steps), []
        for tuned in False, True:
            jobs = [job | dict(workers=workers, tuned=tuned) for workers in args.workers]
            runs.append((baseline, max(jobs, key=lambda each: measure(baseline, **each)[0])))
        runs.append((project, job))
        results = np.array([[measure(pipeline, **options) for pipeline, options in runs] for _ in rounds])
        plain, tuned, new = np.median(results, 0)  # of [rounds, runs, parts]
        print(f"\n{f'{size} px':<22}{'baseline':<28}{'tuned baseline':<28}{'train.py':<28}against each")
        for i, part in enumerate(("training   images/s", "evaluation images/s", "memory     peak GB")):
            columns = "".join(spread(values) for values in results[:, :, i].T)
            print(f"  {part:<20}{columns}{new[i] / plain[i]:.2f}×, {new[i] / tuned[i]:.2f}×", flush=True)
    print(f"\ntrain.py at {size} px with a change, against it without:")
    changes = [("micro_batches", 2), ("micro_batches", 4), ("page", True), ("processes", 2)]
    for name, value in changes if device.type == "cpu" else changes[:-1]:
        pairs = [(measure(project, **job, **{name: value}), measure(project, **job)) for _ in rounds]
        changed, plain = np.array(pairs).swapaxes(0, 1)  # [rounds, parts] each
        rate, _, memory = np.median(changed, 0) / np.median(plain, 0)
        print(f"  {f'{name} {value}':<20}{spread(changed[:, 0])} images/s, {rate:.2f}×; memory {memory:.2f}×",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
