"""Every example in a docstring runs and prints what it says, and every public name has one.

Examples run in a folder of their own that holds what they take for granted: ``model-folder`` (a
tiny Llama with a tokenizer) and ``texts.jsonl``.
"""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("api", "offload", "optim", "quant", "zo")
PUBLIC = ("headrace", "headrace.optim", "headrace.quant", "headrace.zo")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def modules_with_examples() -> list[str]:
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if ">>>" in path.read_text(encoding="utf-8"):
                parts = path.relative_to(ROOT).with_suffix("").parts
                top = ["headrace"] if folder == "api" else ["headrace", folder]
                inner = [part for part in parts[1:] if part != "__init__"]
                found.append(".".join([*top, *inner]))
    return found


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", modules_with_examples())
@pytest.mark.usefixtures("example_folder")
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_has_an_example(package: str) -> None:
    module = importlib.import_module(package)
    without = [n for n in module.__all__ if ">>>" not in (getattr(module, n).__doc__ or "")]
    assert not without
    # A docstring of its own, not that of a base class.
    classes = [v for v in (getattr(module, n) for n in module.__all__) if isinstance(v, type)]
    assert not [c.__name__ for c in classes if any(c.__doc__ is b.__doc__ for b in c.__mro__[1:])]
