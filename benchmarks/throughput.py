"""Images a second in training, evaluation and input alone, and peak memory: train.py against two baselines,
in processes of their own that take turns.

"usual" is the assignment as it is usually written: torchvision's Resize, ToTensor and Normalize in a
DataLoader, fp32. "tuned" is the same as a careful user would tune it: images resized as a batch on the
device, channels last, and the precision that train.py would choose. Also what micro-batches save, what two
processes gain, what the live page and saving cost, and how soon the first step begins.

python -m benchmarks.throughput"""

# Where the time of a step at 224 px goes, by torch.profiler in fp32 on two cores without bf16: convolutions 71 %,
# batch norm 11, the gradient of ReLU 10, that of max pooling 5, input under 1. Convolutions fused with batch norm
# evaluate 1.14 to 1.18 times as fast on two cores with AMX (263 to 302 images/s), and hardly faster (44.6 against
# 43.8) without bf16. Tried and left out, since they gave next to nothing with bf16: ReLU in place (63.0 against
# 63.2), torch.compile. Left out as ugly: a layout or an evaluation batch by processor and size.

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
PIPELINES = "usual", "tuned", "project"
UNITS = dict(training="images/s", evaluation="images/s", input="images/s", memory="peak GB")


def noise(count):
    """Images of CIFAR-10's shape: uint8 [count, 3, 32, 32], and labels [count]."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 10, (count,), generator=generator)


def median_rate(marks):
    """The median of images a second between moments that are a batch apart; the first two warm up."""
    return statistics.median(BATCH / np.diff(marks)[2:])


class Images(torch.utils.data.Dataset):
    """As torchvision's CIFAR10 hands them out: PIL images through a transform."""

    def __init__(self, count, resize):
        images, self.labels = noise(count)
        self.images = images.permute(0, 2, 3, 1).numpy()
        normalize = transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        self.transform = transforms.Compose([*resize, transforms.ToTensor(), normalize])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), int(self.labels[i])


def baseline(size, steps, workers, device, tuned):
    """The rates of the usual pipeline, or of the `tuned` one."""
    resize = [] if tuned else [transforms.Resize(size)]
    loader = DataLoader(Images(steps * BATCH, resize), BATCH, shuffle=True, num_workers=workers)
    layout = memory_format(device) if tuned else torch.contiguous_format
    precision = select_precision("auto", device) if tuned else "fp32"
    model = torchvision.models.resnet18(num_classes=10).to(device, memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def prepare(images, labels):
        images = images.to(device, memory_format=layout)
        return (F.interpolate(images, (size, size), mode="bilinear") if tuned else images), labels.to(device)

    def training(images, labels):
        optimizer.zero_grad()
        images, labels = prepare(images, labels)
        with autocast(device, precision):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        loss.item()  # for the running loss, as usual

    @torch.no_grad()
    def evaluation(images, labels):
        images, labels = prepare(images, labels)
        with autocast(device, precision):
            (model(images).argmax(1) == labels).sum().item()

    rates = {}
    for work in (training, evaluation, prepare):
        model.train(work is training)
        marks = [time.perf_counter()]
        for images, labels in loader:
            work(images, labels)
            marks.append(time.perf_counter())
        rates["input" if work is prepare else work.__name__] = median_rate(marks)
    return rates


def project(size, steps, micro_batches, device, page_class=train.NoPage):
    """The rates of train.py's own loop and evaluation, and the seconds that a save takes."""
    images, labels = (tensor.to(device) for tensor in noise(steps * BATCH))
    dataset = data.Dataset(images, labels, images[:BATCH], labels[:BATCH], data.CIFAR10_CLASSES, "noise")
    settings = train.new_settings(train.parse(f"--epochs 1 --size {size}".split()), device)
    settings |= dict(name="throughput", schedule="")
    with tempfile.TemporaryDirectory() as out:
        run = Run(settings, dataset, Path(out), device)
        page = page_class(run.history, settings, dataset.classes, run.steps, free_port())
        train.train(run, dataset, page, 60, micro_batches)
        rates = dict(training=median_rate(run.history["clock"][:-1]))
        began = time.perf_counter()
        run.save(curves=True)
        rates["saving"] = time.perf_counter() - began
    began = time.perf_counter()
    train.evaluate(run.model, images, labels, size, settings)
    rates["evaluation"] = len(images) / (time.perf_counter() - began)
    marks = [time.perf_counter()]
    for batch in data.epoch_batches(len(images), BATCH, 0, 0, settings["shift"], settings["flip"], device):
        x = data.augment(images, batch)
        x = data.normalize_and_resize(x, size, settings["mean"], settings["std"])
        x[0, 0, 0, 0].item()  # waits for the device
        marks.append(time.perf_counter())
    return rates | dict(input=median_rate(marks))


def peak_memory(device):
    """The most that this process ever had, in GB: on a GPU what its tensors took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # which Windows has not

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def measure(pipeline, size, steps, option, name):
    """What a child process prints: the rates of a pipeline; `option` is its workers or its micro-batches."""
    size, steps, option = int(size), int(steps), int(option)
    if pipeline in ("usual", "tuned"):  # without what `select_device` sets
        device = torch.device(name)
        rates = baseline(size, steps, option, device, tuned=pipeline == "tuned")
    else:
        device = select_device(name)
        with distributed.process_group(device):
            rates = project(size, steps, option, device, Page if pipeline == "page" else train.NoPage)
    if distributed.RANK == 0:
        print(json.dumps(rates | dict(memory=peak_memory(device))))


def child(*values, processes=None):
    """Measures in a process of its own, since the allocator's settings are those of a whole process, or in so
    many `processes` by torchrun, with one thread each."""
    command, environment = [sys.executable, "-m"], os.environ
    if processes:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
        environment = environment | {"OMP_NUM_THREADS": "1"}
    command += ["benchmarks.throughput", "--child", *map(str, values)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        print(result.stderr, file=sys.stderr)
        raise cli.UserError(f"this measurement failed: {' '.join(command[1:])}")
    return json.loads(result.stdout.splitlines()[-1])


def seconds_to_first_step(folder):
    """From the call of train.py until its first save, right before its first step, with the images read
    before."""
    dataset = ["--data", folder] if data.is_present("cifar10", folder) else ["--dataset", "digits"]
    took = []
    for _ in range(4):  # the first one may have to decode the images
        with tempfile.TemporaryDirectory() as out:
            began = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "train.py", "--no-visdom", "--out", out, *dataset], stdout=subprocess.DEVNULL
            )
            while not Path(out, "last.pt").exists() and process.poll() is None:
                time.sleep(0.01)
            took.append(time.perf_counter() - began)
            process.kill()
            process.wait()
    return statistics.median(took[1:])


def spread(results, part):
    """The median of a part of some results, with its range."""
    values = [result[part] for result in results]
    return f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})"


def ratio(results, others, part="training"):
    return statistics.median(r[part] for r in results) / statistics.median(r[part] for r in others)


@cli.command
def main(argv=None):
    parser = cli.parser(__doc__, "data", "device")
    add = parser.add_argument
    sizes = list(train.RECIPES["fast"]["sizes"])[::-1]
    add("--sizes", type=cli.number(int, 32, 1024), nargs="+", default=sizes, metavar="PX")
    add("--steps", type=cli.number(int, 6), default=10, metavar="N", help="of 128 images (default: 10)")
    add("--rounds", type=cli.number(int, 1), default=3, metavar="N", help="of every measurement (default: 3)")
    add("--workers", type=cli.number(int, 0), nargs="+", default=[0, 1, 2], metavar="N",
        help="of the baselines' DataLoader; the best is taken (default: 0 1 2)")  # fmt: skip
    add("--child", nargs=5, help="what the script starts itself with")
    args = parser.parse_args(argv)
    if args.child:
        return measure(*args.child)
    device, steps, rounds = select_device(args.device), args.steps, range(args.rounds)
    print(f"{device}, {torch.get_num_threads()} threads, {select_precision('auto', device)}")
    print(f"torch {torch.__version__}; the median of {args.rounds} rounds (and their range)")
    for size in args.sizes:
        options = dict(project=1)  # micro-batches
        for pipeline in ("usual", "tuned"):
            tried = {n: child(pipeline, size, steps, n, device)["training"] for n in args.workers}
            options[pipeline] = max(tried, key=tried.get)
        results = {pipeline: [] for pipeline in PIPELINES}
        for _ in rounds:
            for pipeline, measured in results.items():
                measured.append(child(pipeline, size, steps, options[pipeline], device))
        print(f"\n{size} px".ljust(24) + "".join(f"{pipeline:<24}" for pipeline in PIPELINES) + "ratios")
        for part, unit in UNITS.items():
            columns = "".join(f"{spread(results[pipeline], part):<24}" for pipeline in PIPELINES)
            ratios = (f"{ratio(results['project'], results[other], part):.2f}×" for other in PIPELINES[:2])
            print(f"  {part:<11}{unit:<10}{columns}{', '.join(ratios)}", flush=True)
        print(f"  workers: usual {options['usual']}, tuned {options['tuned']}; a save of train.py takes "
              f"{statistics.median(r['saving'] for r in results['project']):.2f} s")  # fmt: skip
    largest, smallest = args.sizes[0], args.sizes[-1]
    print(f"\ntrain.py at {largest} px, its batch of {BATCH} in micro-batches (--accumulate):")
    for count in (2, 4):
        result = child("project", largest, steps, count, device)
        print(f"  {count}: peak {result['memory']:.1f} GB, {result['training']:.1f} images/s", flush=True)
    if device.type == "cpu":
        one, two = (
            [child("project", smallest, steps, 1, device, processes=n) for _ in rounds] for n in (1, 2)
        )
        print(f"torchrun at {smallest} px, a thread a process: 1 process {spread(one, 'training')} images/s, "
              f"2 processes {spread(two, 'training')}: {ratio(two, one):.2f}×", flush=True)  # fmt: skip
    pairs = [[child(kind, smallest, 2 * steps, 1, device)] for _ in rounds for kind in ("page", "project")]
    ratios = [ratio(page, without) for page, without in zip(pairs[::2], pairs[1::2])]
    print(f"with the live page at {smallest} px: {statistics.median(ratios):.3f} × the images/s without it "
          f"({min(ratios):.3f}–{max(ratios):.3f}, pairs)", flush=True)  # fmt: skip
    print(f"the first step begins {seconds_to_first_step(args.data):.1f} s after the call of train.py")


if __name__ == "__main__":
    main()
