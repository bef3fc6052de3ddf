"""The run: its recipes, what it writes, and that stopping and resuming changes nothing."""

import csv
import math
import re
import signal

import pytest
import torch

import train
from benchmarks import time_to_accuracy
from common import cli, data, device
from common.cli import UserError
from common.device import select_precision
from common.muon import Muon
from common.network import load_network
from common.run import Run
from MyResnet import to_torchvision

CPU = torch.device("cpu")

SMALL = (
    "--dataset digits --recipe standard --limit 200 --size 32 --batch-size 64 --no-visdom --device cpu "
    "--precision fp32"
)


def weights(out):
    return torch.load(out / "last.pt", weights_only=True)["model"]


def start(out, *flags):
    return train.main([*SMALL.split(), "--out", str(out), *flags])


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


def test_run_writes_what_it_says(run, capsys):
    names = {path.name for path in run.iterdir()}
    assert {"last.pt", "weights.pt", "metrics.csv", "loss.csv", "loss.png", "accuracy.png"} <= names
    with open(run / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["iteration"], row["size"]) for row in rows] == [
        ("1", "2", "32"),
        ("2", "4", "32"),
    ]
    with open(run / "loss.csv", encoding="utf-8") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 4 and float(rows[1]["train_loss"]) == pytest.approx(sum(losses[2:]) / 2, rel=1e-5)


def test_training_learns(tmp_path, capsys):
    start(tmp_path, "--recipe", "digits", "--limit", "400", "--batch-size", "20", "--epochs", "3")
    printed = capsys.readouterr().out
    assert (
        float(
            printed.split("test set, 360 images of scikit-learn's handwritten digits at 32 px: accuracy ")[
                1
            ].split("%")[0]
        )
        > 70
    )
    assert f"look inside it: python test_recon_conv5.py --weights {tmp_path}/weights.pt" in printed


def test_same_seed_same_weights_other_seed_others(tmp_path, small_network):
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        start(tmp_path / name, "--epochs", "1", "--seed", seed, "--limit", "64")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_way_to_go_on_has_the_processes_and_the_device(monkeypatch):
    args = train.parse(["--out", "a b", "--device", "cpu", "--accumulate", "2"])
    assert train.resume_command(args) == "python train.py --resume --out 'a b' --device cpu --accumulate 2"
    monkeypatch.setattr(train.distributed, "WORLD_SIZE", 8)
    monkeypatch.setattr(train.distributed, "LOCAL_WORLD_SIZE", 4)
    args = train.parse(["--dataset", "digits"])
    assert train.resume_command(args) == "torchrun … train.py --resume --dataset digits"  # with two machines
    monkeypatch.setattr(train.distributed, "LOCAL_WORLD_SIZE", 8)
    assert train.resume_command(args) == "torchrun --nproc-per-node=8 train.py --resume --dataset digits"
    args = train.parse(["--port", "9000", "--no-visdom", "--save-every", "0.5"])
    assert train.resume_command(args).endswith("train.py --resume --save-every 0.5 --port 9000 --no-visdom")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run with those flags that nothing interrupted."""
    made = {}

    def get(flags):
        if flags not in made:
            made[flags] = tmp_path_factory.mktemp("whole")
            start(made[flags], *flags)
        return made[flags]

    return get


@pytest.mark.parametrize(
    "step, signal_number, status, flags",
    [
        (2, signal.SIGINT, 130, ""),  # within the first epoch
        (3, signal.SIGINT, 130, ""),  # after its last step
        (5, signal.SIGTERM, 143, ""),  # within the second
        (4, getattr(signal, "SIGHUP", None), 129, ""),  # the terminal is closed
        (2, signal.SIGTERM, 143, "--precision fp16 --limit 24 --batch-size 8"),  # with a scaler
        (4, signal.SIGTERM, 143, "--accumulate 2"),  # its crops are made in halves
    ],
)
def test_stopped_and_resumed_is_as_never_stopped(
    tmp_path, monkeypatch, capsys, whole, small_network, step, signal_number, status, flags
):
    if signal_number is None:
        pytest.skip("Windows has no such signal")
    flags = "--epochs", "2", *flags.split()
    whole, parts = whole(flags), tmp_path / "parts"

    steps, real, before = [], data.augment, signal.getsignal(signal.SIGINT)

    def interrupting(images, batch):
        steps.append(batch)
        if len(steps) == step:
            signal.raise_signal(signal_number)
        return real(images, batch)

    ended = signal.signal(signal_number, signal.SIG_DFL)  # where nohup started the tests, SIGHUP is ignored
    with monkeypatch.context() as patch:
        patch.setattr(data, "augment", interrupting)
        capsys.readouterr()
        assert start(parts, *flags) == status
    signal.signal(signal_number, ended)
    assert len(steps) == step  # this step was finished, and no other begun
    printed = capsys.readouterr().out
    assert f"resume with: python train.py --resume --out {parts} --dataset digits" in printed
    assert not train.main([*printed.split("train.py ")[1].split(), "--no-visdom"])
    assert same(weights(whole), weights(parts))
    for name in ("loss.csv", "metrics.csv"):
        one, other = ((folder / name).read_text(encoding="utf-8").splitlines() for folder in (whole, parts))
        assert [row.rsplit(",", 1)[0] for row in one] == [row.rsplit(",", 1)[0] for row in other]
    assert signal.getsignal(signal.SIGINT) is before


def test_bar_tells_loss_and_time_left_while_every_step_is_saved(tmp_path, small_network, monkeypatch):
    postfixes = []
    monkeypatch.setattr(cli.tqdm, "set_postfix_str", lambda bar, text, refresh: postfixes.append(text))
    start(tmp_path, "--epochs", "1", "--save-every", "0")
    assert len(postfixes) == 2 and all(
        re.fullmatch(r"run 00:0\d left, loss \S+, accuracy \S+%", s) for s in postfixes
    )


def test_checkpoint_of_before_muon_is_resumed_and_opened(tmp_path, small_network, monkeypatch):
    """The keys that runs on people's disks have: as a dictionary, not as today's code writes it."""
    monkeypatch.setitem(train.RECIPES["standard"], "muon_lr_factor", None)
    settings = dict(
        recipe="fast", dataset="digits", epochs=2, batch_size=64, sizes=[32, 32], lr=0.1, warmup=0.2,
        momentum=0.9, nesterov=True, weight_decay=5e-4, label_smoothing=0.1, shift=4, flip=False,
        mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), precision="fp32", seed=0, limit=200,
        holdout=None, name="run", pictures=200,
    )  # fmt: skip
    start(tmp_path / "new", "--epochs", "2")
    new = torch.load(tmp_path / "new/last.pt", weights_only=True)
    row = dict(
        epoch=1, iteration=3, size=32, train_loss=2.3, train_accuracy=0.1, test_loss=2.3, test_accuracy=0.125,
        last_size_accuracy=0.125, seconds=1.5,
    )  # fmt: skip
    history = dict(loss=[2.4, 2.3, 2.2], accuracy=[0.1, 0.1, 0.1], rate=[0.0, 0.08, 0.1])
    history |= dict(clock=[0.1, 0.2, 0.3], epochs=[row], seconds=0.25)
    old = dict(
        classes=[str(digit) for digit in range(10)], source="scikit-learn's handwritten digits", size=32,
        settings=settings, model=new["model"], mean=settings["mean"], std=settings["std"], accuracy=0.125,
        optimizer=new["optimizer"], scaler={}, history=history,
    )  # fmt: skip
    assert old.keys() == new.keys()
    assert settings.keys() | {"muon_lr_factor", "machine", "init"} == new["settings"].keys()
    assert history.keys() == new["history"].keys() and list(row) == list(new["history"]["epochs"][0])
    (tmp_path / "old").mkdir()
    torch.save(old, tmp_path / "old/last.pt")
    assert not train.main(["--resume", "--out", str(tmp_path / "old"), "--dataset", "digits", "--no-visdom"])
    resumed = torch.load(tmp_path / "old/last.pt", weights_only=True)
    assert resumed["history"]["loss"][:3] == [2.4, 2.3, 2.2] and len(resumed["history"]["loss"]) == 6
    assert resumed["history"]["epochs"][0] == row and len(resumed["history"]["epochs"]) == 2


def test_an_earlier_run_is_kept(tmp_path, capsys, small_network):
    start(tmp_path, "--epochs", "1")
    first = weights(tmp_path)
    start(tmp_path, "--epochs", "1", "--seed", "1")
    assert f"is now in {tmp_path}/earlier-1" in capsys.readouterr().out
    assert same(weights(tmp_path / "earlier-1"), first)
    assert not same(weights(tmp_path), first)


def test_holdout_is_the_end_of_the_training_set(monkeypatch):
    everything = data.load("digits", "")
    args = train.parse(["--dataset", "digits"])
    dataset = train.load_data(args, dict(holdout=100, limit=500), torch.device("cpu"))
    assert torch.equal(dataset.test_images, everything.train_images[-100:])
    assert torch.equal(dataset.train_labels, everything.train_labels[:500])


def test_evaluate_prints_what_training_printed(run, tmp_path, capsys):
    flags = ["--dataset", "digits", "--weights", str(run / "weights.pt"), "--out", str(tmp_path)]
    assert not train.main(["--evaluate", *flags, "--precision", "fp32"])
    printed = capsys.readouterr().out
    with open(run / "metrics.csv", encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    accuracy, loss = printed.split("at 32 px: accuracy ")[1].splitlines()[0].split("%, loss ")
    assert float(accuracy) == pytest.approx(100 * float(last["test_accuracy"]), abs=0.006)
    assert float(loss) == pytest.approx(float(last["test_loss"]), rel=0.01)  # the weights are rounded
    classes = [line.split() for line in printed.splitlines() if " right, " in line]
    assert [row[0] for row in classes] == [str(digit) for digit in range(10)]
    right, of = (sum(int(row[i]) for row in classes) for i in (1, 3))
    assert of == 360 and right / of == pytest.approx(float(last["test_accuracy"]))
    assert f"{tmp_path}/confusion.png" in printed and (tmp_path / "confusion.png").exists()


def test_evaluate_takes_the_weights_of_torchvisions_network(run, tmp_path, capsys):
    ours = load_network(run / "weights.pt", "digits", CPU)
    torch.save(to_torchvision(ours.model.state_dict()), tmp_path / "theirs.pth")
    (tmp_path / "names.txt").write_text("\n".join(ours.classes), encoding="utf-8")
    theirs = ["--weights", str(tmp_path / "theirs.pth"), "--classes", str(tmp_path / "names.txt")]
    theirs += ["--size", "32", "--mean", *map(str, ours.mean), "--std", *map(str, ours.std)]
    accuracies = []
    for flags in theirs, ["--weights", str(run / "weights.pt")]:
        flags += ["--dataset", "digits", "--precision", "fp32", "--out", str(tmp_path)]
        train.main(["--evaluate", *flags])
        accuracies.append(re.search(r"at 32 px: accuracy \S+ loss \S+", capsys.readouterr().out)[0])
    assert accuracies[0] == accuracies[1]


def test_evaluation_is_cross_entropy_and_accuracy_of_all_images(run):
    model, images = torch.nn.Flatten(), torch.randint(0, 256, (260, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 3072, (260,))
    settings = dict(mean=(0.0,) * 3, std=(1.0,) * 3, precision="fp32")
    loss, accuracy, _ = train.evaluate(model, images, labels, 32, settings)
    logits = (images / 255).flatten(1).double()
    expected = -logits.log_softmax(1)[torch.arange(260), labels].mean()
    assert loss == pytest.approx(float(expected), rel=1e-5)
    labels[:13] = logits[:13].argmax(1)
    hits = (logits.argmax(1) == labels).double().mean()
    assert train.evaluate(model, images, labels, 32, settings)[1] == pytest.approx(float(hits))


def test_sizes_follow_their_shares_and_end_at_the_last():
    assert train.sizes_by_epoch({96: 0.5, 224: 0.5}, 4) == [96, 96, 224, 224]
    assert train.sizes_by_epoch({96: 0.6, 160: 0.3, 224: 0.1}, 2) == [96, 224]
    assert train.sizes_by_epoch({96: 0.99, 224: 0.01}, 3) == [96, 96, 224]
    for recipe in train.RECIPES.values():
        for epochs in range(1, 40):
            sizes = train.sizes_by_epoch(recipe["sizes"], epochs)
            assert len(sizes) == epochs and sizes[-1] == max(recipe["sizes"]) and sizes == sorted(sizes)


def test_learning_rate_rises_to_its_peak_and_falls_to_nothing():
    settings = dict(lr=0.1, warmup=0.2)
    rates = [train.learning_rate(settings, step / 100) for step in range(101)]
    assert rates[0] == 0 and max(rates) == rates[20] == pytest.approx(0.1) and rates[100] == 0
    assert rates[:21] == sorted(rates[:21]) and rates[20:] == sorted(rates[20:], reverse=True)
    assert train.learning_rate(dict(lr=0.01, warmup=None), 0.7) == 0.01


def test_assignment_recipe_is_the_reports():
    args = train.parse(["--recipe", "assignment"])
    settings = train.new_settings(args, torch.device("cpu"))
    expected = dict(epochs=25, batch_size=128, sizes=[224] * 25, lr=0.01, momentum=0.9, flip=False, shift=0)
    expected |= dict(muon_lr_factor=None, weight_decay=0.0, label_smoothing=0.0)
    assert expected.items() <= settings.items()
    assert settings["mean"] == settings["std"] == (0.5, 0.5, 0.5)


def test_weight_decay_is_on_weights_only(tmp_path, monkeypatch):
    def groups_of(recipe):
        settings = train.new_settings(train.parse(["--recipe", recipe, "--precision", "fp32"]), CPU)
        groups = Run(settings, dataset, tmp_path, CPU).optimizers["optimizer"].param_groups
        assert {tuple(group[key] for key in ("lr", "momentum", "nesterov")) for group in groups} == {
            (0.1, 0.9, True)
        }
        return groups

    dataset = data.load("digits", "")
    groups = groups_of("standard")
    decayed, others = (group["params"] for group in groups)
    assert [group["weight_decay"] for group in groups] == [5e-4, 0]
    assert [p.ndim for p in decayed] == [2] and len(others) == 41  # fc; batch norms and fc's bias
    assert {p.ndim for p in others} == {1}

    monkeypatch.setitem(train.RECIPES["standard"], "muon_lr_factor", None)
    decayed, others = (group["params"] for group in groups_of("standard"))
    assert len(decayed) == 21 and len(others) == 41  # 20 convolutions and fc; the rest
    assert {p.ndim for p in decayed} == {2, 4} and {p.ndim for p in others} == {1}


def test_digits_are_never_flipped():
    args = train.parse(["--dataset", "digits"])
    assert train.new_settings(args, torch.device("cpu"))["flip"] is False
    args = train.parse([])
    assert train.new_settings(args, torch.device("cpu"))["flip"] is True


def test_precision_follows_the_hardware(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for amx, avx, expected in ((True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        monkeypatch.setattr(device.platform, "machine", lambda: "x86_64")
        assert select_precision("auto", cpu) == expected
    for native, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, n=native: n)
        assert select_precision("auto", cuda) == expected
    assert select_precision("auto", torch.device("mps")) == "fp32"
    assert select_precision("fp16", cpu) == "fp16"


def test_loss_curve_smooths():
    from common import figures

    losses = [math.exp(-i / 50) + (0.1 if i % 2 else -0.1) for i in range(200)]
    lines = figures.loss_curve(losses, "").axes[0].lines
    smooth = lines[1].get_ydata()
    assert len(lines[0].get_ydata()) == 200
    assert abs(smooth[1:] - smooth[:-1]).max() < 0.02


def test_weights_tell_the_size_they_were_last_trained_at(tmp_path, monkeypatch, small_network):
    saved_sizes, real, path = [], train.evaluate, tmp_path / "weights.pt"

    def evaluate(model, images, labels, size, *rest):
        saved_sizes.append(torch.load(path, weights_only=True)["size"] if path.exists() else None)
        return *real(model, images[:4], labels[:4], size, *rest)[:2], torch.zeros(len(labels), 10)

    monkeypatch.setattr(train, "evaluate", evaluate)
    flags = "--dataset digits --recipe quick --limit 8 --batch-size 4 --epochs 2 --no-visdom --device cpu "
    flags += "--precision fp32"
    train.main([*flags.split(), "--out", str(tmp_path)])
    # asked when the first epoch is evaluated; the second; then each set at the end
    assert saved_sizes == [None, 112, 224, 224]
    with open(tmp_path / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["last_size_accuracy"] == "" and rows[1]["last_size_accuracy"] == rows[1]["test_accuracy"]


def test_second_half_is_evaluated_at_the_last_size_too(tmp_path, monkeypatch, small_network):
    monkeypatch.setattr(
        train,
        "evaluate",
        lambda model, images, labels, size, *_: (size / 10, size / 1000, torch.zeros(len(labels), 10)),
    )
    monkeypatch.setitem(train.RECIPES["digits"], "sizes", {32: 0.75, 40: 0.25})
    flags = "--dataset digits --limit 8 --batch-size 4 --epochs 4 --no-visdom --device cpu --precision fp32"
    train.main([*flags.split(), "--out", str(tmp_path)])
    with open(tmp_path / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["test_accuracy"] for row in rows] == ["0.032", "0.032", "0.032", "0.04"]
    assert [row["last_size_accuracy"] for row in rows] == ["", "", "0.04", "0.04"]


def test_each_step_has_its_rate_and_a_smoothed_loss(tmp_path, monkeypatch, small_network):
    used, real_loss = {}, torch.nn.functional.cross_entropy
    smoothing = []

    def noting(optimizer, real_step):
        def step(self, *args):
            used.setdefault(optimizer, []).append({group["lr"] for group in self.param_groups})
            return real_step(self, *args)

        monkeypatch.setattr(optimizer, "step", step)

    def loss(logits, labels, **options):
        smoothing.append(options.get("label_smoothing"))
        return real_loss(logits, labels, **options)

    for optimizer in torch.optim.SGD, Muon:
        noting(optimizer, optimizer.step)
    monkeypatch.setattr(train.F, "cross_entropy", loss)
    start(tmp_path, "--epochs", "2", "--lr", "0.5")
    with open(tmp_path / "loss.csv", encoding="utf-8") as file:
        noted = [float(row["rate"]) for row in csv.DictReader(file)]
    settings = dict(lr=0.5, warmup=0.2)
    expected = [train.learning_rate(settings, i / 6) for i in range(6)]
    assert noted == pytest.approx(expected, rel=1e-4)
    for optimizer, factor in (torch.optim.SGD, 1), (Muon, train.STANDARD["muon_lr_factor"]):
        rates = [rate for (rate,) in used[optimizer]]
        assert rates == pytest.approx([factor * rate for rate in expected])
    assert [value for value in smoothing if value is not None] == [0.1] * 6


def test_final_accuracies_are_those_of_their_sets(tmp_path, monkeypatch, capsys, small_network):
    monkeypatch.setattr(
        train,
        "evaluate",
        lambda model, images, *_: (0.0, len(images) / 1000, torch.zeros(len(images), 10)),
    )
    start(tmp_path, "--epochs", "1")
    printed = capsys.readouterr().out
    assert (
        "training set, 200 images of scikit-learn's handwritten digits at 32 px: accuracy 20.00%" in printed
    )
    assert "test set, 360 images of scikit-learn's handwritten digits at 32 px: accuracy 36.00%" in printed


def test_a_data_set_that_grew_is_not_resumed_on(run, monkeypatch, capsys):
    real = data.load
    monkeypatch.setattr(
        data, "load", lambda *args: real(*args)._replace(train_images=real(*args).train_images[:200])
    )
    with pytest.raises(SystemExit):
        train.main(["--resume", "--out", str(run), "--dataset", "digits", "--no-visdom"])
    assert "has 256 training images, data now has 200" in capsys.readouterr().err


def test_time_to_accuracy_is_when_the_last_size_first_had_it(capsys):
    rows = [
        dict(seconds="60", test_accuracy="0.9", last_size_accuracy=""),  # at another size
        dict(seconds="30", test_accuracy="0.9", last_size_accuracy="0.7"),
        dict(seconds="30", test_accuracy="0.88", last_size_accuracy="0.88"),
        dict(seconds="60", test_accuracy="0.85", last_size_accuracy="0.85"),
    ]
    assert time_to_accuracy.minutes(rows, 0.8633) == (2.0, 3.0)
    assert time_to_accuracy.minutes(rows, 0.89) == (None, 3.0)
    time_to_accuracy.main(["weights"])  # the shipped network's own table
    assert re.search(r"weights +11 +\d+\.\d +\d+\.\d +91\.99%", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        time_to_accuracy.main(["docs"])


def test_a_run_in_fp16_is_not_resumed_on_an_apple_gpu(monkeypatch):
    monkeypatch.setattr(train, "load_for_resume", lambda args: dict(settings=dict(precision="fp16")))
    with pytest.raises(UserError, match="mps lacks"):
        train.start_or_resume(train.parse(["--resume"]), torch.device("mps"))
