"""Train ResNet-18 on CIFAR-10 at 224×224, with live curves on a visdom page.

python train.py                        the default recipe, to runs/cifar10
python train.py --resume               continue it where it stopped
python train.py --recipe quick         a shorter one, which begins with images of 112×112
python train.py --recipe assignment    the report's own recipe
python train.py --init imagenet        start from ImageNet's weights, or from any other ResNet-18's
python train.py --dataset digits       try it all in two minutes, with no download
torchrun --nproc-per-node=4 train.py   with four processes, each with a CUDA GPU if there are any"""

import contextlib
import itertools
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.fx.experimental.optimization import fuse

from common import checkpoint, cli, data, distributed, figures, inside, weights
from common.device import autocast, describe, select_device, select_precision
from common.history import schedule
from common.network import network_from_flags
from common.page import client
from common.run import Run, archive_previous, load_for_resume, locked

STANDARD = dict(
    epochs=11,  # passes over the training set
    batch_size=128,  # images a step
    sizes={224: 1.0},  # px: share of the epochs
    lr=0.1,  # peak of the one-cycle learning rate
    warmup=0.2,  # share of the run in which the rate rises to its peak; then it falls to 0
    momentum=0.9,
    nesterov=True,  # Nesterov momentum
    muon_lr_factor=0.2,  # Muon trains the convolutions, at this multiple of the rate; SGD trains the rest
    weight_decay=5e-4,  # on weights that SGD trains: not on biases and batch norms
    label_smoothing=0.1,  # share of the target spread evenly over all classes; in the training loss only
    shift=4,  # px of 32: images are cropped up to this far off centre
    flip=True,  # half of the images, left to right (never digits)
    mean=(0.4914, 0.4822, 0.4465),  # CIFAR-10's own, per channel, of values from 0 to 1
    std=(0.2470, 0.2435, 0.2616),  # likewise
)
RECIPES = {
    "standard": STANDARD,
    "quick": STANDARD | dict(epochs=5, sizes={112: 0.6, 224: 0.4}, muon_lr_factor=0.3),
    "digits": STANDARD  # small batches, since there are only 1,437 images
    | dict(epochs=7, batch_size=32, sizes={40: 1.0}, lr=0.013, muon_lr_factor=None, shift=2, flip=False),
    "assignment": dict(  # what the report did
        epochs=25,  # 9,765 iterations by the report's count
        batch_size=128,
        sizes={224: 1.0},  # every step at 224
        lr=0.01,
        warmup=None,  # the learning rate is constant
        momentum=0.9,
        nesterov=False,
        muon_lr_factor=None,  # SGD trains all
        weight_decay=0.0,  # none
        label_smoothing=0.0,  # none
        shift=0,  # no augmentation
        flip=False,
        mean=(0.5, 0.5, 0.5),  # values from -1 to 1
        std=(0.5, 0.5, 0.5),
    ),
}
EVALUATED = "weights", "mean", "std", "classes"  # flags that say what --evaluate evaluates
EVALUATION_BATCH = 128  # more is slower on a CPU: the activations no longer fit its caches


def parse(argv):
    """The flags, with --out as a path."""
    parser = cli.parser(__doc__, "data", "dataset", *EVALUATED, "device", "port")
    add, whole, real = parser.add_argument, cli.number(int, 1), cli.number(float, 0)
    add("--recipe", choices=list(RECIPES), help="the settings to train with (default: standard, or digits)")
    add("--epochs", type=cli.number(int, 1, 100_000), metavar="N", help="passes over the data (default: the "
        "recipe's)")  # fmt: skip
    add("--batch-size", type=cli.number(int, 2), metavar="N", help="images in a step (default: the recipe's)")
    add("--size", type=cli.number(int, 32, 1024), metavar="PX", help="image size, in all epochs or to "
        "--evaluate at")  # fmt: skip
    add("--lr", type=real, help="the (peak) learning rate (default: the recipe's)")
    add("--seed", type=cli.number(int, 0, 2**31), metavar="N", help="seed of everything random (default: 0)")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], help="number format (default: auto)")
    add("--limit", type=cli.number(int, 2), metavar="N", help="train on the first N images only")
    add("--holdout", type=whole, metavar="N", help="evaluate on the last N training images, held out")
    add("--out", metavar="DIR", help="where the run is written (default: runs/<dataset>); with "
        "--evaluate, the confusion matrix and the mistakes (default: figures)")  # fmt: skip
    add("--resume", action="store_true", help="continue the run in --out")
    add("--init", metavar="FILE", help="start from these weights instead of random ones: as --weights of the "
        "other scripts, imagenet too")  # fmt: skip
    add("--save-every", type=real, default=5, metavar="MINUTES", help="save within an epoch too (default: 5)")
    add("--evaluate", action="store_true", help="evaluate --weights and train nothing")
    add("--accumulate", type=whole, default=1, metavar="K", help="split each batch into K micro-batches")
    add("--sync-bn", action="store_true", help="batch norms see the whole batch (with torchrun on CUDA only)")
    add("--no-visdom", action="store_true", help="no live page")
    args = parser.parse_args(argv)
    given = {name for name, value in vars(args).items() if value is not None}
    if not args.evaluate and (useless := given.intersection(EVALUATED)):
        parser.error(f"--{min(useless)} goes with --evaluate")
    if args.resume + args.evaluate + bool(args.init) > 1:
        parser.error("--resume, --evaluate and --init exclude each other")
    if args.evaluate and (useless := given & {"recipe", "epochs", "batch_size", "lr", "seed", "limit"}):
        parser.error(f"--{min(useless).replace('_', '-')} is for training, not for --evaluate")
    if args.sync_bn and not (distributed.WORLD_SIZE > 1 and torch.cuda.is_available()):
        parser.error("--sync-bn needs torchrun and CUDA: leave it out")
    args.out = Path(args.out or ("figures" if args.evaluate else f"runs/{args.dataset}"))
    return args


def new_settings(args, device):
    """The settings of a new run: its recipe's, with what the flags change."""
    default = "digits" if args.dataset == "digits" else "standard"
    settings = dict(recipe=args.recipe or default, dataset=args.dataset)
    settings |= RECIPES[settings["recipe"]]
    for key in ("epochs", "batch_size", "lr"):
        if getattr(args, key) is not None:
            settings[key] = getattr(args, key)
    settings["sizes"] = sizes_by_epoch(settings["sizes"], settings["epochs"])
    if args.size:
        settings["sizes"] = [args.size] * settings["epochs"]
    settings["flip"] &= args.dataset != "digits"
    settings["precision"] = select_precision(args.precision or "auto", device)
    processes = distributed.WORLD_SIZE
    settings["machine"] = f"{processes} × " * (processes > 1) + describe(device)
    return settings | dict(seed=args.seed or 0, limit=args.limit, holdout=args.holdout, init=args.init)


def sizes_by_epoch(shares, epochs):
    """The size of each epoch's images, by each size's share of the epochs; the last one is never left out.
    {96: 0.5, 224: 0.5}, 4 → [96, 96, 224, 224]"""
    ends = itertools.accumulate(shares.values())
    sizes = []
    for size, end in zip(shares, ends):
        sizes += [size] * (round(end * epochs) - len(sizes))
    return sizes[:-1] + [list(shares)[-1]]


def learning_rate(settings, progress):
    """The learning rate when the run is `progress` (0 … 1) through: one cycle, rising linearly to its peak
    and falling linearly to 0 (Smith 2018, https://arxiv.org/abs/1803.09820), or constant."""
    lr, warmup = settings["lr"], settings["warmup"]
    if warmup is None:
        return lr
    return lr * min(progress / warmup, (1 - progress) / (1 - warmup))


@torch.inference_mode()
def evaluate(model, images, labels, size, settings, progress=""):
    """(mean cross-entropy loss, accuracy 0 … 1, logits float32 [N, classes]) for uint8 images [N, 3, 32, 32]
    resized to `size`, and labels int64 [N], shared by the processes. `progress` names the progress bar."""
    model = fuse(model.eval())  # a copy, whose convolutions do the work of the batch norms after them
    logits, quiet = [], not progress or distributed.RANK > 0
    for x in cli.progress_bar(distributed.shard(images).split(EVALUATION_BATCH), progress, disable=quiet):
        x = data.normalize_and_resize(x, size, settings["mean"], settings["std"])
        with autocast(images.device, settings["precision"]):
            logits.append(model(x).float())
    logits = distributed.all_gather(torch.cat(logits), len(images))
    accuracy = (logits.argmax(1) == labels).float().mean()
    return float(F.cross_entropy(logits, labels)), float(accuracy), logits


def backward(model, images, labels, batch, size, settings, scaler, micro_batches=1):
    """Adds the gradient of the mean loss of `batch`, a `data.Batch` of uint8 images [N, 3, 32, 32] and labels
    int64 [N], to the weights' `grad`. Each process takes its shard of the batch, in `micro_batches` parts one
    after the other. Returns the batch's mean [loss, accuracy], a tensor."""
    count, result = len(batch.indices), torch.zeros(2, device=images.device)
    shards = [distributed.shard(field).tensor_split(micro_batches) for field in batch]
    for i in range(micro_batches):
        part = data.Batch(*(field[i] for field in shards))
        x = data.augment(images, part)
        x = data.normalize_and_resize(x, size, settings["mean"], settings["std"])
        y = labels[part.indices]
        with distributed.sync_gradients(model, enabled=i == micro_batches - 1):
            with autocast(images.device, settings["precision"]):
                logits = model(x)
            logits = logits.float()
            loss = F.cross_entropy(logits, y, label_smoothing=settings["label_smoothing"], reduction="sum")
            # The processes' gradients are averaged, hence the factor.
            scaler.scale(loss * distributed.WORLD_SIZE / count).backward()
        result += torch.stack((loss.detach(), (logits.argmax(1) == y).sum())) / count
    return distributed.all_reduce_sum(result)


class NoPage(contextlib.nullcontext):
    """Stands in for `Myvisdom.Page` where a run has no live page: it takes the same, and does nothing."""

    def __init__(self, *args):
        super().__init__()

    def evaluated(self, *args):
        pass


def train(run, dataset, page, save_every, micro_batches=1, sync_bn=False):
    """Trains `run` to its end, saving it after each epoch and every `save_every` minutes; `micro_batches` are
    those of `backward`. Ctrl-C, SIGTERM and a closed terminal end it after a step, saved. Returns the signal
    that ended it or 0. Raises `UserError` when a loss or the weights are not finite, and when it cannot save
    the run at its start or end."""
    model = distributed.data_parallel(run.model, sync_bn)
    pixels = np.repeat(run.settings["sizes"], run.steps) ** 2  # of an iteration, a measure of its time
    work = np.append(0, pixels.cumsum())  # done after 0, 1, 2, … iterations
    first, began, stop = run.iteration, time.monotonic(), 0
    with cli.stop_signals() as signals, page:

        def stop_signal():  # that any of the processes has received, or 0
            return distributed.all_reduce_max(max(signals, default=0))

        def show_latest(bar):  # and the time left in the run, once the history has a step of this session
            done, left = work[run.iteration] - work[first], work[-1] - work[run.iteration]
            if done:
                page.eta = bar.format_interval((time.monotonic() - began) * left / done)
                loss, accuracy = (run.history[key][-1] for key in ("loss", "accuracy"))
                latest = f"run {page.eta} left, loss {loss:.3f}, accuracy {accuracy:.1%}"
                bar.set_postfix_str(latest, refresh=False)

        run.save(required=True)  # fails now if nothing can be written
        for epoch in range(len(run.history["epochs"]), run.settings["epochs"]):
            stop = train_epoch(
                run, model, dataset, epoch, stop_signal, show_latest, save_every, micro_batches
            )
            if not stop:
                evaluate_epoch(run, dataset, epoch, page)
                stop = stop_signal()
            if stop:
                break
        if stop or run.save_failed:
            run.save(curves=True, required=True)
    return stop


def train_epoch(run, model, dataset, epoch, stop_signal, show_latest, save_every, micro_batches):
    """Takes the steps of an epoch that the run has not taken yet. Returns the signal that ended it, or 0."""
    images, labels, settings = dataset.train_images, dataset.train_labels, run.settings
    size, augmentation = settings["sizes"][epoch], dict(shift=settings["shift"], flip=settings["flip"])
    batches = data.epoch_batches(
        len(images), run.batch_size, settings["seed"], epoch, **augmentation, device=images.device
    )
    first, stop = run.iteration - epoch * run.steps, 0  # first is not 0 when resumed within the epoch
    bar = cli.progress_bar(
        desc=f"epoch {epoch + 1}/{settings['epochs']}", unit=" images",
        bar_format="{desc}: {percentage:.0f}%{postfix}, {rate_fmt} {bar}",  # what counts most in 80 columns
        total=run.steps * run.batch_size, initial=first * run.batch_size, disable=distributed.RANK > 0,
    )  # fmt: skip
    model.train()
    with bar:
        for iteration, batch in enumerate(batches[first:], run.iteration):
            lr = learning_rate(settings, iteration / (run.steps * settings["epochs"]))
            run.set_learning_rate(lr)
            run.model.zero_grad()
            result = backward(model, images, labels, batch, size, settings, run.scaler, micro_batches)
            for optimizer in run.optimizers.values():
                run.scaler.step(optimizer)
            run.scaler.update()

            run.record(result, lr)
            show_latest(bar)
            bar.update(run.batch_size)
            if stop := stop_signal():
                break
            if time.monotonic() - run.saved_at > 60 * save_every:
                run.save()
    run.read_pending()
    return stop


def evaluate_epoch(run, dataset, epoch, page):
    """Evaluates the network after an epoch, at that epoch's size and in the second half of the run at the
    last size too, since that is where it will be used. Saves the run and prints a line."""
    settings, images, labels = run.settings, dataset.test_images, dataset.test_labels
    size, last_size, epochs = settings["sizes"][epoch], settings["sizes"][-1], settings["epochs"]
    distributed.broadcast_buffers(run.model)
    loss, accuracy, logits = evaluate(run.model, images, labels, size, settings, "evaluating")
    page.evaluated(run.model, images, labels, logits, size)
    last_size_accuracy, at_last_size = accuracy if size == last_size else None, ""
    if size != last_size and 2 * epoch >= epochs:
        progress = f"evaluating at {last_size} px"
        _, last_size_accuracy, _ = evaluate(run.model, images, labels, last_size, settings, progress)
        at_last_size = f" ({last_size_accuracy:.2%} at {last_size} px)"
    row = run.end_epoch(size, loss, accuracy, last_size_accuracy)
    run.save(curves=True)
    train = f"train loss {row['train_loss']:.3f}, accuracy {row['train_accuracy']:6.2%}"
    test = f"test loss {loss:.3f}, accuracy {accuracy:6.2%}{at_last_size}"
    print(f"epoch {epoch + 1:2}/{epochs}  {size} px  {train}  {test}  {row['seconds']:.0f} s", flush=True)


def report_accuracy(model, dataset, split, size, settings):
    """Evaluates on "training" or `dataset.test_split`, prints the result; returns (accuracy, logits)."""
    images, labels = dataset[:2] if split == "training" else dataset[2:4]
    loss, accuracy, logits = evaluate(model, images, labels, size, settings, f"evaluating, {split} set")
    what = f"{split} set, {len(labels):,} images of {dataset.source} at {size} px"
    print(f"{what}: accuracy {accuracy:.2%}, loss {loss:.3f}")
    return accuracy, logits


def load_data(args, settings, device, classes=None):
    """The data set of a run on `device`, as --limit and --holdout say; `classes` as in `data.load`."""
    splits = ["train"] if settings["holdout"] else ["test"] if args.evaluate else data.SPLITS
    with distributed.local_main_first():
        images, labels, *test, classes, source, split = data.load(args.dataset, args.data, classes, splits)
    if count := settings["holdout"]:
        if count > len(images) - 2:
            raise cli.UserError(f"--holdout {count} leaves no images to train on")
        test, split = (images[-count:], labels[-count:]), "held-out"
        images, labels = images[:-count], labels[:-count]
    tensors = images[: settings["limit"]], labels[: settings["limit"]], *test
    return data.Dataset(*(tensor.to(device) for tensor in tensors), classes, source, split)


def select_page(args):
    """The class of the run's page. Raises `UserError` if another program has the port."""
    if args.no_visdom or distributed.RANK:
        return NoPage
    try:
        from Myvisdom import Page
    except ImportError as error:
        print(f"no live page, since {error.name} is not installed: pip install -r requirements.txt")
        return NoPage
    client.is_listening(args.port)  # an error now rather than later
    return Page


def non_default_flags(args, **defaults):
    """Those flags that differ from their defaults, to be typed again: " --dataset digits"."""
    values = {name: str(getattr(args, name)) for name in defaults}
    changed = (name for name in defaults if values[name] != defaults[name])
    return "".join(f" --{name.replace('_', '-')} {cli.quote(values[name])}" for name in changed)


def resume_command(args):
    """The command that resumes the run that these flags started."""
    processes = distributed.LOCAL_WORLD_SIZE
    start = "python" if distributed.WORLD_SIZE == 1 else f"torchrun --nproc-per-node={processes}"
    if distributed.WORLD_SIZE > processes:  # on several machines, whose flags only torchrun knows
        start = "torchrun …"
    defaults = dict(out=str(Path("runs", args.dataset)), dataset="cifar10", data="data", device="auto")
    flags = non_default_flags(args, **defaults, accumulate="1", save_every="5", port="8097")
    return f"{start} train.py --resume{flags}{' --sync-bn' * args.sync_bn}{' --no-visdom' * args.no_visdom}"


@cli.ignore_output_errors()
def start_or_resume(args, device):
    """Starts the run that the flags ask for, or goes on with it; returns the script's exit status."""
    main_resumes = args.resume and not distributed.RANK
    saved = distributed.broadcast_object(load_for_resume(args) if main_resumes else None)
    settings = saved["settings"] if saved else new_settings(args, device)
    select_precision(settings["precision"], device)  # or an error: a run may be resumed on another device
    folder = re.sub(r"[^\w.-]+", "_", args.out.resolve().name)  # it becomes part of the page's address
    settings.setdefault("name", f"{folder}_{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    dataset = load_data(args, settings, device)
    count, processes = len(dataset.train_images), distributed.WORLD_SIZE
    if settings.setdefault("pictures", count) != count:
        trained = f"the run in {args.out} has {settings['pictures']} training images"
        raise cli.UserError(f"{trained}, {args.data} now has {count}: resume it with the same --data")
    least = 2 * processes * args.accumulate  # batch norm needs two images
    if min(settings["batch_size"], count) < least:
        need = f"{processes} process{'es' * (processes > 1)} and --accumulate {args.accumulate}"
        raise cli.UserError(f"{least} images a batch are the least for {need}: take a larger --batch-size")
    sizes, times = settings["sizes"], f" × {processes}" if processes > 1 else ""
    print(f"ResNet-18 on {dataset.source}: {count:,} training images, {len(dataset.test_images):,} "
          f"{dataset.test_split} images; {device}{times}, {settings['precision']}; to {args.out}\n"
          f"recipe {settings['recipe']}: {schedule(sizes)}; batch {settings['batch_size']}, "
          f"learning rate {settings['lr']}"
          + (f"; from the weights in {settings['init']}" if settings.get("init") else ""))  # fmt: skip
    init = weights.read(args.init, "--init")[0] if args.init else None
    page_class = select_page(args)
    with contextlib.ExitStack() as stack:
        if distributed.RANK == 0:
            stack.enter_context(locked(cli.make_folder(args.out)))
            if not saved:
                archive_previous(args.out)
        run = Run(settings, dataset, args.out, device, saved, init)
        stack.enter_context(run.explain_failures(args.accumulate))
        page_settings = settings | dict(device=str(device), schedule=schedule(sizes))
        page_settings["images"] = page_settings.pop("pictures")
        page_settings |= dict(batch_size=run.batch_size, weights=str(args.out / "weights.pt"), data=args.data)
        page = page_class(run.history, page_settings, dataset.classes, run.steps, args.port)
        signal_number = train(run, dataset, page, args.save_every, args.accumulate, args.sync_bn)
    if signal_number:
        print(f"stopped and saved; resume with: {resume_command(args)}")
        return 128 + signal_number
    for split in "training", dataset.test_split:
        _, logits = report_accuracy(run.model, dataset, split, sizes[-1], settings)
    if distributed.RANK == 0:
        counts = figures.confusion_matrix(dataset.test_labels, logits).tolist()
        rows = [["class", *dataset.classes], *([name, *row] for name, row in zip(dataset.classes, counts))]
        print(checkpoint.save_table(rows, args.out / "confusion.csv"))
    flag = f"--weights {cli.quote(str(args.out / 'weights.pt'))}"
    flags = non_default_flags(args, dataset="cifar10", data="data", device="auto", port="8097")
    print(f"look inside it: python test_recon_conv5.py {flag}{flags}")
    print(f"by clicking:    python Myvisdom.py --explore {flag}{flags}")
    print(f"its page again: python Myvisdom.py{cli.port_flag(args.port)}")


def evaluate_weights(args, device):
    """--evaluate: prints the accuracy of a network, of each class too, and draws its confusion matrix."""
    network = network_from_flags(args)
    dataset = load_data(args, dict(holdout=args.holdout, limit=None), device, network.classes)
    precision = select_precision(args.precision or "auto", device)
    settings = dict(mean=network.mean, std=network.std, precision=precision)
    accuracy, logits = report_accuracy(network.model, dataset, dataset.test_split, network.size, settings)
    if distributed.RANK:
        return  # the first process reports
    counts = figures.confusion_matrix(dataset.test_labels, logits)
    title = f"Confusion matrix of the {dataset.test_split} set (accuracy {accuracy:.2%})"
    client.save_figure(figures.confusion(counts, dataset.classes, title), args, "confusion.png")
    mistakes = inside.mistakes(dataset.test_labels, logits, dataset.classes)
    rows = [[*row[:3], f"{row[3]:.4f}"] for row in mistakes]
    rows.insert(0, ["number", "class", "predicted", "confidence"])
    print(checkpoint.save_table(rows, args.out / "mistakes.csv"))
    if mistakes:
        flags = non_default_flags(args, weights="None", dataset="cifar10", data="data")
        shown = dataset.test_split == "test" and not network.photographs  # by its number
        command = f"python -m extras.decision --image NUMBER{flags}" if shown else None
        sheet = figures.mistakes(dataset.test_images, mistakes, dataset.test_split, command)
        client.save_figure(sheet, args, "mistakes.png")
    for name, row, correct in zip(dataset.classes, counts, counts.diagonal()):
        print(f"  {name:<12}{correct:>6,} of {row.sum():,} right, {correct / row.sum().clamp(min=1):.1%}")


@cli.command
def main(argv=None):
    args = parse(argv)
    device = select_device(args.device)
    with distributed.process_group(device):
        return evaluate_weights(args, device) if args.evaluate else start_or_resume(args, device)


if __name__ == "__main__":
    sys.exit(main())
