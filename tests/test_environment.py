"""Whatever a script is started from and prints to: a notebook, a pipe, a log file, nothing at all."""

import contextlib
import errno
import importlib
import io
import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
import tqdm
from PIL import Image

import common
import MyResnet
import test_featuremaps
import test_filter
import train
from common import cli, figures
from extras import sanity_check

ROOT = Path(__file__).parent.parent
TRAIN = "--dataset digits --limit 100 --size 32 --no-visdom --device cpu --precision fp32".split()
FILTERS = ["filters_channel_0.png", "filters_channel_1.png", "filters_channel_2.png", "filters_rgb.png"]


@pytest.fixture
def flags(run, tmp_path, monkeypatch, free_port):
    """Flags for a figure script, in an empty folder and where nobody has a page."""
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", "digits", "--weights", str(run / "weights.pt"), "--out", "out"]
    return [*flags, "--port", str(free_port)]


def figures_in(folder):
    return sorted(path.name for path in Path(folder).glob("*.png"))


def shell(command, **environment):
    """What a shell says to a command in the current folder: (status of its first part, stdout, stderr)."""
    script = f"{command}; exit ${{PIPESTATUS[0]}}"
    environment = os.environ | dict(OMP_NUM_THREADS="1") | environment
    result = subprocess.run(["bash", "-c", script], env=environment, capture_output=True)
    return result.returncode, result.stdout, result.stderr.decode()


@pytest.mark.skipif(not shutil.which("bash"), reason="bash starts the scripts")
def test_script_by_its_file_with_any_backend_encoding_and_name(flags):
    Image.new("RGB", (40, 40), "red").save("image.png")
    os.rename("image.png", os.fsdecode(b"\xe6\xbc\xa2 caf\xe9.png"))
    command = (
        f"{sys.executable} -W error::UserWarning {ROOT}/extras/gradcam.py {' '.join(flags)} --image *.png"
    )
    backend = "module://matplotlib_inline.backend_inline"
    status, out, err = shell(command, MPLBACKEND=backend, PYTHONIOENCODING="cp1251")
    assert (status, err) == (0, "") and b"? caf?" in out
    assert figures_in("out") == ["gradcam.png"]


@pytest.mark.skipif(not shutil.which("bash"), reason="bash starts the scripts")
def test_closed_output_holds_nothing_up(flags):
    status, out, err = shell(f"{sys.executable} {ROOT}/test_filter.py {' '.join(flags)} <&- >&- 2>&-")
    assert (status, err) == (0, "") and figures_in("out") == FILTERS
    for name in FILTERS:  # nothing was written to a file that had got the number of stdout
        Image.open(f"out/{name}").load()


@pytest.mark.skipif(not shutil.which("bash"), reason="bash starts the scripts")
def test_table_is_printed_to_any_encoding_and_reader():
    table = f"{sys.executable} -u {ROOT}/MyResnet.py"
    status, out, err = shell(table, PYTHONIOENCODING="cp1251")
    assert (status, err) == (0, "") and b"11,181,642" in out and b"7?7, 64" in out
    status, out, err = shell(f"{table} | true")
    assert (status, err) == (141, "")


@pytest.fixture
def broken_pipe():
    """Makes streams to a reader that has left."""
    streams = []

    def make():
        read, write = os.pipe()
        os.close(read)
        streams.append(open(write, "w", buffering=1, encoding="utf-8"))
        return streams[-1]

    yield make
    for stream in streams:
        with contextlib.suppress(BrokenPipeError):  # of what is still to be written
            stream.close()


def test_reader_that_leaves_ends_a_figure_script_quietly(flags, monkeypatch, capsys, broken_pipe):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "stdout", broken_pipe())
        test_filter.main(flags)
    assert stop.value.code == 141 and capsys.readouterr().err == ""
    for arguments in (["--help"], ["--weights", "nowhere.pt"]):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(sys, "stdout", broken_pipe())
            patch.setattr(sys, "stderr", broken_pipe())
            test_filter.main(arguments)
        assert stop.value.code == (0 if arguments == ["--help"] else 2)


def test_reader_that_leaves_does_not_end_a_run(tmp_path, monkeypatch, small_network, broken_pipe):
    with monkeypatch.context() as patch:
        for name in ("stdout", "stderr"):
            patch.setattr(sys, name, broken_pipe())
        assert not train.main([*TRAIN, "--epochs", "2", "--out", str(tmp_path)])
    assert len(torch.load(tmp_path / "last.pt", weights_only=True)["history"]["epochs"]) == 2


def test_what_windows_calls_a_broken_pipe_is_one(monkeypatch, capsys):
    def leave(argv):
        raise OSError(errno.EINVAL, "Invalid argument")

    with pytest.raises(OSError):  # elsewhere it is a bug
        cli.command(leave)([])
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit) as stop:
        cli.command(leave)([])
    assert stop.value.code == 141 and capsys.readouterr().err == ""


def test_commands_are_quoted_as_the_shell_of_the_system_reads_them(monkeypatch):
    assert cli.quote("a b", "it's") == "'a b' 'it'\"'\"'s'"
    monkeypatch.setattr(sys, "platform", "win32")
    assert cli.quote(r"runs\a\weights.pt") == r"runs\a\weights.pt"
    assert cli.quote(r"my runs\a", "it's") == '"my runs\\a" it' + "'s"


def test_a_users_style_and_leftover_variables_change_nothing(flags, tmp_path):
    Path("matplotlibrc").write_text(
        "text.usetex: True\nimage.origin: lower\nfont.size: 30\n", encoding="utf-8"
    )
    command = f"{sys.executable} {ROOT}/test_filter.py {' '.join(flags)}"
    status, _, err = shell(command, RANK="gold", WORLD_SIZE="", MASTER_ADDR="x", MATPLOTLIBRC="matplotlibrc")
    assert (status, err) == (0, "")
    with Image.open("out/filters_rgb.png") as drawn:
        test_filter.main([*flags, "--out", "here"])
        with Image.open("here/filters_rgb.png") as expected:
            assert drawn.size == expected.size and drawn.tobytes() == expected.tobytes()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_full_log_is_one_line_and_the_figures_are_saved(flags, monkeypatch, capsys):
    full = open("/dev/full", "w", encoding="utf-8")
    with full, monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "stdout", full)
        test_filter.main(flags)
    assert stop.value.code == 2 and figures_in("out") == FILTERS
    assert capsys.readouterr().err == "error: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1251"])
def test_what_an_encoding_lacks_is_replaced(encoding, flags, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sanity_check, "SEEDS", 1)
    sanity_check.main([*flags, "--layer", "conv2_x"])
    printed = out.buffer.getvalue().decode(encoding)
    assert "rank correlation" in printed and len(figures_in("out")) == 1


def test_streams_that_are_none(flags, monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    test_filter.main(flags)
    print("漢")  # whatever the encoding of the system
    for arguments, status in ((["--help"], 0), (["--what"], 2), (["--weights", "nowhere.pt"], 2)):
        with pytest.raises(SystemExit) as stop:
            test_filter.main(arguments)
        assert stop.value.code == status
    assert figures_in("out") == FILTERS


def test_from_a_notebook_the_flags_are_those_that_are_given(tmp_path, monkeypatch, capsys, small_network):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    test_filter.main()
    MyResnet.main()
    assert figures_in("figures") == FILTERS and "11,181,642" in capsys.readouterr().out
    status = []
    arguments = [*TRAIN, "--epochs", "1", "--out", "run"]
    thread = threading.Thread(target=lambda: status.append(train.main(arguments)))
    thread.start()
    thread.join()
    assert status == [None] and (tmp_path / "run/weights.pt").exists()
    assert "error" not in capsys.readouterr().err


def test_without_a_terminal_there_is_no_bar(tmp_path, capsys, small_network):
    train.main([*TRAIN, "--recipe", "standard", "--epochs", "3", "--out", str(tmp_path)])
    printed = capsys.readouterr()
    assert printed.err == "" and printed.out.count("\nepoch ") == 3


@pytest.mark.parametrize("pace, lines", [(5, 0), (59, 9), (7, 1), (1000, 10)])
def test_without_a_terminal_at_most_one_line_a_minute(pace, lines, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    for _ in cli.progress_bar(range(10), "reading"):
        now[0] += pace
    printed = capsys.readouterr().err
    assert "\r" not in printed and len(printed.splitlines()) <= min(lines, 10 * pace / 60)
    assert (lines == 0) == (printed == "") and all(" of 10" in line for line in printed.splitlines())


def test_on_a_terminal_there_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for _ in cli.progress_bar(range(3), "reading"):
        pass
    assert capsys.readouterr().err.startswith("\rreading: ")


@pytest.mark.parametrize("name", ["漢字 $x$", "a\tb\x07 🦄", os.fsdecode(b"caf\xe9")])
def test_names_that_the_font_lacks_are_drawn_without_a_warning(name, flags):
    Image.new("RGB", (40, 40), "red").save("image.png")
    os.rename("image.png", f"{name}.png")
    with warnings.catch_warnings(action="error"):
        test_featuremaps.main([*flags, "--image", f"{name}.png"])
    assert len(figures_in("out")) == 3
    assert figures.drawable(f"é {name}\nß").startswith("é ") and "?" in figures.drawable(name)


def test_classes_that_the_font_lacks_are_drawn_without_a_warning(tmp_path):
    with warnings.catch_warnings(action="error"):
        figure = figures.confusion(torch.eye(2, dtype=torch.int64), ["猫", "犬"], "猫")
        figures.replace_undrawable(figure)
        figure.savefig(tmp_path / "confusion.png")


def test_long_messages_keep_their_beginning_and_end():
    assert cli.one_line("a\n  b\tc") == "a b c"
    long = cli.one_line(f"begin {'x' * 5000} end")
    assert len(long) <= 290 and long.startswith("begin xxx") and long.endswith("xxx end") and " … " in long


def test_a_python_that_is_too_old_is_said(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 10, 12))
    with pytest.raises(SystemExit) as stop:
        importlib.reload(common)
    assert stop.value.code == 2 and "Python 3.11 or later" in capsys.readouterr().err
