"""Accuracy of zeroth-order methods on a real task at equal numbers of forward passes.

Claims: the recommended method beats MeZO; every method beats the model as it comes.

Task: sentiment of short movie-review sentences as a choice between two words after a prompt
("... It was great / terrible"), SmolLM2-135M in bf16.  The sentences are those of the VADER paper
(C. J. Hutto and E. Gilbert, ICWSM 2014), from the source distribution of ``vaderSentiment`` on
PyPI: fetched at run time by pip, checked by its SHA-256, kept in the cache folder, never part of
this repository.

Every method gets ``--forwards`` forward passes of one batch; first-order LoRA spends three on a
step (a backward pass counts as two).  The recommended method's forwards include those that measure
its input directions.  All learning rates fall linearly to zero, as they do in the Hugging Face
Trainer.  A method's rate is the best of a short grid on sentences of their own (``--sweep``
forwards, mean loss of ``--sweep-seeds``); accuracy is that of other sentences.  MeZO and the
recommended method run at half that rate too and are judged by their better one; LoRA, for
comparison only, runs at a usual rate.  The JSON file is written after every run and continued by
the next call: a long table may be made in pieces.

    python benchmarks/zo_quality.py --out zo-quality.json --plot zo-quality.png
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headrace.demo import cache_folder, demo_model
from headrace.progress import Silent
from headrace.quant.int4_group import Int4GroupCodec
from headrace.quant.linear import EncodedLinear
from headrace.zo import Basis, ZOSettings, ZOStep, measure_basis
from headrace.zo.basis import MEASURED_BATCHES
from headrace.zo.objective import label_word_losses
from headrace.zo.quantised import qzo_settings, scale_parameters
from headrace.zo.settings import recommended
from headrace.zo.weights import ResidentWeights

PACKAGE, VERSION = "vaderSentiment", "3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
TEMPLATE, WORDS = "{} It was", (" terrible", " great")
GRIDS = {
    "MeZO": (5e-5, 1e-4, 2e-4, 4e-4),
    # A rate that is best for short runs may be too large for long ones.
    "MeZO, half the rate": (1e-4,),
    "recommended": (2e-2, 3e-2, 4e-2, 6e-2, 9e-2),
    "recommended, half the rate": (3e-2,),
    "QZO": (3e-6, 1e-5, 3e-5),
    "LoRA, first order": (5e-4,),
}
PARTS = 3  # of a run, with a measurement after each

Row = dict[str, Any]
Sentence = tuple[str, int]


def sentences() -> list[Sentence]:
    """The data set's movie sentences and their signs, clear cases only (|score| >= 1 of 4)."""
    folder = cache_folder() / f"{PACKAGE}-{VERSION}"
    path = folder / f"{PACKAGE}-{VERSION}.tar.gz"
    if not path.is_file():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation"]
        command += ["--no-binary", ":all:", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
        print("fetching the sentences: " + " ".join(command[2:]), flush=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not path.is_file():
            raise SystemExit(
                f"cannot fetch {PACKAGE} {VERSION}: {done.stderr.strip()[-300:]}\n"
                f"put its source distribution from PyPI at {path}"
            )
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise SystemExit(f"{path} is not the file that PyPI has (SHA-256 differs); remove it")
    inner = _member(data, "hutto_ICWSM_2014.tar.gz")
    text = _member(inner, "movieReviewSnippets_GroundTruth.txt").decode("utf-8", errors="replace")
    found = []
    for line in text.splitlines():
        parts = line.split("\t")
        if len(parts) >= 3 and abs(float(parts[1])) >= 1:
            found.append((parts[2].strip(), int(float(parts[1]) > 0)))
    return found


def _member(archive: bytes, ending: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        names = [n for n in tar.getnames() if n.split("/")[-1] == ending]
        file = tar.extractfile(names[0]) if names else None
        if file is None:
            raise SystemExit(f"the archive of {PACKAGE} {VERSION} has no {ending}")
        return file.read()


class Task:
    """The model's tokenizer, and sentences to learn from, to choose by and to be judged by."""

    def __init__(self, *, judged: int, chosen: int, longest: int) -> None:
        from transformers import AutoTokenizer

        self.folder = demo_model(Silent())
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder, padding_side="left")
        rows = [row for row in sentences() if 5 <= self._tokens(row) <= longest]
        random.Random(0).shuffle(rows)
        # Sentences of like length are measured together: less padding, the same mean.
        self.dev = sorted(rows[:chosen], key=self._tokens)
        self.test = sorted(rows[chosen : chosen + judged], key=self._tokens)
        self.train = rows[chosen + judged :]
        self.words = [self.tokenizer(word).input_ids[0] for word in WORDS]

    def _tokens(self, row: Sentence) -> int:
        return len(self.tokenizer(row[0]).input_ids)

    def model(self) -> nn.Module:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.bfloat16).eval()

    def batch(self, rows: list[Sentence]) -> dict[str, Tensor]:
        texts = [TEMPLATE.format(text) for text, _ in rows]
        made = dict(self.tokenizer(texts, return_tensors="pt", padding=True))
        return {**made, "classes": torch.tensor([label for _, label in rows])}

    def scores(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        output = model(**unlabelled(batch))
        return output.logits[:, -1, self.words].float()

    @torch.no_grad()
    def measure(self, model: nn.Module, rows: list[Sentence]) -> tuple[float, float]:
        """Accuracy and mean loss among the two words."""
        right, loss = 0, 0.0
        for first in range(0, len(rows), 32):
            batch = self.batch(rows[first : first + 32])
            scores = self.scores(model, batch)
            right += int((scores.argmax(1) == batch["classes"]).sum())
            loss += float(
                nn.functional.cross_entropy(scores, batch["classes"], reduction="sum").double()
            )
        return right / len(rows), loss / len(rows)


def unlabelled(batch: dict[str, Tensor]) -> dict[str, Any]:
    """What the model is called with: the batch without its classes, one position of logits."""
    inputs: dict[str, Any] = {n: value for n, value in batch.items() if n != "classes"}
    return inputs | {"use_cache": False, "logits_to_keep": 1}


Runner = Iterator[tuple[int, Callable[[], tuple[float, float]]]]


def runner(task: Task, key: Row, rows: list[Sentence], *, batch: int, forwards: int) -> Runner:
    """Take steps for ever; yields forwards spent and how to measure the weights as they stand."""
    method, lr, seed = key["method"], key["lr"], key["seed"]
    chance = random.Random(1000 + seed)
    model = task.model()

    def draw() -> dict[str, Tensor]:
        return task.batch(chance.sample(task.train, batch))

    if method.startswith("LoRA"):
        yield from _first_order(task, model, key, rows, draw, forwards)
        return
    basis, spent = None, 0
    if method.startswith("recommended"):
        # Measured on batches that the run does not see, and paid for like any forward.
        measured_on = [unlabelled(draw()) for _ in range(MEASURED_BATCHES)]
        basis, spent = measure_basis(model, measured_on), len(measured_on)
    zo, together = zeroth_order(model, method, lr, seed, batch, basis)
    estimator = zo.settings.estimator

    def measured() -> tuple[float, float]:
        with zo.current():
            return task.measure(model, rows)

    while True:
        data = draw()

        def losses(model: nn.Module, count: int, data: dict[str, Tensor] = data) -> list[float]:
            return label_word_losses(model, data, count, words=task.words, parts=estimator.parts)

        rate = lr * max(0.0, 1 - spent / forwards)
        if together:
            zo.step_together(losses, lr=rate)
        else:
            zo.step(lambda model: losses(model, 1)[0], lr=rate)
        spent += estimator.copies
        yield spent, measured


def zeroth_order(
    model: nn.Module, method: str, lr: float, seed: int, batch: int, basis: Basis | None
) -> tuple[ZOStep, bool]:
    """The run of a method, and whether its members share one forward."""
    if method.startswith("MeZO"):
        return ZOStep(model, ZOSettings(lr=lr, eps=1e-3, seed=seed)), False
    if method == "QZO":
        codec = Int4GroupCodec(block_size=64, scale_dtype="float32")
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and ".layers." in name:
                parent, _, leaf = name.rpartition(".")
                encoded = EncodedLinear.from_linear(module, codec)
                setattr(model.get_submodule(parent), leaf, encoded)
        weights = ResidentWeights(scale_parameters(model))
        return ZOStep(model, qzo_settings(lr=lr, seed=seed), weights=weights), False
    return ZOStep(model, recommended(lr=lr, seed=seed, examples=batch, basis=basis)), True


def _first_order(
    task: Task,
    model: nn.Module,
    key: Row,
    rows: list[Sentence],
    draw: Callable[[], dict[str, Tensor]],
    forwards: int,
) -> Runner:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(key["seed"])
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    # fp32 adapters over bf16 activations are the slower way on a CPU.
    adapted = get_peft_model(model.float(), config)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=key["lr"], weight_decay=0.0)
    spent = 0
    while True:
        data = draw()
        optimizer.param_groups[0]["lr"] = key["lr"] * max(0.0, 1 - spent / forwards)
        nn.functional.cross_entropy(task.scores(adapted, data), data["classes"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        spent += 3
        yield spent, lambda: task.measure(adapted, rows)


def run(
    task: Task, key: Row, rows: list[Sentence], *, forwards: int, batch: int, parts: int
) -> Row:
    """One run: its accuracy and loss after each part of its forwards."""
    started = time.perf_counter()
    curve = []
    for spent, measured in runner(task, key, rows, batch=batch, forwards=forwards):
        if spent >= forwards * (len(curve) + 1) / parts:
            accuracy, loss = measured()
            if not math.isfinite(loss):
                loss = 1e9
            curve.append({"forwards": spent, "accuracy": accuracy, "loss": loss})
        if len(curve) == parts:
            break
    return {**key, "curve": curve, "seconds": round(time.perf_counter() - started, 1)}


def main() -> int:
    """Run what the file does not hold yet; table, plot, claims."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file, written after every run, continued")
    parser.add_argument("--plot", type=Path, help="PNG of accuracy over forwards")
    parser.add_argument("--quick", action="store_true", help="one seed, few forwards")
    parser.add_argument("--forwards", type=int, default=None, help="default 300 (quick: 60)")
    parser.add_argument("--sweep", type=int, default=None, help="default 100 (quick: 30)")
    parser.add_argument("--sweep-seeds", type=int, default=None, help="default 2 (quick: 1)")
    parser.add_argument("--seeds", type=int, default=None, help="default 3 (quick: 1)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--methods", nargs="+", choices=list(GRIDS), default=list(GRIDS))
    parser.add_argument("--rows", type=Path, nargs="*", default=[], help="files of earlier runs")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    quick = given.quick
    forwards = given.forwards or (60 if quick else 300)
    sweep = given.sweep or (30 if quick else 100)
    sweep_seeds = range(100, 100 + (given.sweep_seeds or (1 if quick else 2)))
    seeds = given.seeds or (1 if quick else 3)
    judged, chosen = (100, 100) if quick else (500, 250)
    task = Task(judged=judged, chosen=chosen, longest=14)
    setup = {"forwards": forwards, "sweep": sweep, "batch": given.batch, "quick": quick}
    setup |= {"judged": judged, "chosen": chosen, "schedule": "linear"}
    setup["sweep_seeds"] = len(sweep_seeds)
    done = [row for path in (given.out, *given.rows) for row in _continued(path, setup)]
    grids = {method: GRIDS[method] for method in given.methods}

    def row(kind: str, method: str, lr: float, seed: int) -> Row:
        key: Row = {"kind": kind, "method": method, "lr": lr, "seed": seed}
        for known in done:
            if all(known[name] == value for name, value in key.items()):
                return known
        choosing = kind == "sweep"
        made = run(
            task,
            key,
            task.dev if choosing else task.test,
            forwards=sweep if choosing else forwards,
            batch=given.batch,
            parts=1 if choosing else PARTS,
        )
        done.append(made)
        print(json.dumps(made), flush=True)
        _save(given.out, setup, done, [])
        return made

    best: dict[str, float] = {}
    for method, grid in grids.items():
        trials = {}
        for lr in grid if len(grid) > 1 else ():
            ends = [row("sweep", method, lr, seed)["curve"][-1] for seed in sweep_seeds]
            trials[lr] = statistics.mean(end["loss"] for end in ends)
        best[method] = min(trials, key=trials.__getitem__) if trials else grid[0]
    accuracy, loss = task.measure(task.model(), task.test)
    finals = {
        method: [row("final", method, best[method], seed) for seed in range(seeds)]
        for method in grids
    }
    claims = report(finals, best, accuracy, loss)
    _save(given.out, setup, done, claims, {"accuracy": accuracy, "loss": loss})
    if given.plot:
        plot(finals, accuracy, given.plot)
    for claim in claims:
        print(json.dumps(claim))
    return 0 if all(claim["holds"] for claim in claims) else 1


def report(
    finals: dict[str, list[Row]], best: dict[str, float], accuracy: float, loss: float
) -> list[Row]:
    """Print the table; return the claims."""
    print(f"\n{'method':<28}{'lr':>8}{'accuracy':>10}{'+-':>7}{'loss':>8}{'seconds':>9}")
    print(f"{'zero-shot':<28}{'':>8}{accuracy:>10.3f}{'':>7}{loss:>8.3f}")
    means = {}
    for method, rows in finals.items():
        ends = [row["curve"][-1]["accuracy"] for row in rows]
        means[method] = statistics.mean(ends)
        spread = statistics.stdev(ends) if len(ends) > 1 else 0.0
        end_loss = statistics.mean(row["curve"][-1]["loss"] for row in rows)
        seconds = statistics.mean(row["seconds"] for row in rows)
        print(
            f"{method:<28}{best[method]:>8.0e}{means[method]:>10.3f}{spread:>7.3f}"
            f"{end_loss:>8.3f}{seconds:>9.0f}"
        )
    claims = [
        _claim(f"{method}: accuracy over zero-shot", mean - accuracy)
        for method, mean in means.items()
    ]
    ours, theirs = (
        [mean for method, mean in means.items() if method.startswith(name)]
        for name in ("recommended", "MeZO")
    )
    if ours and theirs:
        lead = max(ours) - max(theirs)
        claims.insert(0, _claim("recommended: accuracy over MeZO, both at their better rate", lead))
    return claims


def _claim(text: str, value: float) -> Row:
    return {"claim": text, "value": round(value, 4), "bar": 0.0, "holds": value > 0}


def _continued(path: Path | None, setup: Row) -> list[Row]:
    if path is None or not path.is_file():
        return []
    found = json.loads(path.read_text())
    if found["setup"] != setup:
        raise SystemExit(f"{path} holds runs of another setup {found['setup']}; give another --out")
    rows: list[Row] = found["rows"]
    return rows


def _save(
    path: Path | None, setup: Row, rows: list[Row], claims: list[Row], zero_shot: Row | None = None
) -> None:
    if path is None:
        return
    machine = {"cpu": platform.processor(), "cores": os.cpu_count()}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    whole = {"machine": machine, "versions": versions, "setup": setup, "zero_shot": zero_shot}
    draft = path.with_name(path.name + ".new")
    draft.write_text(json.dumps({**whole, "rows": rows, "claims": claims}, indent=1) + "\n")
    os.replace(draft, path)


def plot(finals: dict[str, list[Row]], zero_shot: float, path: Path) -> None:
    """Draw accuracy over forwards, the mean over seeds and their range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for method, rows in finals.items():
        at = [0, *(point["forwards"] for point in rows[0]["curve"])]
        curves = [[zero_shot, *(point["accuracy"] for point in row["curve"])] for row in rows]
        mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
        (line,) = axes.plot(at, mean, marker="o", markersize=3, label=method)
        low, high = (list(map(f, zip(*curves, strict=True))) for f in (min, max))
        axes.fill_between(at, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.axhline(zero_shot, color="#888888", linewidth=0.8)
    axes.set_xlabel("forward passes of one batch")
    axes.set_ylabel("accuracy on held-out sentences")
    axes.set_title("SmolLM2-135M, sentiment of movie sentences")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
