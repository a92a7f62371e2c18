"""Importing headrace, and then all of it, leaves the process as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SNAPSHOT = """
import builtins, locale, os, signal, sys, threading, warnings
from pathlib import Path

def snapshot():
    watched = [sys.excepthook, sys.displayhook, threading.excepthook, builtins.print,
               builtins.open, warnings.showwarning, signal.getsignal(signal.SIGINT),
               signal.getsignal(signal.SIGTERM), locale.getlocale(), os.getcwd()]
    files = {os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
             if Path(f"/proc/self/fd/{n}").exists()}
    files = sorted(f for f in files if "/proc" not in f)
    names = sorted(p.name for p in Path().iterdir())
    marks = [id(w) if callable(w) else w for w in watched]
    return marks, files, threading.active_count(), dict(os.environ), names
"""

FACE = """
before = snapshot()
import headrace
assert snapshot() == before
assert "torch" not in sys.modules
"""

EVERYTHING = """
import inspect, torch, transformers, peft
from transformers import Trainer, PreTrainedModel, TrainingArguments
from peft import PeftModel
KINDS = (torch.nn.Module, torch.nn.Linear, torch.nn.Embedding, torch.Tensor, torch.optim.Optimizer,
         Trainer, TrainingArguments, PreTrainedModel, PeftModel)

def attributes():
    found = {f"{k.__name__}.{n}": id(v) for k in KINDS for n, v in vars(k).items()
             if inspect.isfunction(v)}
    found |= {f"torch.{n}": id(v) for n, v in vars(torch).items() if callable(v)}
    found |= {f"F.{n}": id(v) for n, v in vars(torch.nn.functional).items() if callable(v)}
    return found

patched, threads, state = attributes(), snapshot()[2], torch.get_rng_state()
settings = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
import headrace
for name in headrace.__all__:
    getattr(headrace, name)
import headrace.optim, headrace.quant, headrace.zo
now = attributes()
assert {n: i for n, i in now.items() if n in patched} == patched
assert snapshot()[2] == threads
assert torch.equal(torch.get_rng_state(), state)
assert (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()) == settings
assert not torch.cuda.is_initialized()
assert not list(Path().iterdir())
"""


def run(code: str, folder: Path, *options: str) -> None:
    done = subprocess.run(
        [sys.executable, *options, "-c", SNAPSHOT + code],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr


def test_the_face_opens_nothing_starts_nothing_and_changes_nothing(tmp_path: Path) -> None:
    run(FACE, tmp_path, "-W", "error")


def test_every_public_name_patches_nothing_and_starts_nothing(tmp_path: Path) -> None:
    run(EVERYTHING, tmp_path)
