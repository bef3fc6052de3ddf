"""Train ResNet-18 on CIFAR-10 at 224×224, with live curves on a visdom page.

python train.py                        the default recipe, to runs/cifar10
python train.py --resume               go on with it where it stopped
python train.py --recipe assignment    the report's own recipe
python train.py --dataset digits       try it all in two minutes, with no download"""

import csv
import itertools
import shlex
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix
from tqdm import tqdm

from common import checkpoint, cli, data, figures, inside
from MyResnet import ResNet18
from Myvisdom import PORT, Page, listening

RECIPES = {
    "fast": dict(
        epochs=25,  # passes over the training set
        batch_size=128,  # pictures a step
        sizes={96: 0.6, 160: 0.2, 224: 0.2},  # px: share of the epochs; small pictures save time
        lr=0.1,  # peak of the one-cycle rate
        warmup=0.2,  # share of the run in which the rate rises to its peak; then it falls to 0
        momentum=0.9,  # of SGD
        nesterov=True,  # Nesterov's form of it
        weight_decay=5e-4,  # on weights only: not on biases and batch norms
        label_smoothing=0.1,  # share of the target that goes to all classes alike; in the training loss only
        shift=4,  # px of 32: pictures are cropped up to this far off centre
        zoom=False,  # whether small pictures are crops, of up to the scale objects have at the last size
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
        zoom=False,
        flip=False,
        mean=(0.5, 0.5, 0.5),  # values from -1 to 1
        std=(0.5, 0.5, 0.5),
    ),
}
EVALUATION_BATCH = 250
FILES = "last.pt weights.pt metrics.csv loss.csv loss.png accuracy.png confusion.png".split()


def parse(argv):
    """The flags, with --out as a path."""
    parser = cli.parser(__doc__, "data", "dataset", "device")
    add, whole, real = parser.add_argument, cli.number(int, 1), cli.number(float, 0)
    add("--recipe", choices=list(RECIPES), help="default: fast")
    add("--epochs", type=whole, metavar="N", help="default: 25")
    add("--batch-size", type=cli.number(int, 2), metavar="N", help="default: 128")
    add("--size", type=cli.number(int, 32, 1024), metavar="PX", help="one size for all epochs")
    add("--lr", type=real, help="the (peak) learning rate (default: the recipe's)")
    add("--seed", type=cli.number(int, 0, 2**31), metavar="N", help="default: 0")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], help="default: auto, by the device")
    add("--limit", type=cli.number(int, 2), metavar="N", help="train on the first N pictures only")
    add("--holdout", type=whole, metavar="N", help="hold the last N training pictures out, and "
        "evaluate on them instead of the test set")  # fmt: skip
    add("--out", metavar="DIR", help="where the run is written (default: runs/<dataset>); with "
        "--evaluate, the confusion matrix (default: beside the weights)")  # fmt: skip
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--evaluate", action="store_true", help="only evaluate --weights (default: the run's)")
    add("--weights", metavar="FILE", help="the weights to --evaluate")
    add("--no-visdom", action="store_true", help="no live page")
    add("--port", type=cli.number(int, 1, 65535), default=PORT, help=f"of visdom (default: {PORT})")
    args = parser.parse_args(argv)
    if args.weights and not args.evaluate:
        parser.error("--weights goes with --evaluate")
    if args.resume and args.evaluate:
        parser.error("--resume and --evaluate exclude each other")
    if args.evaluate and args.weights and not args.out:
        args.out = Path(args.weights).parent
    args.out = Path(args.out or f"runs/{args.dataset}")
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
    for key in ("zoom", "flip"):
        settings[key] &= args.dataset != "digits"
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
def predict(model, images, size, settings, progress=""):
    """Logits, float32 [N, classes], of uint8 images [N, 3, 32, 32] resized to `size`; no augmentation.
    `progress` names the progress bar."""
    model.eval()
    logits = []
    for x in tqdm(images.split(EVALUATION_BATCH), progress, leave=False, disable=not progress):
        x = data.prepare(x, size, settings["mean"], settings["std"])
        with cli.autocast(images.device, settings["precision"]):
            logits.append(model(x).float())
    return torch.cat(logits)


def evaluate(model, images, labels, size, settings, progress=""):
    """(mean cross-entropy loss, accuracy 0 … 1) of `predict`."""
    logits = predict(model, images, size, settings, progress)
    accuracy = (logits.argmax(1) == labels).float().mean()
    return float(F.cross_entropy(logits, labels)), float(accuracy)


def set_aside(out):
    """Moves a run that is in the folder `out` already to a new folder in it: nothing is overwritten."""
    old = [path for path in map(out.joinpath, FILES) if path.exists()]
    if out / "last.pt" in old or out / "weights.pt" in old:
        aside = next(out / f"earlier-{n}" for n in itertools.count(1) if not (out / f"earlier-{n}").exists())
        aside.mkdir()
        for path in old:
            path.rename(aside / path.name)
        print(f"the run that was in {out} is now in {aside}")


def write_metrics(history, last_size, out, title):
    """loss.csv and metrics.csv, and their curves as loss.png and accuracy.png (figures 6.2, 6.1)."""
    with open(out / "loss.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["iteration", "loss", "accuracy", "rate"])
        columns = history["loss"], history["accuracy"], history["rate"]
        rows.writerows([i, *(f"{value:.6g}" for value in row)] for i, row in enumerate(zip(*columns), 1))
    figures.loss_curve(history["loss"], title).savefig(out / "loss.png", dpi=110)
    if history["epochs"]:
        with open(out / "metrics.csv", "w", newline="") as file:
            rows = csv.DictWriter(file, list(history["epochs"][0]))
            rows.writeheader()
            rows.writerows(history["epochs"])
        figures.accuracy_curve(history["epochs"], last_size, title).savefig(out / "accuracy.png", dpi=110)


def train(settings, dataset, out, device, port, saved=None):
    """Trains as `settings` say, from scratch or on from the checkpoint `saved`, writing to the folder
    `out`; `port` is visdom's, or None. Ctrl-C and SIGTERM end it after a step, saved. Returns (the model, the
    signal that ended it or None)."""
    images, labels, test_images, test_labels = dataset[:4]
    epochs, batch_size, sizes = (settings[key] for key in ("epochs", "batch_size", "sizes"))
    steps = max(1, len(images) // batch_size)  # in an epoch
    batch_size = min(batch_size, len(images))

    torch.manual_seed(settings["seed"])
    model = ResNet18(len(dataset.classes)).to(device, memory_format=cli.memory_format(device))
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]  # of batch norms, and fc's bias
    optimizer = torch.optim.SGD(
        [dict(params=weights, weight_decay=settings["weight_decay"]), dict(params=others)],
        lr=settings["lr"],
        momentum=settings["momentum"],
        nesterov=settings["nesterov"],
    )
    scaler = torch.amp.GradScaler(device.type, enabled=settings["precision"] == "fp16")
    # All that happened so far, per iteration and per epoch (the rows of metrics.csv). It says how far
    # the run is; together with the seed it says what comes next, so no other state is saved.
    history = dict(loss=[], accuracy=[], rate=[], epochs=[], seconds=0.0)
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        history = saved["history"]

    def save():
        rows = history["epochs"]
        network = dict(
            model=model.state_dict(),
            mean=settings["mean"],
            std=settings["std"],
            classes=list(dataset.classes),
            size=sizes[max(0, len(history["loss"]) - 1) // steps],  # the last it was trained at
            accuracy=rows[-1]["test_accuracy"] if rows else None,
            source=dataset.source,
            settings=settings,
        )
        run = dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), history=history)
        checkpoint.save(network | run, out / "last.pt")
        checkpoint.save(network, out / "weights.pt")
        write_metrics(
            history, sizes[-1], out, f"ResNet-18, {settings['dataset']}, recipe {settings['recipe']}"
        )

    def record(result):
        """Notes the result of an iteration; reading it waits for the device."""
        loss, accuracy = result.tolist()
        history["rate"].append(rate(settings, len(history["loss"]) / (steps * epochs)))
        history["accuracy"].append(accuracy)
        history["loss"].append(loss)

    signals = []  # that arrived: the run saves and stops

    def stop(number, frame):
        signals.append(number)
        signal.signal(number, signal.default_int_handler)  # once more stops at once
        tqdm.write("stopping as soon as this step or evaluation is done …", file=sys.stderr)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup does
        numbers.append(signal.SIGHUP)
    handlers = {number: signal.signal(number, stop) for number in numbers}
    shown = settings | {"sizes": schedule(sizes), "device": device}
    page = Page(history, out.resolve().name, shown, port) if port else None
    work = [size * size for size in sizes]  # of an epoch: it grows with the pixels
    work_done, began = 0.0, time.time()  # in this process
    try:
        for epoch in range(len(history["epochs"]), epochs):
            size, epoch_began = sizes[epoch], time.time()
            model.train()
            first = len(history["loss"]) - epoch * steps  # not 0 after a stop within the epoch
            smallest = round(data.SIDE * size / sizes[-1]) if settings["zoom"] else data.SIDE
            plan = data.plan(
                len(images), batch_size, settings["seed"], epoch,
                settings["shift"], smallest, settings["flip"], device,
            )  # fmt: skip
            bar = tqdm(
                total=steps * batch_size, initial=first * batch_size, unit=" images", leave=False,
                desc=f"epoch {epoch + 1}/{epochs}, {size} px", dynamic_ncols=True,
            )  # fmt: skip
            unread = None  # the last step's result: read while the device does the next step
            for step, batch in enumerate(plan[first:], first):
                for group in optimizer.param_groups:
                    group["lr"] = rate(settings, (epoch * steps + step) / (steps * epochs))
                x = data.cropped(images, batch)
                x = data.prepare(x, size, settings["mean"], settings["std"])
                y = labels[batch.order]
                with cli.autocast(device, settings["precision"]):
                    logits = model(x)
                logits = logits.float()
                loss = F.cross_entropy(logits, y, label_smoothing=settings["label_smoothing"])
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

                if unread is not None:
                    record(unread)
                    work_done += work[epoch] / steps
                    to_do = sum(work[epoch:]) - work[epoch] * step / steps
                    left = tqdm.format_interval((time.time() - began) * to_do / work_done)
                    loss_now, accuracy_now = history["loss"][-1], history["accuracy"][-1]
                    bar.set_postfix_str(
                        f"loss {loss_now:.3f}, accuracy {accuracy_now:.1%}, run {left} left", refresh=False
                    )
                    if page:
                        page.status = f"epoch {epoch + 1} of {epochs}, {size} px; {left} left"
                unread = torch.stack((loss.detach(), (logits.argmax(1) == y).float().mean()))
                bar.update(batch_size)
                if signals:
                    break
            if unread is not None:
                record(unread)
            bar.close()
            if signals:
                history["seconds"] += time.time() - epoch_began
                save()
                break

            test_loss, test_accuracy = evaluate(model, test_images, test_labels, size, settings, "evaluating")
            # The second half is evaluated at the last size too: that is where the network will be used.
            last_size_accuracy = test_accuracy if size == sizes[-1] else None
            if last_size_accuracy is None and 2 * epoch >= epochs:
                _, last_size_accuracy = evaluate(
                    model, test_images, test_labels, sizes[-1], settings, f"evaluating at {sizes[-1]} px"
                )
            row = dict(
                epoch=epoch + 1,
                iteration=len(history["loss"]),
                size=size,
                train_loss=mean(history["loss"][-steps:]),
                train_accuracy=mean(history["accuracy"][-steps:]),
                test_loss=test_loss,
                test_accuracy=test_accuracy,
                last_size_accuracy=last_size_accuracy,
                seconds=round(history["seconds"] + time.time() - epoch_began, 1),
            )
            history["epochs"].append(row)
            history["seconds"] = 0.0
            save()
            at_last_size = ""
            if last_size_accuracy is not None and size != sizes[-1]:
                at_last_size = f" ({last_size_accuracy:.2%} at {sizes[-1]} px)"
            print(
                f"epoch {row['epoch']:2}/{epochs}  {size} px  train loss {row['train_loss']:.3f}, "
                f"accuracy {row['train_accuracy']:6.2%}  test loss {test_loss:.3f}, "
                f"accuracy {test_accuracy:6.2%}{at_last_size}  {row['seconds']:.0f} s",
                flush=True,
            )
            if signals:
                break
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if page:
            page.close("finished" if len(history["epochs"]) == epochs else "stopped")
    return model, signals[0] if signals and len(history["epochs"]) < epochs else None


def mean(values):
    return sum(values) / len(values)


def resumed(args):
    """The checkpoint of the run in --out. Raises `UserError` where there is none, or where the flags
    ask for another run than that."""
    path = args.out / "last.pt"
    if not path.is_file():
        raise cli.UserError(f"no run to resume in {args.out}: --out names the folder of one")
    saved = checkpoint.load(path)
    if not isinstance(saved, dict) or "optimizer" not in saved:
        raise cli.UserError(f"{path} is no checkpoint of a run: --out names the folder of one")
    settings = saved["settings"]
    for flag in "dataset recipe epochs batch_size size lr seed precision limit holdout".split():
        asked, was = getattr(args, flag), settings["sizes" if flag == "size" else flag]
        if flag == "size":
            was = was[0] if len(set(was)) == 1 else "by its recipe"
        if asked not in (None, "auto", was):
            name = f"--{flag.replace('_', '-')}"
            raise cli.UserError(
                f"the run in {args.out} has {name} {was}, not {asked}: resume it with that, or start "
                "another with --out"
            )
    return saved


def load_data(args, settings, device):
    """The data set of a run on `device`, as --limit and --holdout say."""
    dataset = data.load(args.dataset, args.data)
    images, labels = dataset.train_images, dataset.train_labels
    if settings["holdout"]:
        if settings["holdout"] > len(images) - 2:
            raise cli.UserError(f"--holdout {settings['holdout']} leaves no pictures to train on")
        held = -settings["holdout"]
        dataset = dataset._replace(test_images=images[held:], test_labels=labels[held:])
        images, labels = images[:held], labels[:held]
    images, labels = images[: settings["limit"]], labels[: settings["limit"]]
    dataset = dataset._replace(train_images=images, train_labels=labels)
    return dataset._replace(**{key: getattr(dataset, key).to(device) for key in dataset._fields[:4]})


def schedule(sizes):
    """[96, 96, 224] → "96 px for 2, 224 px for 1" """
    runs = [(size, len(list(group))) for size, group in itertools.groupby(sizes)]
    return ", ".join(f"{size} px for {count}" for size, count in runs)


def start_up_lines(settings, dataset, out, device):
    """What this run is going to do, in two lines."""
    hint = "" if len(set(settings["sizes"])) == 1 else " (--size 224: every step at 224 px)"
    return (
        f"ResNet-18 on {dataset.source}: {len(dataset.train_images):,} pictures to train on, "
        f"{len(dataset.test_images):,} {'held out' if settings['holdout'] else 'to test'}; "
        f"{device}, {settings['precision']}; to {out}\n"
        f"recipe {settings['recipe']}: {settings['epochs']} epochs, {schedule(settings['sizes'])}{hint}; "
        f"batch {settings['batch_size']}, rate {settings['lr']}"
    )


@cli.command
def main(argv=None):
    args = parse(argv)
    device = cli.device(args.device)
    if args.evaluate:
        return evaluate_weights(args, device)
    saved = resumed(args) if args.resume else None
    settings = saved["settings"] if saved else new_settings(args, device)
    dataset = load_data(args, settings, device)
    if settings.setdefault("pictures", len(dataset.train_images)) != len(dataset.train_images):
        raise cli.UserError(
            f"the run in {args.out} has {settings['pictures']} training pictures, {args.data} now has "
            f"{len(dataset.train_images)}: resume it with the same --data"
        )
    print(start_up_lines(settings, dataset, args.out, device))
    if not args.no_visdom:
        listening(args.port)  # an error now rather than later
    cli.folder(args.out)
    if not saved:
        set_aside(args.out)
    model, signal_number = train(
        settings, dataset, args.out, device, None if args.no_visdom else args.port, saved
    )
    flags = "" if args.dataset == "cifar10" else f" --dataset {args.dataset}"
    flags += "" if args.data == "data" else f" --data {shlex.quote(args.data)}"
    if signal_number:
        out = "" if args.out == Path(f"runs/{args.dataset}") else f" --out {shlex.quote(str(args.out))}"
        print(f"stopped and saved; it goes on with: python train.py --resume{out}{flags}")
        return 128 + signal_number
    size = settings["sizes"][-1]
    print(f"final accuracy at {size} px, without augmentation:")
    for part, images, labels in (
        ("training", dataset.train_images, dataset.train_labels),
        ("held-out" if settings["holdout"] else "test", dataset.test_images, dataset.test_labels),
    ):
        loss, accuracy = evaluate(model, images, labels, size, settings, f"evaluating, {part} set")
        print(f"  {part} set, {len(images):,} pictures: {accuracy:.2%} (loss {loss:.3f})")
    weights = shlex.quote(str(args.out / "weights.pt"))
    print(f"look inside it: python test_filter.py --weights {weights}")
    print(f"           and: python test_recon_conv5.py --weights {weights}{flags}")


def evaluate_weights(args, device):
    """--evaluate: prints the accuracy of a network, per class too, and draws its confusion matrix."""
    network = inside.load_network(args.weights or args.out / "weights.pt", args.dataset, device)
    data.check_classes(args.dataset, network.classes)
    dataset = load_data(args, dict(holdout=args.holdout, limit=None), device)
    size = args.size or network.size
    settings = dict(mean=network.mean, std=network.std)
    settings["precision"] = cli.precision(args.precision or "auto", device)
    images, labels = dataset.test_images, dataset.test_labels
    logits = predict(network.model, images, size, settings, "evaluating")
    counts = confusion_matrix(labels.cpu(), logits.argmax(1).cpu(), labels=range(len(dataset.classes)))
    part = "held-out" if args.holdout else "test"
    for name, row, correct in zip(dataset.classes, counts, counts.diagonal()):
        print(f"  {name:<12}{correct:>6,} of {row.sum():,} right, {correct / max(1, row.sum()):.1%}")
    accuracy = counts.trace() / counts.sum()
    print(
        f"{part} set, {len(labels):,} pictures of {dataset.source} at {size} px: "
        f"accuracy {accuracy:.2%}, loss {float(F.cross_entropy(logits, labels)):.3f}"
    )
    figure = figures.confusion(
        counts, dataset.classes, f"What {part} pictures are taken for ({accuracy:.2%} right)"
    )
    figures.save(figure, args.out, "confusion.png")


if __name__ == "__main__":
    sys.exit(main())
