"""The arrows between packages, read from the sources' imports, and what is on the wheel.

Reading the imports with ``ast`` sees every import wherever it stands, except those under
``if TYPE_CHECKING``, which never run.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "api": "headrace",
    "offload": "headrace.offload",
    "optim": "headrace.optim",
    "quant": "headrace.quant",
    "zo": "headrace.zo",
}
ALLOWED = {
    "quant": {"quant"},
    "optim": {"optim", "quant"},
    "offload": {"offload"},
    "zo": {"zo", "offload", "optim", "quant"},
    "api": {"api", "zo", "offload", "optim", "quant"},
}
# The engine's logic: tested without torch, in milliseconds.
NO_TORCH = (
    "budget",
    "errors",
    "extents",
    "faults",
    "io",
    "lock",
    "pool",
    "record",
    "requests",
    "residency",
    "schedule",
    "simulate",
    "source",
    "store",
    "timeline",
    "transfer",
    "verify",
)
# The streamed layer and what it is made of: embedding, head and loss are streamed layers too, and
# ``workspace`` measures what a micro-batch saves for its backward pass.
MODULE_AND_AUTOGRAD = {"layer", "embedding", "head_weight", "loss", "runtime", "workspace"}
STREAM_NAMES = {"Stream", "Event", "ExternalStream", "current_stream", "stream", "synchronize"}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


ALL_SOURCES = [path for folder in PACKAGES for path in sources(folder)]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    parts = [PACKAGES[folder], *rest]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def runtime_nodes(tree: ast.AST) -> list[ast.AST]:
    """Every node but those under ``if TYPE_CHECKING:``."""
    found: list[ast.AST] = []
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        found.append(node)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting.extend(node.orelse)
        else:
            waiting.extend(ast.iter_child_nodes(node))
    return found


def imports_of(path: Path) -> set[str]:
    """Absolute dotted names of what a file imports when it runs; members of packages included."""
    found: set[str] = set()
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in runtime_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found.add(stem)
            found.update(f"{stem}.{alias.name}" for alias in node.names)
    return found


def imported_at_the_top(path: Path) -> set[str]:
    """Top-level names of what a file imports as soon as it is imported itself."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found


def folder_of(module: str) -> str | None:
    """The folder of one of our modules, or None for a module of others."""
    parts = module.split(".")
    if parts[0] != "headrace":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in PACKAGES else "api"


@pytest.mark.parametrize("path", ALL_SOURCES, ids=name_of)
def test_packages_import_only_what_lies_below(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    used = {found for module in imports_of(path) if (found := folder_of(module)) is not None}
    # ``from .. import x`` reads as the root package; only ``api`` may.
    assert used <= ALLOWED[folder], f"{name_of(path)} imports {used - ALLOWED[folder]}"


def test_no_files_import_each_other_in_a_circle() -> None:
    by_module = {module_of(path): path for path in ALL_SOURCES if path.name != "__init__.py"}
    ahead = {name: imports_of(path) & by_module.keys() for name, path in by_module.items()}
    # Take away what imports nothing that is left; what cannot be taken away goes in circles.
    while free := [name for name, used in ahead.items() if not used & ahead.keys()]:
        for name in free:
            del ahead[name]
    assert not ahead, {name: sorted(used & ahead.keys()) for name, used in ahead.items()}


@pytest.mark.parametrize("path", ALL_SOURCES, ids=name_of)
def test_every_file_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in sources("offload")
        if path.stem in NO_TORCH or "No torch." in path.read_text()
    ],
    ids=name_of,
)
def test_the_engines_logic_reaches_no_torch(path: Path) -> None:
    by_module = {module_of(one): one for one in ALL_SOURCES}
    seen, waiting = set(), [path]
    while waiting:
        current = waiting.pop()
        seen.add(current)
        imported = imports_of(current)
        third_party = {name.split(".")[0] for name in imported}
        assert "torch" not in third_party, f"{name_of(path)} reaches torch in {name_of(current)}"
        waiting += [by_module[m] for m in imported & by_module.keys() if by_module[m] not in seen]


def test_only_lanes_names_streams_and_events() -> None:
    guilty = set()
    for path in ALL_SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in STREAM_NAMES:
                if ast.unparse(node.value) in {"torch.cuda", "torch", "torch.accelerator"}:
                    guilty.add(name_of(path))
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.cuda"):
                guilty.add(name_of(path))
    assert guilty <= {"offload/lanes.py"}


@pytest.mark.parametrize("path", sources("offload"), ids=name_of)
def test_only_streamed_layers_touch_modules_and_autograd(path: Path) -> None:
    if path.stem in MODULE_AND_AUTOGRAD:
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    touched = {n for n in named if n in {"torch.nn", "torch.autograd"}}
    touched |= {m for m in imports_of(path) if m.startswith(("torch.nn", "torch.autograd"))}
    assert not touched, f"{name_of(path)} touches {sorted(touched)}"


# The package


def test_importing_the_package_is_lean() -> None:
    code = (
        "import sys, headrace\n"
        "heavy = {'torch', 'transformers', 'numpy', 'numba'} & {*sys.modules}\n"
        "sys.exit(f'imports {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_every_module_initialises_no_device_and_warns_of_nothing() -> None:
    # Files that import Triton at the top are kernels, imported by the first launch only.
    absent = {"triton"} if importlib.util.find_spec("triton") is None else set()
    modules = [
        module_of(path)
        for path in ALL_SOURCES
        if path.stem != "__main__" and not absent & imported_at_the_top(path)
    ]
    # Third parties may warn; what our own files raise is an error.
    code = (
        "import importlib, torch, warnings\n"
        "warnings.filterwarnings('error', module='headrace')\n"
        f"[importlib.import_module(name) for name in {modules!r}]\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_of_the_face_resolves() -> None:
    import headrace

    for name in headrace.__all__:
        assert getattr(headrace, name) is not None
    # A module that bore a public function's name would replace it when imported.
    modules = {path.stem for path in sources("api")}
    assert not modules & {*headrace.__all__}


def test_the_package_list_is_the_tree() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-dir"] == {name: folder for folder, name in PACKAGES.items()}
    in_tree = {module_of(path.parent / "__init__.py") for path in ALL_SOURCES}
    assert sorted(settings["packages"]) == sorted(in_tree)
    for folder in {path.parent for path in ALL_SOURCES}:
        assert (folder / "__init__.py").is_file(), f"{name_of(folder)} lacks __init__.py"
