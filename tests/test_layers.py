"""Imports run one way, files are short, and small modules load nothing large."""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import captioning

ROOT = Path(__file__).resolve().parent.parent
MAIN = "flickr_image_caption_with_pytorch_resnet_lstm"
# Their command lines, and `Captioned.plot`, import what they show, whatever it is, when they are called.
SHOWING = ("experiment_utils", "download_datasets", "captioning.captioner", "captioning.config.settings")
PARTS = ("io", "config.settings", "runs.directories", "runs.plots", "scoring.scores", "data.layouts", "data.dataset")
SMALL = ("experiment_utils", "captioning", *(f"captioning.{name}" for name in PARTS))
# The rooms in the order of docs/architecture.md: each may import from those before it.
ORDER = (
    "io", "distributed", "config", "data", "scoring", "decoding", "encoders", "decoders", "runs", "models", "captioner",
    "training", "the helper modules", "training.source", "modes", "the main script",
)  # fmt: skip
MOST_FILES = 8  # of a room


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(path): path for path in [*ROOT.glob("*.py"), *ROOT.glob("captioning/**/*.py")]}


def rank(module: str) -> int:
    """The place of a module's room in `ORDER`."""
    top, _, rest = module.partition(".")
    room = rest if rest in ORDER else rest.partition(".")[0] or "captioner"  # the package itself names what it has
    if module in (MAIN, "captioning.__main__"):  # which runs it
        room = "the main script"
    return ORDER.index(room if top == "captioning" or module == MAIN else "the helper modules")


def imports(node: ast.AST, in_function: bool = False) -> Iterator[tuple[str, bool]]:
    """The project's modules that a piece of code imports, and whether it does so within a function."""
    for child in ast.iter_child_nodes(node):
        names = []
        if isinstance(child, ast.Import):
            names = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert child.module and not child.level, "imports name the whole path of a module"
            whole = [f"{child.module}.{alias.name}" for alias in child.names]
            names = [name if name in FILES else child.module for name in whole]
        yield from ((name, in_function) for name in names if name in FILES)
        yield from imports(child, in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


IMPORTS = {module: set(imports(ast.parse(path.read_text("utf-8")))) for module, path in FILES.items()}


def test_nobody_imports_upwards() -> None:
    upwards = {
        f"{module} imports {name}"
        for module, found in IMPORTS.items()
        for name, in_function in found
        if rank(name) > rank(module) and not (module in SHOWING and in_function)
    }
    assert upwards == set()


def test_a_room_has_few_files() -> None:
    rooms = Counter(path.parent.name for path in ROOT.glob("captioning/*/*.py") if path.name != "__init__.py")
    assert set(rooms) <= set(ORDER) and max(rooms.values()) <= MOST_FILES


def test_there_are_no_circles() -> None:
    """`prepare` raises CycleError, which names the circle."""
    graph = {module: {name for name, _ in found} for module, found in IMPORTS.items()}
    TopologicalSorter(graph).prepare()


def test_no_file_has_more_than_600_lines() -> None:
    paths = [*FILES.values(), *ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in paths}
    assert {name: length for name, length in lengths.items() if length > 600} == {}


def test_small_modules_load_nothing_large() -> None:
    """Neither they nor the answer to a flag take the seconds of importing PyTorch, pandas and matplotlib."""
    program = f"import sys, {', '.join(SMALL)}; captioning.config.settings.parse_flags([]);"
    program += "print({'torch', 'pandas', 'matplotlib'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def test_nothing_goes_through_pyplot() -> None:
    """pyplot keeps every figure until it is closed, and must not be used in a thread."""
    statement = re.compile(r"^\s*(from|import)\b.*\bpyplot\b", re.MULTILINE)
    assert [name for name, path in FILES.items() if statement.search(path.read_text("utf-8"))] == []


def test_every_public_name_is_there() -> None:
    assert set(captioning.__all__) <= set(dir(captioning))
    for name in captioning.__all__:
        assert getattr(captioning, name).__name__ == name
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert newest and newest[1] == captioning.__version__
