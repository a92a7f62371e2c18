"""Every example in a docstring runs and prints what it says, and every public name has one.

Examples run in a folder of their own that holds what they take for granted: ``model-folder`` (a
tiny Llama with a tokenizer) and ``texts.jsonl``.
"""

from __future__ import annotations

import doctest
import importlib
import json
import shutil
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


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what examples may use."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("examples")
    letters = {letter: i for i, letter in enumerate(["</s>", *sorted(ByteLevel.alphabet())])}
    letter_tokenizer = Tokenizer(BPE(letters, []))
    letter_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letter_tokenizer, eos_token="</s>")
    tokenizer.save_pretrained(folder / "model-folder")
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(letters),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "model-folder")
    lines = [json.dumps({"text": f"{n} and {n} make {2 * n}. " * 4}) for n in range(40)]
    (folder / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def example_folder(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of one test: a fresh copy."""
    monkeypatch.chdir(shutil.copytree(material, tmp_path / "here"))
    return tmp_path


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", modules_with_examples())
@pytest.mark.usefixtures("example_folder")
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_has_an_example(package: str) -> None:
    module = importlib.import_module(package)
    without = [
        name for name in module.__all__ if ">>>" not in (getattr(module, name).__doc__ or "")
    ]
    assert not without
    # A docstring of its own, not that of a base class.
    classes = [v for v in (getattr(module, n) for n in module.__all__) if isinstance(v, type)]
    assert not [c.__name__ for c in classes if any(c.__doc__ is b.__doc__ for b in c.__mro__[1:])]
