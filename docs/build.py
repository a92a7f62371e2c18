"""Builds the site: every page of the repository, and the API reference from the docstrings.

``python docs/build.py --out site`` needs the extra ``headrace[docs]`` and no network.  A warning
of the builder (a name without a page, a type that cannot be resolved) is an error: exit code 1.
"""

from __future__ import annotations

import argparse
import html
import importlib
import re
import sys
import warnings
from pathlib import Path

import pdoc
import pdoc.render

from headrace.progress import ConsoleWatcher

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("headrace", "headrace.optim", "headrace.quant", "headrace.zo")
MODULES = ("headrace.zo.trainer", "headrace.zo.streamed", "headrace.zo.distributed")

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>TITLE</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 16px/1.6 system-ui, sans-serif; max-width: 54rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1f24; background: #fff; }
pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; }
code { font-size: 90%; } table { border-collapse: collapse; }
th, td { text-align: left; padding: .3rem .8rem; border-bottom: 1px solid #d8dee4; }
</style></head><body><p><a href="ROOTREADME.html">Headrace</a> ·
<a href="ROOTdocs/README.html">how to</a> · <a href="ROOTapi/headrace.html">API</a></p>
BODY
</body></html>
"""


def build_api(out: Path) -> None:
    """Write the reference of the public packages."""
    for name in PACKAGES:
        package = importlib.import_module(name)
        for public in package.__all__:
            # Names that are fetched on first use are put in place, where the builder looks.
            vars(package)[public] = getattr(package, public)
    listed = "|".join(re.escape(n.removeprefix("headrace.")) for n in (*PACKAGES, *MODULES)[1:])
    pdoc.render.configure(docformat="restructuredtext", show_source=False)
    pdoc.pdoc(
        *PACKAGES, *MODULES, f"!headrace\\.(?!(?:{listed})$)[\\w.]+", output_directory=out / "api"
    )


def build_pages(out: Path) -> None:
    """Write every Markdown page at its place, links to pages and folders adapted."""
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        place = page.relative_to(ROOT)
        text = re.sub(
            r"\]\(((?!https?:)[^)\s#]+)\.md(#[^)\s]*)?\)",
            lambda m: f"]({m[1]}.html{m[2] or ''})",
            page.read_text(encoding="utf-8"),
        )
        title = html.escape(text.splitlines()[0].lstrip("# "))
        body = pdoc.render_helpers.to_html(text)
        target = out / place.with_suffix(".html")
        target.parent.mkdir(parents=True, exist_ok=True)
        root = "../" * (len(place.parts) - 1)
        shell = _PAGE.replace("TITLE", title).replace("ROOT", root)
        target.write_text(shell.replace("BODY", body), encoding="utf-8")


def main() -> int:
    """Build into ``--out``; 1 if the builder warned."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("site"))
    out = parser.parse_args().out
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build_api(out)
        build_pages(out)
    say = ConsoleWatcher().say
    ours = [w for w in caught if "pdoc" in w.filename]
    for warning in ours:
        say(str(warning.message))
    say(f"{out}: {len(list(out.rglob('*.html')))} pages, {len(ours)} warnings")
    return 1 if ours else 0


if __name__ == "__main__":
    sys.exit(main())
