"""Images a second of training, evaluation and input preparation: the assignment's pipeline as it is usually
written against train.py's own, in child processes that take turns: python -m benchmarks.throughput

Also what the live page and saving cost, what many processes gain, what batches in parts save, and how soon
the first step begins."""

# Where the time of a step at 224 px goes, by torch.profiler in fp32 on two cores without bf16: convolutions
# 71 %, batch norm 11, the gradient of ReLU 10, that of max pooling 5, input under 1. Convolutions fused with
# batch norm evaluate 1.14 to 1.18 times as fast on two cores with AMX (263 to 302 images/s), and hardly
# faster (44.6 against 43.8) without bf16. Tried and left out, since they gave next to nothing with bf16:
# ReLU in place (63.0 against 63.2), torch.compile. Left out as ugly: a layout or an evaluation batch by
# processor and size.

import functools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

import train
from common import cli, data, ranks
from common.run import Run
from MyResnet import table

BATCH = 128


def noise(count):
    """Pictures of CIFAR-10's shape: uint8 [count, 3, 32, 32], and labels [count]."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 10, (count,), generator=generator)


def rate(marks):
    """The median of images a second between moments that are a batch apart; the first two warm up."""
    return statistics.median(BATCH / (after - before) for before, after in zip(marks[2:], marks[3:]))


class Pictures(torch.utils.data.Dataset):
    """As torchvision's CIFAR10 hands them out: PIL pictures through a transform."""

    def __init__(self, count, size):
        images, self.labels = noise(count)
        self.images = images.permute(0, 2, 3, 1).numpy()
        normalise = transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        self.transform = transforms.Compose([transforms.Resize(size), transforms.ToTensor(), normalise])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), int(self.labels[i])


def usual(size, steps, workers, device):
    """As the assignment is usually written: Resize in a DataLoader, fp32, the default layout, SGD."""
    loader = DataLoader(Pictures(steps * BATCH, size), BATCH, shuffle=True, num_workers=workers)
    model = torchvision.models.resnet18(num_classes=10).to(device)
    criterion = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(images, labels):
        optimizer.zero_grad()
        loss = criterion(model(images.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        loss.item()  # for the running loss, as usual

    @torch.no_grad()
    def evaluate(images, labels):
        (model(images.to(device)).argmax(1) == labels.to(device)).sum().item()

    rates = {}
    for part, work in (("training", step), ("evaluation", evaluate), ("input", lambda images, labels: None)):
        model.train(part == "training")
        marks = [time.perf_counter()]
        for images, labels in loader:
            work(images, labels)
            marks.append(time.perf_counter())
        rates[part] = rate(marks)
    return rates


def ours(size, steps, parts, device, page=False):
    """train.py's own loop, with batches in `parts` and perhaps a live `page`, and its evaluation."""
    images, labels = (tensor.to(device) for tensor in noise(steps * BATCH))
    few = images[:BATCH], labels[:BATCH]
    dataset = data.Dataset(images, labels, *few, data.CIFAR10_CLASSES, "noise")
    settings = train.new_settings(train.parse(f"--epochs 1 --size {size}".split()), device)
    settings["name"] = "throughput"
    marks = []

    class Timed(Run):
        def record(self, *result):
            marks.append(time.perf_counter())
            super().record(*result)

        def save(self, **options):
            pass

    with tempfile.TemporaryDirectory() as out:
        run = Timed(settings, dataset, Path(out), device)
        train.train(run, dataset, device, free_port() if page else None, 60, parts)
        began = time.perf_counter()
        Run.save(run, curves=True)
        saving = time.perf_counter() - began
    rates = dict(training=rate(marks[:-1]), saving=saving)  # the last was only read after its step
    began = time.perf_counter()
    train.evaluate(run.model, images, labels, size, settings)
    rates["evaluation"] = len(images) / (time.perf_counter() - began)
    marks = [time.perf_counter()]
    for batch in data.plan(len(images), BATCH, 0, 0, settings["shift"], settings["flip"], device):
        x = data.prepare(data.cropped(images, batch), size, settings["mean"], settings["std"])
        x[0, 0, 0, 0].item()  # waits for the device
        marks.append(time.perf_counter())
    return rates | dict(input=rate(marks))


def limits(precision, device):
    """What the machine can do: (operations a second when it multiplies matrices, bytes a second when it
    copies)."""
    dtype = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[precision]
    matrix = torch.randn(2048, 2048, device=device).to(dtype)
    block, copy = torch.zeros(2, 2**28, dtype=torch.uint8, device=device)

    def seconds(work):
        began = time.perf_counter()
        work().view(-1)[0].item()
        return time.perf_counter() - began

    product = min(seconds(lambda: matrix @ matrix) for _ in range(12))
    return 2 * 2048**3 / product, 2 * len(block) / min(seconds(lambda: copy.copy_(block)) for _ in range(12))


def peak_memory(device):
    """The most that this process ever had, in bytes: on a GPU what its tensors took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # which Windows has not

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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


def measure(pipeline, size, steps, option, name):
    """What a child prints."""
    device = torch.device(name) if pipeline == "usual" else cli.device(name)  # no settings for the usual
    with ranks.joined(device):
        pipelines = dict(usual=usual, ours=ours, page=functools.partial(ours, page=True))
        rates = pipelines[pipeline](int(size), int(steps), int(option), device)
        print(json.dumps(rates | dict(memory=peak_memory(device))))


def seconds_to_first_step(folder):
    """From the call of train.py, with the pictures in `folder` read before, until its first step begins."""
    code = "import os, sys, time, train; train.backward = lambda *_: (print(time.time()), os._exit(0)); "
    code += "sys.stdout.reconfigure(line_buffering=True); train.main(sys.argv[1:])"
    dataset = ["--data", folder] if data.is_there("cifar10", folder) else ["--dataset", "digits"]
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-c", code, "--no-visdom", "--out", out, *dataset]
        took = []
        for _ in range(4):  # the first one may have to decode the pictures
            began = time.time()
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            took.append(float(result.stdout.split()[-1]) - began)
    return statistics.median(took[1:])


def seconds_to_draw(iterations):
    """What the live page takes to draw so many iterations, its server's work included."""
    from Myvisdom import Page

    history = dict(loss=[1.0] * iterations, rate=[0.1] * iterations, clock=list(range(iterations)), epochs=[])
    settings = dict(name="throughput", sizes=[224], epochs=1, batch_size=BATCH)
    with Page(history, settings, data.CIFAR10_CLASSES, iterations, free_port()) as page:
        while page._drawn is None:
            time.sleep(0.1)
        took = []
        for _ in range(9):
            page._drawn, began = None, time.perf_counter()
            page._draw()
            took.append(time.perf_counter() - began)
    return statistics.median(took)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def middle(results, part):
    """(median, text with its spread) of a part of some results; memory in GB."""
    values = [result[part] / (1e9 if part == "memory" else 1) for result in results]
    median = statistics.median(values)
    return median, f"{median:10.1f} ({min(values):.1f}–{max(values):.1f})".ljust(24)


@cli.command
def main(argv=None):
    parser = cli.parser(__doc__, "data", "device")
    add, whole = parser.add_argument, cli.number(int, 1)
    sizes = list(train.RECIPES["fast"]["sizes"])[::-1]
    add("--sizes", type=cli.number(int, 32, 1024), nargs="+", default=sizes, metavar="PX")
    add("--steps", type=cli.number(int, 6), default=10, metavar="N", help="of 128 pictures (default: 10)")
    add("--rounds", type=whole, default=3, metavar="N", help="of every measurement (default: 3)")
    add("--workers", type=cli.number(int, 0), nargs="+", default=[0, 1, 2], metavar="N",
        help="of the usual DataLoader; the best is taken (default: 0 1 2)")  # fmt: skip
    add("--json", default="runs/throughput.json", metavar="FILE", help="default: runs/throughput.json")
    add("--child", nargs=5, help="what the script starts itself with")
    args = parser.parse_args(argv)
    if args.child:
        return measure(*args.child)
    device = cli.device(args.device)
    precision = cli.precision("auto", device)
    multiplied, copied = limits(precision, device)
    print(
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}: multiplies matrices, "
        f"{precision}, at {multiplied / 1e9:.0f} GFLOP/s; copies at {copied / 1e9:.1f} GB/s.\n"
        f"So what does fewer than {multiplied / copied:.0f} operations for each byte it moves (batch norms, "
        "ReLUs, sums) is bound by memory, and what does more (convolutions) by multiplying."
    )
    rows = []
    for size in args.sizes:
        tried = {n: child("usual", size, args.steps, n, device) for n in args.workers}
        workers = max(tried, key=lambda n: tried[n]["training"])
        results = dict(usual=[tried[workers]], ours=[child("ours", size, args.steps, 1, device)])
        for _ in range(args.rounds - 1):
            results["usual"].append(child("usual", size, args.steps, workers, device))
            results["ours"].append(child("ours", size, args.steps, 1, device))
        rows.append(dict(size=size, workers=workers, **results))
        print(f"\n{size} px{'usual pipeline':>34}{'ours':>24}{'ratio':>9}")
        for part in ("training", "evaluation", "input", "memory"):
            (usual_rate, text), (our_rate, our_text) = (middle(results[key], part) for key in results)
            unit = "peak GB" if part == "memory" else "images/s"
            print(f"  {part:<12}{unit:<10}{text}{our_text}{our_rate / usual_rate:6.2f}×")
        stages = {stage[0]: stage[4] for stage in table(size)}
        operations = 2 * (3 * stages["total"] - stages["conv1"])  # the pictures need no gradient
        training = middle(results["ours"], "training")[0]
        print(
            f"  the usual with {workers} workers; ours reaches {training * operations / multiplied:.0%} of "
            f"the matrix rate, and {training / middle(results['ours'], 'input')[0]:.1%} of its time is input",
            flush=True,
        )
    print(f"\ntrain.py at {args.sizes[0]} px, its batch of {BATCH} in parts (--accumulate):")
    in_parts = {}
    for parts in (2, 4):
        in_parts[parts] = result = child("ours", args.sizes[0], args.steps, parts, device)
        print(
            f"  {parts}: peak {result['memory'] / 1e9:.1f} GB, {result['training']:.1f} images/s", flush=True
        )
    scaling = {}
    if device.type == "cpu":
        for processes in (1, 2) * args.rounds:
            result = child("ours", args.sizes[-1], args.steps, 1, device, processes=processes)
            scaling.setdefault(processes, []).append(result)
        (one, text), (two, two_text) = (middle(scaling[processes], "training") for processes in (1, 2))
        print(
            f"torchrun at {args.sizes[-1]} px, one thread a process: 1 process {text.strip()} images/s, "
            f"2 processes {two_text.strip()}: {two / one:.2f}×"
        )
    ratios = []
    for _ in range(args.rounds + 1):
        page, without = (child(how, args.sizes[-1], 2 * args.steps, 1, device) for how in ("page", "ours"))
        ratios.append(page["training"] / without["training"])
    print(
        f"with the live page, {args.sizes[-1]} px: {statistics.median(ratios):.3f} × the images/s without it "
        f"({min(ratios):.3f}–{max(ratios):.3f}, pairs)",
        flush=True,
    )
    print(f"of every two seconds the page takes {seconds_to_draw(5850):.3f} to draw 5,850 iterations")
    saving = statistics.median(result["saving"] for row in rows for result in row["ours"])
    print(f"a save with its curves takes {saving:.2f} s: {saving / 300:.2%} of the five minutes between two")
    start = seconds_to_first_step(args.data)
    print(f"python train.py begins its first step after {start:.1f} s, with the pictures read before")
    cli.folder(Path(args.json).parent)
    machine = dict(precision=precision, multiplied=multiplied, copied=copied, start=start)
    result = dict(machine=machine, rows=rows, in_parts=in_parts, scaling=scaling, page=ratios)
    Path(args.json).write_text(json.dumps(result, indent=1))
    print(args.json)


if __name__ == "__main__":
    main()
