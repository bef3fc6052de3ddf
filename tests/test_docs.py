"""The documents: their commands parse, their links and images resolve, and the README stays short."""

import argparse
import ast
import importlib
import re
import shlex
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATHS = ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
OTHER_PROGRAMS = "venv", "pytest"  # what else `python -m` starts here


def blocks(text, language=""):
    """The contents of the fenced code blocks of that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(text):
    """The commands that start a script, of code blocks and of code in the text: (module, arguments)."""
    lines = [line for block in blocks(text) for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))
    for command in (part.strip() for line in lines for part in line.split("&&")):
        if re.match(r"(python3?|torchrun) ", command):
            program, *words = shlex.split(command)
            script = next(i for i, word in enumerate(words) if word == "-m" or not word.startswith("-"))
            name = words[script + 1] if words[script] == "-m" else words[script]
            yield command, name, tuple(words[script + 1 + (words[script] == "-m") :])


ALL = sorted({found for text in DOCUMENTS.values() for found in commands(text)})


class Parsed(Exception):
    """The flags were accepted."""


@pytest.fixture
def parse_only(monkeypatch):
    """Scripts end once they have parsed their flags."""
    real = argparse.ArgumentParser.parse_args

    def parse_args(parser, *args):
        real(parser, *args)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)


def accepts(name, arguments):
    """Whether the script exists and accepts these arguments; what it prints says why not."""
    module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
    try:
        module.main(list(arguments))
    except Parsed:
        return True
    except SystemExit:
        return False
    raise AssertionError(f"{name} has not parsed anything")


@pytest.mark.parametrize("command, name, arguments", ALL, ids=[command for command, *_ in ALL])
def test_command_parses(command, name, arguments, parse_only):
    if name == "pytest":
        files = [argument for argument in arguments if argument.startswith("tests/")]
        assert all((ROOT / file).exists() for file in files)
    elif name not in OTHER_PROGRAMS:
        assert accepts(name, arguments), command


def test_wrong_commands_are_noticed(parse_only):
    text = "```\npip install x && python train.py --size big\n```\nSee `python extras/gradcam.py --what`."
    found = list(commands(text))
    assert [name for _, name, _ in found] == ["train.py", "extras/gradcam.py"]
    assert not any(accepts(name, arguments) for _, name, arguments in found)
    with pytest.raises(ImportError):
        accepts("extras.nothing", [])


def test_every_script_is_in_the_documents():
    names = {name.removesuffix(".py").replace("/", ".") for _, name, _ in ALL}
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("extras/*.py"), *ROOT.glob("benchmarks/*.py")]
    scripts = {path for path in scripts if '__name__ == "__main__"' in path.read_text(encoding="utf-8")}
    assert {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in scripts} <= names


def anchor(heading):
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")


def links(text):
    """The targets of links and images that are not on the web."""
    text = re.sub(r"^```.*?^```$|`[^`\n]*`(?!\])", "", text, flags=re.DOTALL | re.MULTILINE)
    return [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_images_resolve(document):
    for target in links(DOCUMENTS[document]):
        file, _, section = target.partition("#")
        path = ROOT / document if not file else (ROOT / document).parent / file
        assert path.exists(), target
        if section:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert section in map(anchor, headings), target


def test_every_image_is_shown():
    shown = {Path(target).name for text in DOCUMENTS.values() for target in links(text)}
    assert {path.name for path in (ROOT / "docs").glob("*.png")} <= shown


def test_readme_is_short_and_has_the_two_set_up_commands():
    readme = DOCUMENTS["README.md"]
    assert len(readme.encode()) <= 9000
    ends = [line.rpartition("&& ")[2] for line in readme.splitlines() if line.startswith("pip install ")]
    assert ends == ["python train.py --dataset digits", "python -m pytest"]


def test_tests_that_are_named_exist():
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    names = set(re.findall(r"^def (test_\w+)", source, re.MULTILINE))
    scripts = {path.stem for path in [*ROOT.glob("test_*.py"), *ROOT.glob("tests/test_*.py")]}
    for text in DOCUMENTS.values():
        assert set(re.findall(r"\b(test_\w+)", text)) - names - scripts <= {"test_batch"}


def test_example_of_a_technique_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(DOCUMENTS["docs/development.md"], "python")
    module = types.ModuleType("saliency")
    exec(compile(code, "saliency.py", "exec"), module.__dict__)
    module.main(["--weights", str(ROOT / "weights/resnet18_cifar10.pt"), "--size", "32", "--device", "cpu"])
    assert (tmp_path / "figures/saliency.png").stat().st_size > 10_000


def test_example_of_a_notebook_names_what_there_is():
    (code,) = blocks(DOCUMENTS["docs/usage.md"], "python")
    imports, *calls = ast.parse(code).body
    modules = {alias.name: importlib.import_module(alias.name) for alias in imports.names}
    for call in calls:
        assert callable(getattr(modules[call.value.func.value.id], call.value.func.attr))


def test_tree_in_the_readme_is_the_layout():
    tree = next(block for block in blocks(DOCUMENTS["README.md"]) if block.startswith("MyResnet.py"))
    named = set(re.findall(r"\b[\w*]+\.py|\w+(?=/ )", tree))
    modules = {path.name for path in (ROOT / "common").glob("[a-z]*.py")}
    top_level = {path.name for path in ROOT.glob("*.py") if not path.name.startswith("test_")}
    assert modules | top_level | {"test_*.py"} == {name for name in named if name.endswith(".py")}
