"""The built wheel and the source distribution hold every module of the tree, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("api", "offload", "optim", "quant", "zo")
FILES = ("pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a copy: builds leave litter behind."""
    root = tmp_path_factory.mktemp("wheel")
    tree = root / "tree"
    tree.mkdir()
    litter = shutil.ignore_patterns("__pycache__", "*.so")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=litter)
    for name in FILES:
        shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(root / "dist")]
    done = subprocess.run([*command, str(tree)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "dist"


def expected_modules() -> set[str]:
    found = set()
    for folder in FOLDERS:
        top = "headrace" if folder == "api" else f"headrace/{folder}"
        for path in (ROOT / folder).rglob("*"):
            if path.suffix == ".py" or path.name == "py.typed":
                found.add(f"{top}/{path.relative_to(ROOT / folder).as_posix()}")
    return found


def test_the_wheel_holds_the_tree(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = {name.rsplit("/", 1)[1] for name in wheel.namelist() if ".dist-info/" in name}
    assert held == expected_modules()
    assert {"METADATA", "entry_points.txt", "LICENSE"} <= metadata


def test_the_source_distribution_can_build_the_wheel_again(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
    }
    assert sources | set(FILES) <= names


def test_the_wheel_runs_from_another_folder(built: Path, tmp_path: Path) -> None:
    wheel = next(built.glob("*.whl"))
    code = (
        f"import sys; sys.path.insert(0, {str(wheel)!r}); import headrace; "
        "print(headrace.__file__); from headrace.cli import main; main(['--help'])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert str(wheel) in done.stdout and "tune" in done.stdout, done.stderr
