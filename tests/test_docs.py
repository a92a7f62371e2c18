"""The pages: their links lead somewhere, their Python runs, their tests exist, the site builds."""

from __future__ import annotations

import importlib.util
import re
import runpy
import subprocess
import sys
import unicodedata
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """The text of a page without its code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    result = set()
    for heading in re.findall(
        r"^#{1,6} +(.+?) *$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE
    ):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        kept = "".join(
            c for c in plain if c in " -_" or unicodedata.category(c)[0] in "LN"
        ).replace(" ", "-")
        count = found[kept] = found.get(kept, -1) + 1
        result.add(f"{kept}-{count}" if count else kept)
    return result


def test_there_are_pages() -> None:
    assert {"README.md", "DESIGN.md", "migrating.md"} <= {page.name for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        aim = (page.parent / path).resolve() if path else page
        if not aim.exists() or not aim.is_relative_to(ROOT):
            broken.append(target)
        elif anchor and aim.suffix == ".md" and anchor not in anchors(aim):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_and_tests_that_are_named_exist(page: Path) -> None:
    missing = []
    text = page.read_text(encoding="utf-8")
    for path, name in re.findall(r"`((?:tests|benchmarks)/[\w/.]+\.py)(?:::(\w+))?`", text):
        source = ROOT / path
        if not source.exists() or (name and f"def {name}(" not in source.read_text()):
            missing.append(f"{path}::{name}")
    assert not missing


@pytest.mark.parametrize(
    "page",
    [p for p in sorted((ROOT / "docs").glob("*.md")) if "```python" in p.read_text()],
    ids=lambda page: page.stem,
)
@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("example_folder")
def test_the_python_of_a_page_runs(page: Path) -> None:
    blocks = FENCE.findall(page.read_text(encoding="utf-8"))
    source = "\n".join(code for language, code in blocks if language == "python")
    script = Path("page.py")
    script.write_text(source, encoding="utf-8")
    runpy.run_path(str(script))


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    if importlib.util.find_spec("pdoc") is None:
        pytest.skip("the extra headrace[docs]")
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "build.py"), "--out", str(tmp_path / "site")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "headrace.load" in (tmp_path / "site" / "api" / "headrace.html").read_text()
    assert (tmp_path / "site" / "docs" / "migrating.html").exists()
