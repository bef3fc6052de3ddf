"""The rules of the house: who may import whom, read from the files by `ast`, so functions count too."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FIGURE_SCRIPTS = [
    f"test_{name}" for name in ("filter", "featuremaps", "activations", "recon_conv1", "recon_conv5")
]
FLOORS = [  # from the top down: a module imports only what stands below it
    ["benchmarks"],
    [*FIGURE_SCRIPTS, "train"],
    ["extras"],
    ["Myvisdom"],
    *(["common.page.explorer"], ["common.page.client"], ["common.page.front"], ["common.page"]),
    *(
        ["common.run"],
        ["common.muon"],
        ["common.figures"],
        ["common.responses"],
        ["common.history"],
        ["common.inside"],
        ["common.network"],
        ["common.weights"],
        ["common.data"],
        *(["common.archive"], ["common.images"]),
    ),
    *(["common.checkpoint"], ["common.distributed"], ["common.device"], ["common.cli"]),
    ["common"],
    ["MyResnet"],
]


def modules(root):
    """{name: path} of all modules of the project but the tests."""
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    paths = [
        path for path in paths if path.parts[0] in ("common", "extras", "benchmarks") or len(path.parts) == 1
    ]
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): root / path for path in paths}


def imports(root):
    """{module: the modules that it imports}, of the project by their longest known name."""
    known = modules(root)
    found = {}
    for name, path in known.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: a relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for imported in names:
                parts = imported.split(".")
                prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
                found[name].add(next((prefix for prefix in prefixes if prefix in known), parts[0]))
    return found


def floor(module):
    prefixes = [".".join(module.split(".")[:n]) for n in range(module.count(".") + 1, 0, -1)]
    return next(i for prefix in prefixes for i, names in enumerate(FLOORS) if prefix in names)


def broken_rules(root):
    """What is wrong, in words."""
    known, found, wrong = modules(root), imports(root), []
    for module, imported in found.items():
        for other in imported & known.keys():
            beside = floor(other) == floor(module) and module in FIGURE_SCRIPTS + ["train"]
            if floor(other) < floor(module) or beside:
                wrong.append(f"{module} imports {other}, which stands above it")
            if module in FIGURE_SCRIPTS and not other.startswith("common"):
                wrong.append(f"{module} imports {other}, and not common/ alone")
            if other in FIGURE_SCRIPTS:
                wrong.append(f"{module} imports {other}, which is a script")
    done = set()

    def visit(module, path):
        if module in path:
            wrong.append(f"a circle: {' → '.join([*path[path.index(module) :], module])}")
        elif module not in done:
            for other in sorted(found[module] & known.keys()):
                visit(other, [*path, module])
            done.add(module)

    for module in sorted(known):
        visit(module, [])
    return wrong


def test_imports_only_go_down():
    assert broken_rules(ROOT) == []
    assert not imports(ROOT)["MyResnet"] & modules(ROOT).keys()
    assert floor("common.page.client") < floor("common.data") < floor("MyResnet")


def test_every_extra_can_be_started_by_its_file():
    for path in (ROOT / "extras").glob("[!_]*.py"):
        lines = re.findall(r"^(?:import|from) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        ours = [name for name in lines if name in {"common", "extras", "MyResnet", "train", "Myvisdom"}]
        assert not ours or ours[0] == "common", path  # extras/common.py, which finds the rest


def test_every_module_has_its_floor():
    tracked = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    top_level = {path.removesuffix(".py") for path in tracked if "/" not in path}
    assert top_level <= {"MyResnet", "Myvisdom", "train", *FIGURE_SCRIPTS}  # and nothing joins them
    for module in modules(ROOT):
        floor(module)


@pytest.mark.parametrize(
    "module, line, wrong",
    [
        ("common/data.py", "from extras import gradcam", "common.data imports extras.gradcam, which stands"),
        ("common/data.py", "from common.page import client", "common.data imports common.page.client, which"),
        ("common/run.py", "def f():\n    import train", "common.run imports train, which stands above"),
        (
            "common/cli.py",
            "def f():\n    from common.device import autocast",
            "a circle: common.cli → common",
        ),
        ("MyResnet.py", "from common.cli import command", "MyResnet imports common.cli, which stands above"),
        ("test_filter.py", "from extras.gradcam import draw", "test_filter imports extras.gradcam, and not"),
        ("train.py", "import test_filter", "train imports test_filter, which is a script"),
    ],
)
def test_a_rule_that_is_broken_is_noticed(module, line, wrong, tmp_path):
    for path in modules(ROOT).values():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    with open(tmp_path / module, "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    assert any(problem.startswith(wrong) for problem in broken_rules(tmp_path))
