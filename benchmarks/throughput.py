"""Images a second in training and evaluation, and peak memory: train.py against two baselines, in processes
of their own that take turns.

"usual" is the assignment as it is usually written: torchvision's Resize, ToTensor and Normalize in a
DataLoader, fp32. "tuned" is that as a careful user would tune it: images resized as a batch on the device,
channels last, and the precision that train.py would choose. Also what micro-batches, the live page and a
second process change.

python -m benchmarks.throughput"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

import train
from common import cli, data, distributed
from common.device import autocast, memory_format, select_device, select_precision
from common.run import Run
from Myvisdom import Page

BATCH = 128
UNITS = dict(training="images/s", evaluation="images/s", memory="peak GB")


class Noise(torch.utils.data.Dataset):
    """Images of CIFAR-10's shape, as torchvision's CIFAR10 hands them out: PIL images through a transform."""

    def __init__(self, count, resize=()):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        self.labels = torch.randint(0, 10, (count,), generator=generator)
        normalize = transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        self.transform = transforms.Compose([*resize, transforms.ToTensor(), normalize])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i].permute(1, 2, 0).numpy())), self.labels[i]


def median_rate(moments):
    """The median of images a second between moments that are a batch apart; the first two warm up."""
    return statistics.median(BATCH / np.diff(moments)[2:])


def baseline(device, size, steps, workers, tuned):
    """The rates of the usual pipeline, or of the `tuned` one."""
    device = torch.device(device)  # without what `select_device` sets
    noise = Noise(steps * BATCH, [] if tuned else [transforms.Resize(size)])
    loader = DataLoader(noise, BATCH, shuffle=True, num_workers=workers)
    layout = memory_format(device) if tuned else torch.contiguous_format
    precision = select_precision("auto", device) if tuned else "fp32"
    model = torchvision.models.resnet18(num_classes=10).to(device, memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    rates = {}
    for part in "training", "evaluation":
        model.train(part == "training")
        moments = [time.perf_counter()]
        for images, labels in loader:
            images, labels = images.to(device, memory_format=layout), labels.to(device)
            if tuned:
                images = F.interpolate(images, (size, size), mode="bilinear")
            with autocast(device, precision), torch.set_grad_enabled(part == "training"):
                logits = model(images)
                loss = F.cross_entropy(logits, labels)
            if part == "training":
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            loss.item(), (logits.argmax(1) == labels).sum().item()  # for the running means, as usual
            moments.append(time.perf_counter())
        rates[part] = median_rate(moments)
    return rates | dict(memory=peak_memory(device))


def project(device, size, steps, micro_batches=1, page=False):
    """The rates of train.py's own loop and evaluation."""
    device, noise = select_device(device), Noise(steps * BATCH)
    images, labels = noise.images.to(device), noise.labels.to(device)
    dataset = data.Dataset(images, labels, images[:BATCH], labels[:BATCH], data.CIFAR10_CLASSES, "noise")
    settings = train.new_settings(train.parse(f"--epochs 1 --size {size}".split()), device)
    page_class = Page if page else train.NoPage
    with distributed.process_group(device), tempfile.TemporaryDirectory() as out, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        run = Run(settings | dict(name="throughput"), dataset, Path(out), device)
        page = page_class(run.history, run.settings, dataset.classes, steps, port)
        train.train(run, dataset, page, save_every=60, micro_batches=micro_batches)
        began = time.perf_counter()
        train.evaluate(run.model, images, labels, size, settings)
        evaluation = len(images) / (time.perf_counter() - began)
    training = median_rate(run.history["clock"][:-1])
    return dict(training=training, evaluation=evaluation, memory=peak_memory(device))


def peak_memory(device):
    """The most that this process ever had, in GB: on a GPU what its tensors took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # which Windows has not

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def measure(pipeline, processes=None, **options):
    """What `pipeline` returns in a process of its own, since the allocator's settings are those of a whole
    process, or in so many `processes` by torchrun, with one thread each."""
    command, environment = [sys.executable, "-m"], os.environ
    if processes:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
        environment = environment | {"OMP_NUM_THREADS": "1"}
    command += ["benchmarks.throughput", "--child", json.dumps([pipeline.__name__, options])]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        print(result.stderr, file=sys.stderr)
        raise cli.UserError(f"this measurement failed: {' '.join(command[1:])}")
    return json.loads(result.stdout.splitlines()[-1])


def spread(results, part):
    """The median of a part of some results, and its range."""
    values = [result[part] for result in results]
    return f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})".ljust(24)


def ratio(results, others, part):
    one, other = (statistics.median(result[part] for result in each) for each in (results, others))
    return f"{one / other:.2f}×"


@cli.command
def main(argv=None):
    parser = cli.parser(__doc__, "device")
    add, whole, sizes = parser.add_argument, cli.number(int, 1), list(train.RECIPES["fast"]["sizes"])[::-1]
    add("--sizes", type=cli.number(int, 32, 1024), nargs="+", default=sizes, metavar="PX")
    add("--steps", type=cli.number(int, 6), default=10, metavar="N", help="of 128 images (default: 10)")
    add("--rounds", type=whole, default=3, metavar="N", help="of every measurement (default: 3)")
    add("--workers", type=cli.number(int, 0), nargs="+", default=[0, 1, 2], metavar="N",
        help="of the baselines' DataLoader; the best is taken (default: 0 1 2)")  # fmt: skip
    add("--child", help="what the script starts itself with")
    args = parser.parse_args(argv)
    if args.child:
        name, options = json.loads(args.child)
        result = dict(baseline=baseline, project=project)[name](**options)
        return print(json.dumps(result)) if distributed.RANK == 0 else None
    device, rounds = select_device(args.device), range(args.rounds)
    print(f"{device}, {torch.get_num_threads()} threads, {select_precision('auto', device)}, "
          f"torch {torch.__version__}; medians of {args.rounds} rounds (and their range)")  # fmt: skip
    for size in args.sizes:
        job, best = dict(device=str(device), size=size, steps=args.steps), {}
        for name in "usual", "tuned":
            jobs = [job | dict(workers=workers, tuned=name == "tuned") for workers in args.workers]
            best[name] = max(jobs, key=lambda each: measure(baseline, **each)["training"])
        results = dict(usual=[], tuned=[], project=[])
        for _ in rounds:
            for name, options in best.items():
                results[name].append(measure(baseline, **options))
            results["project"].append(measure(project, **job))
        print(f"\n{f'{size} px':<22}{'usual':<24}{'tuned':<24}{'project':<24}project against each")
        for part, unit in UNITS.items():
            columns = "".join(spread(measured, part) for measured in results.values())
            ratios = [ratio(results["project"], results[name], part) for name in ("usual", "tuned")]
            print(f"  {part:<11}{unit:<9}{columns}{', '.join(ratios)}", flush=True)
    print(f"\ntrain.py at {size} px with a change, against it without:")
    changes = [dict(micro_batches=2), dict(micro_batches=4), dict(page=True), dict(processes=2)]
    for change in changes if device.type == "cpu" else changes[:-1]:
        pairs = [(measure(project, **job, **change), measure(project, **job)) for _ in rounds]
        changed, plain = zip(*pairs)
        (name, value), memory = next(iter(change.items())), ratio(changed, plain, "memory")
        print(f"  {f'{name} {value}':<20}{spread(changed, 'training')} images/s, "
              f"{ratio(changed, plain, 'training')}; memory {memory}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
