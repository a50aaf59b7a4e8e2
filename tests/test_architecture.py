"""Imports point one way, each library has its place, and importing does nothing: read from the source, and tried."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mlcd_ds"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400

# A module imports from its own layer and from those above it in this list. What is not named is an entry: the last.
LAYERS = (
    {"errors"},
    {"artefacts"},
    {"distributed", "kernels"},
    {"models", "data", "clustering", "evaluation"},
    {"heads"},
    {"recipes"},
    {"objectives"},
    {"config"},
    {"engine"},
    {"encoders"},
)
# Library -> the one file or folder that may import it.
PLACES = {
    "torch.distributed": "distributed/",
    "deepspeed": "distributed/",
    "nvidia": "data/dali.py",
    "faiss": "clustering/faiss_assigner.py",
}


def layer_of(module: str) -> int:
    """Layer of a dotted path below mlcd_ds."""
    part = module.split(".")[0]
    return next((number for number, names in enumerate(LAYERS) if part in names), len(LAYERS))


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of all that a module imports, also inside functions, or reaches as an attribute of torch."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names |= {f"{node.value.id}.{node.attr}"} & {"torch.distributed"}
    return names


def is_within(name: str, library: str) -> bool:
    return name == library or name.startswith(library + ".")


def problems(path: str, source: str) -> list[str]:
    """What is wrong with a file of mlcd_ds; `path` is relative to the package."""
    tree, module = ast.parse(source), path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    found = []
    for name in sorted(imported(tree)):
        for library, place in PLACES.items():
            if is_within(name, library) and not path.startswith(place):
                found.append(f"{path} imports {name}: only {place} may")
        if is_within(name, "mlcd_ds") and name != "mlcd_ds":
            inner = name.removeprefix("mlcd_ds.")
            if layer_of(inner) > layer_of(module) and inner != "__version__":
                found.append(f"{path} imports {name}, which builds on it")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            found.append(f"{path}:{node.lineno} prints")
    if source.count("\n") > MAX_LINES:
        found.append(f"{path} has more than {MAX_LINES} lines")
    if path.endswith("utils.py"):
        found.append(f"{path} is a drawer for everything")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_file_keeps_to_its_place(path: Path) -> None:
    assert not problems(str(path.relative_to(PACKAGE)), path.read_text())


def cycles(edges: set[tuple[str, str]]) -> list[str]:
    """Names that reach themselves along `edges`."""
    following: dict[str, set[str]] = {}
    for begin, end in edges:
        if begin != end:
            following.setdefault(begin, set()).add(end)

    def reached(name: str) -> set[str]:
        found, left = set(), [name]
        while left:
            new = following.get(left.pop(), set()) - found
            found |= new
            left += new
        return found

    return sorted(name for name in following if name in reached(name))


def module_edges(sources: dict[str, str]) -> set[tuple[str, str]]:
    """(importing, imported) for all pairs of modules of mlcd_ds; `sources` maps dotted names to texts."""
    edges = set()
    for module, source in sources.items():
        for name in imported(ast.parse(source)):
            inner = name.removeprefix("mlcd_ds.")
            if is_within(name, "mlcd_ds"):
                edges |= {(module, known) for known in (inner, inner.rpartition(".")[0]) if known in sources}
    return edges


def dotted_sources() -> dict[str, str]:
    names = {path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in SOURCES}
    return {name: path.read_text() for path, name in names.items() if not name.endswith("__init__")}


def test_neither_modules_nor_folders_import_in_circles() -> None:
    edges = module_edges(dotted_sources())
    assert len(edges) > 100
    folders = {(begin.split(".")[0], end.split(".")[0]) for begin, end in edges}
    assert not cycles(edges) and not cycles(folders)


@pytest.mark.parametrize(
    ("module", "line", "found"),
    [
        ("clustering.assigner", "from mlcd_ds.clustering.kmeans import kmeans", "clustering.kmeans"),
        ("heads.groups", "from mlcd_ds.objectives import margins", "heads"),
        ("distributed.launch", "def f():\n    import mlcd_ds.kernels.matmul", None),
    ],
)
def test_a_circle_is_found(module: str, line: str, found: str | None) -> None:
    sources = dotted_sources()
    sources[module] += f"\n{line}\n"
    edges = module_edges(sources)
    folders = {(begin.split(".")[0], end.split(".")[0]) for begin, end in edges}
    in_circles = cycles(edges) + cycles(folders)
    assert found in in_circles if found else not in_circles


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/vit.py", "import torch.distributed as dist"),
        ("models/vit.py", "from torch import distributed"),
        ("heads/partial_fc.py", "import torch\ndef f():\n    return torch.distributed.get_rank()"),
        ("engine/trainer.py", "def f():\n    from deepspeed.runtime import engine"),
        ("data/loader.py", "from nvidia.dali import fn"),
        ("clustering/kmeans.py", "import faiss"),
        ("models/vit.py", "from mlcd_ds.engine.trainer import Trainer"),
        ("heads/partial_fc.py", "from mlcd_ds import train"),
        ("objectives/class_losses.py", "from mlcd_ds.stages.runner import main"),
        ("engine/trainer.py", "import mlcd_ds.stages.cluster"),
        ("heads/partial_fc.py", "from mlcd_ds.objectives.class_losses import ClassLoss"),
        ("distributed/launch.py", "from mlcd_ds.heads import partial_fc"),
        ("artefacts/manifest.py", "from mlcd_ds.config import Recipe"),
        ("train.py", "print('step')"),
        ("train.py", "x = 1\n" * 401),
        ("data/utils.py", ""),
    ],
)
def test_known_bad_twins_are_found(path: str, source: str) -> None:
    assert len(problems(path, source)) == 1
    assert not problems("distributed/deepspeed.py", "import deepspeed\nimport torch.distributed as dist")
    assert not problems("engine/trainer.py", "from mlcd_ds.heads.partial_fc import PartialFCHead")


IMPORT_ALL = """
import importlib, os, pkgutil, sys, threading

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("deepspeed", "nvidia", "faiss"):
            raise ImportError(f"{name} is absent in this test")

sys.meta_path.insert(0, Absent())
import torch
before = dict(os.environ), threading.active_count(), sorted(os.listdir())
import mlcd_ds
names = [info.name for info in pkgutil.walk_packages(mlcd_ds.__path__, "mlcd_ds.", onerror=sys.excepthook)]
for name in names:
    importlib.import_module(name)
assert (dict(os.environ), threading.active_count(), sorted(os.listdir())) == before, "importing had a side effect"
assert not torch.distributed.is_initialized() and torch.initial_seed() == 20250101
try:
    import faiss
except ImportError:
    sys.stdout.write(f"{len(names)}")
"""


def test_every_module_imports_without_deepspeed_dali_and_faiss(tmp_path: Path) -> None:
    source = IMPORT_ALL.replace("import torch\n", "import torch; torch.manual_seed(20250101)\n", 1)
    done = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == str(len(SOURCES) - 1) and not done.stderr  # all but mlcd_ds/__init__.py
