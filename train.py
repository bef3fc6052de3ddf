"""Train ResNet-18 on CIFAR-10 at 224×224, with live curves on a visdom page.

python train.py                        the default recipe, to runs/cifar10
python train.py --resume               go on with it where it stopped
python train.py --recipe assignment    the report's own recipe
python train.py --dataset digits --epochs 10 --size 64    try it all in minutes, with no download
torchrun --nproc-per-node=4 train.py   with four processes, of a GPU each where there are GPUs"""

import contextlib
import itertools
import re
import shlex
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.fx.experimental.optimization import fuse
from tqdm import tqdm

from common import cli, data, figures, inside, ranks
from common.run import Run, alone, resumed, schedule, set_aside

RECIPES = {
    "fast": dict(
        epochs=23,  # passes over the training set
        batch_size=128,  # pictures a step
        sizes={96: 0.33, 128: 0.33, 160: 0.17, 224: 0.17},  # px: share of the epochs
        lr=0.1,  # peak of the one-cycle rate
        warmup=0.2,  # share of the run in which the rate rises to its peak; then it falls to 0
        momentum=0.9,  # of SGD
        nesterov=True,  # Nesterov's form of it
        weight_decay=5e-4,  # on weights only: not on biases and batch norms
        label_smoothing=0.1,  # share of the target that goes to all classes alike; in the training loss only
        shift=4,  # px of 32: pictures are cropped up to this far off centre
        flip=True,  # half of the pictures, left to right (never digits)
        mean=(0.4914, 0.4822, 0.4465),  # CIFAR-10's own, per channel, of values from 0 to 1
        std=(0.2470, 0.2435, 0.2616),  # likewise
    ),
    "assignment": dict(  # what the report did
        epochs=25,  # 9,765 iterations by the report's count
        batch_size=128,
        sizes={224: 1.0},  # every step at 224
        lr=0.01,
        warmup=None,  # the rate is constant
        momentum=0.9,
        nesterov=False,
        weight_decay=0.0,  # none
        label_smoothing=0.0,  # none
        shift=0,  # no augmentation
        flip=False,
        mean=(0.5, 0.5, 0.5),  # values from -1 to 1
        std=(0.5, 0.5, 0.5),
    ),
}
EVALUATION_BATCH = 128  # more is slower on a CPU: what passes through the network no longer fits its caches


def parse(argv):
    """The flags, with --out as a path."""
    parser = cli.parser(__doc__, "data", "dataset", "weights", "device", "port")
    add, whole, real = parser.add_argument, cli.number(int, 1), cli.number(float, 0)
    add("--recipe", choices=list(RECIPES), help="the settings to train with (default: fast)")
    add("--epochs", type=cli.number(int, 1, 100_000), metavar="N", help="passes over the training set "
        "(default: 23; recipe assignment: 25)")  # fmt: skip
    add("--batch-size", type=cli.number(int, 2), metavar="N", help="pictures a step (default: 128)")
    add("--size", type=cli.number(int, 32, 1024), metavar="PX", help="one size for all epochs")
    add("--lr", type=real, help="the (peak) learning rate (default: the recipe's)")
    add("--seed", type=cli.number(int, 0, 2**31), metavar="N", help="of all that is random (default: 0)")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], help="the number format (default: auto, by "
        "the device)")  # fmt: skip
    add("--limit", type=cli.number(int, 2), metavar="N", help="train on the first N pictures only")
    add("--holdout", type=whole, metavar="N", help="hold the last N training pictures out, and "
        "evaluate on them instead of the test set")  # fmt: skip
    add("--out", metavar="DIR", help="where the run is written (default: runs/<dataset>); with "
        "--evaluate, the confusion matrix (default: figures)")  # fmt: skip
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--save-every", type=real, default=5, metavar="MINUTES", help="save within an epoch too (default: 5)")
    add("--evaluate", action="store_true", help="only evaluate --weights")
    add("--accumulate", type=whole, default=1, metavar="K", help="take each batch in K parts, one after the "
        "other, to save memory")  # fmt: skip
    add("--sync-bn", action="store_true", help="with torchrun on CUDA: batch norms see the whole batch")
    add("--no-visdom", action="store_true", help="no live page")
    args = parser.parse_args(argv)
    if args.weights and not args.evaluate:
        parser.error("--weights goes with --evaluate")
    if args.resume and args.evaluate:
        parser.error("--resume and --evaluate exclude each other")
    if args.sync_bn and not (ranks.WORLD > 1 and torch.cuda.is_available()):
        parser.error("--sync-bn needs torchrun and CUDA: leave it out")
    args.out = Path(args.out or ("figures" if args.evaluate else f"runs/{args.dataset}"))
    return args


def new_settings(args, device):
    """The settings of a new run: its recipe's, with what the flags change."""
    settings = dict(recipe=args.recipe or "fast", dataset=args.dataset)
    settings |= RECIPES[settings["recipe"]]
    for key in ("epochs", "batch_size", "lr"):
        if getattr(args, key) is not None:
            settings[key] = getattr(args, key)
    settings["sizes"] = sizes_by_epoch(settings["sizes"], settings["epochs"])
    if args.size:
        settings["sizes"] = [args.size] * settings["epochs"]
    settings["flip"] &= args.dataset != "digits"
    settings["precision"] = cli.precision(args.precision or "auto", device)
    return settings | dict(seed=args.seed or 0, limit=args.limit, holdout=args.holdout)


def sizes_by_epoch(shares, epochs):
    """The size of each epoch's pictures, by each size's share of the epochs; the last one is never
    left out. {96: 0.5, 224: 0.5}, 4 → [96, 96, 224, 224]"""
    ends = itertools.accumulate(shares.values())
    sizes = []
    for size, end in zip(shares, ends):
        sizes += [size] * (round(end * epochs) - len(sizes))
    return sizes[:-1] + [list(shares)[-1]]


def rate(settings, progress):
    """The learning rate when the run is `progress` (0 … 1) through: one cycle, rising linearly to
    its peak and falling linearly to 0 (Smith 2018, https://arxiv.org/abs/1803.09820), or constant."""
    lr, warmup = settings["lr"], settings["warmup"]
    if warmup is None:
        return lr
    return lr * min(progress / warmup, (1 - progress) / (1 - warmup))


@torch.inference_mode()
def evaluate(model, images, labels, size, settings, progress=""):
    """(mean cross-entropy loss, accuracy 0 … 1, logits float32 [N, classes]) for uint8 images [N, 3, 32, 32]
    resized to `size`; no augmentation. `progress` names the progress bar. Of many processes each takes its
    share; all get all logits."""
    model = fuse(model.eval())  # a copy, whose convolutions do the work of the batch norms after them
    logits, quiet = [], not progress or ranks.RANK > 0
    for x in tqdm(ranks.share(images).split(EVALUATION_BATCH), progress, leave=False, disable=quiet):
        x = data.prepare(x, size, settings["mean"], settings["std"])
        with cli.autocast(images.device, settings["precision"]):
            logits.append(model(x).float())
    logits = ranks.gathered(torch.cat(logits), len(images))
    accuracy = (logits.argmax(1) == labels).float().mean()
    return float(F.cross_entropy(logits, labels)), float(accuracy), logits


def backward(model, images, labels, batch, size, settings, scaler, parts=1):
    """Adds the gradient of a batch's mean loss to the weights' `grad`: the sum over all processes, each of
    which takes its share of the batch, and over its `parts`, one after the other. Returns the mean [loss,
    accuracy] of the batch, as a tensor."""
    count, result = len(batch.order), torch.zeros(2, device=images.device)
    mine = (ranks.share(field).tensor_split(parts) for field in batch)
    for part, chunk in enumerate(map(data.Batch._make, zip(*mine)), 1):
        x = data.cropped(images, chunk)
        x = data.prepare(x, size, settings["mean"], settings["std"])
        y = labels[chunk.order]
        with ranks.meeting(model, part == parts):
            with cli.autocast(images.device, settings["precision"]):
                logits = model(x)
            logits = logits.float()
            loss = F.cross_entropy(logits, y, label_smoothing=settings["label_smoothing"], reduction="sum")
            scaler.scale(loss * ranks.WORLD / count).backward()  # the processes' mean is the batch's
        result += torch.stack((loss.detach(), (logits.argmax(1) == y).sum())) / count
    return ranks.add_up(result)


def train(run, dataset, device, port, save_every, parts=1, sync_bn=False):
    """Trains `run` to its end, saving it after each epoch and every `save_every` minutes; `port` is
    visdom's, or None; `parts` are those of `backward`. Ctrl-C and SIGTERM end it after a step, saved. Returns
    the signal that ended it, or 0. Raises `UserError` when the loss is no longer finite, and when the run
    cannot be saved at its start or its end."""
    images, labels, test_images, test_labels = dataset[:4]
    optimizer, scaler, settings = run.optimizer, run.scaler, run.settings
    model = ranks.parallel(run.model, sync_bn)
    epochs, sizes, steps = settings["epochs"], settings["sizes"], run.steps
    batch_size = min(settings["batch_size"], len(images))
    work = [size * size for size in sizes]  # of an epoch: it grows with the pixels
    work_done, began, stop = 0.0, time.time(), 0  # in this process

    with cli.stop_signals() as signals, contextlib.ExitStack() as stack:
        if port:
            from Myvisdom import Page

            shown = settings | dict(device=str(device), batch_size=batch_size)
            page = stack.enter_context(Page(run.history, shown, dataset.classes, steps, port))
        run.save(insist=True)  # what cannot be written is said now
        for epoch in range(len(run.history["epochs"]), epochs):
            size = sizes[epoch]
            model.train()
            first = run.iteration - epoch * steps  # not 0 when resumed within the epoch
            plan = data.plan(
                len(images), batch_size, settings["seed"], epoch, settings["shift"], settings["flip"], device
            )
            bar = stack.enter_context(tqdm(
                total=steps * batch_size, initial=first * batch_size, unit=" images", leave=False,
                desc=f"epoch {epoch + 1}/{epochs}, {size} px", dynamic_ncols=True, disable=ranks.RANK > 0,
            ))  # fmt: skip
            run.mark = time.perf_counter()
            unread = None  # the last step's result: read while the device does the next step
            for step, batch in enumerate(plan[first:], first):
                lr = rate(settings, (epoch * steps + step) / (steps * epochs))
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.zero_grad()
                result = backward(model, images, labels, batch, size, settings, scaler, parts)
                scaler.step(optimizer)
                scaler.update()

                if unread:
                    run.record(*unread[0].tolist(), unread[1])
                unread = result, lr
                work_done += work[epoch] / steps
                to_do = sum(work[epoch:]) - work[epoch] * (step + 1) / steps
                left = tqdm.format_interval((time.time() - began) * to_do / work_done)
                if run.iteration:
                    last = f"loss {run.history['loss'][-1]:.3f}, accuracy {run.history['accuracy'][-1]:.1%}"
                    bar.set_postfix_str(f"{last}, run {left} left", refresh=False)
                if port:
                    page.left = left
                bar.update(batch_size)
                if stop := ranks.largest(max(signals, default=0)):
                    break
                if time.time() - run.saved_at > 60 * save_every:
                    run.record(*unread[0].tolist(), lr)
                    unread = None
                    run.save()
                    run.mark = time.perf_counter()
            if unread:
                run.record(*unread[0].tolist(), unread[1])
            bar.close()
            if stop:
                break

            ranks.same_buffers(run.model)
            test_loss, test_accuracy, logits = evaluate(
                run.model, test_images, test_labels, size, settings, "evaluating"
            )
            if port:
                page.evaluated = test_images, test_labels, logits
            # The second half is evaluated at the last size too: that is where the network will be used.
            last_size_accuracy, at_last_size = test_accuracy if size == sizes[-1] else None, ""
            if last_size_accuracy is None and 2 * epoch >= epochs:
                _, last_size_accuracy, _ = evaluate(
                    run.model, test_images, test_labels, sizes[-1], settings, f"evaluating at {sizes[-1]} px"
                )
                at_last_size = f" ({last_size_accuracy:.2%} at {sizes[-1]} px)"
            row = run.end_epoch(
                size, test_loss=test_loss, test_accuracy=test_accuracy, last_size_accuracy=last_size_accuracy
            )
            run.save(curves=True)
            print(
                f"epoch {row['epoch']:2}/{epochs}  {size} px  train loss {row['train_loss']:.3f}, "
                f"accuracy {row['train_accuracy']:6.2%}  test loss {test_loss:.3f}, "
                f"accuracy {test_accuracy:6.2%}{at_last_size}  {row['seconds']:.0f} s",
                flush=True,
            )
            if stop := ranks.largest(max(signals, default=0)):
                break
        if stop or run.unsaved:
            run.save(curves=True, insist=True)
    return stop


def load_data(args, settings, device):
    """The data set of a run on `device`, as --limit and --holdout say."""
    with ranks.first_ahead():
        images, labels, *test, classes, source = data.load(args.dataset, args.data)
    if held := settings["holdout"]:
        if held > len(images) - 2:
            raise cli.UserError(f"--holdout {held} leaves no pictures to train on")
        test = images[-held:], labels[-held:]
        images, labels = images[:-held], labels[:-held]
    parts = images[: settings["limit"]], labels[: settings["limit"]], *test
    return data.Dataset(*(part.to(device) for part in parts), classes, source)


def start_up_lines(settings, dataset, out, device):
    """What this run is going to do, in two lines."""
    times = f" × {ranks.WORLD}" if ranks.WORLD > 1 else ""
    hint = "" if len(set(settings["sizes"])) == 1 else " (--size 224: every step at 224 px)"
    return (
        f"ResNet-18 on {dataset.source}: {len(dataset.train_images):,} pictures to train on, "
        f"{len(dataset.test_images):,} {'held out' if settings['holdout'] else 'to test'}; "
        f"{device}{times}, {settings['precision']}; to {out}\n"
        f"recipe {settings['recipe']}: {settings['epochs']} epochs, {schedule(settings['sizes'])}{hint}; "
        f"batch {settings['batch_size']}, rate {settings['lr']}"
    )


def live_page(port):
    """The port that the live page can have, or None where visdom is not installed. Raises `UserError` if
    another program has it."""
    try:
        from Myvisdom import listening
    except ImportError as error:
        print(f"no live page, since {error.name} is not installed: pip install -r requirements.txt")
        return None
    listening(port)  # an error now rather than later
    return port


@cli.command
def main(argv=None):
    args = parse(argv)
    device = cli.device(args.device)
    with ranks.joined(device):
        return evaluate_weights(args, device) if args.evaluate else run_to_its_end(args, device)


def unusual(args, **usual):
    """Those flags that are not as usual, to be typed again: " --dataset digits"."""
    values = {name: str(getattr(args, name)) for name in usual}
    return "".join(f" --{name} {shlex.quote(values[name])}" for name in usual if values[name] != usual[name])


def resume_command(args):
    """What goes on with the run that these flags started."""
    start = "python" if ranks.WORLD == 1 else f"torchrun --nproc-per-node={ranks.LOCAL_WORLD}"
    usual = dict(out=f"runs/{args.dataset}", dataset="cifar10", data="data", device="auto", accumulate="1")
    return f"{start} train.py --resume{unusual(args, **usual)}{' --sync-bn' * args.sync_bn}"


@cli.lines_may_be_lost()
def run_to_its_end(args, device):
    """Starts the run that the flags ask for, or goes on with it; returns the script's exit status."""
    saved = ranks.of_first(resumed(args) if args.resume and not ranks.RANK else None)
    settings = saved["settings"] if saved else new_settings(args, device)
    folder = re.sub(r"[^\w.-]+", "_", args.out.resolve().name)  # it becomes part of the page's address
    settings.setdefault("name", f"{folder}_{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    dataset = load_data(args, settings, device)
    if settings.setdefault("pictures", len(dataset.train_images)) != len(dataset.train_images):
        raise cli.UserError(
            f"the run in {args.out} has {settings['pictures']} training pictures, {args.data} now has "
            f"{len(dataset.train_images)}: resume it with the same --data"
        )
    least = 2 * ranks.WORLD * args.accumulate  # batch norm needs two pictures
    if min(settings["batch_size"], len(dataset.train_images)) < least:
        raise cli.UserError(
            f"{least} pictures a batch are the least for {ranks.WORLD} process{'es' * (ranks.WORLD > 1)} and "
            f"--accumulate {args.accumulate}: take more by --batch-size, or fewer parts"
        )
    print(start_up_lines(settings, dataset, args.out, device))
    port = None if args.no_visdom or ranks.RANK else live_page(args.port)
    with contextlib.ExitStack() as stack:
        if ranks.RANK == 0:
            stack.enter_context(alone(cli.folder(args.out)))
            if not saved:
                set_aside(args.out)
        run = Run(settings, dataset, args.out, device, saved)
        stack.enter_context(run.failures_explained(args.accumulate))
        signal_number = train(run, dataset, device, port, args.save_every, args.accumulate, args.sync_bn)
    flags = unusual(args, dataset="cifar10", data="data", device="auto")
    if signal_number:
        print(f"stopped and saved; it goes on with: {resume_command(args)}")
        return 128 + signal_number
    size = settings["sizes"][-1]
    print(f"final accuracy at {size} px, without augmentation:")
    for part, images, labels in (
        ("training", dataset.train_images, dataset.train_labels),
        ("held-out" if settings["holdout"] else "test", dataset.test_images, dataset.test_labels),
    ):
        loss, accuracy, _ = evaluate(run.model, images, labels, size, settings, f"evaluating, {part} set")
        print(f"  {part} set, {len(images):,} pictures: {accuracy:.2%} (loss {loss:.3f})")
    weights = shlex.quote(str(args.out / "weights.pt"))
    print(f"look inside it: python test_filter.py --weights {weights}")
    print(f"           and: python test_recon_conv5.py --weights {weights}{flags}")


def evaluate_weights(args, device):
    """--evaluate: prints the accuracy of a network, per class too, and draws its confusion matrix."""
    from sklearn.metrics import confusion_matrix  # takes a second to import: not at every start

    network = inside.load_network(args.weights, args.dataset, device)
    data.check_classes(args.dataset, network.classes)
    dataset = load_data(args, dict(holdout=args.holdout, limit=None), device)
    size = args.size or network.size
    settings = dict(mean=network.mean, std=network.std)
    settings["precision"] = cli.precision(args.precision or "auto", device)
    images, labels = dataset.test_images, dataset.test_labels
    loss, accuracy, logits = evaluate(network.model, images, labels, size, settings, "evaluating")
    if ranks.RANK:
        return  # the first process tells
    counts = confusion_matrix(labels.cpu(), logits.argmax(1).cpu(), labels=range(len(dataset.classes)))
    part = "held-out" if args.holdout else "test"
    for name, row, correct in zip(dataset.classes, counts, counts.diagonal()):
        print(f"  {name:<12}{correct:>6,} of {row.sum():,} right, {correct / max(1, row.sum()):.1%}")
    print(
        f"{part} set, {len(labels):,} pictures of {dataset.source} at {size} px: "
        f"accuracy {accuracy:.2%}, loss {loss:.3f}"
    )
    figure = figures.confusion(
        counts, dataset.classes, f"What {part} pictures are taken for ({accuracy:.2%} right)"
    )
    figures.save(figure, args, "confusion.png")


if __name__ == "__main__":
    sys.exit(main())
