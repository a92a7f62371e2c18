"""Runs public fine-tuning scripts of transformers and PEFT with the lines changed for Headrace.

``python examples/check.py --transformers DIR --peft DIR``, checkouts of those repositories
(``docs/examples.md`` names the commits); without one of them its scripts are left out.  Each
script is copied into a scratch folder, changed, and run on the CPU with a tiny model and a few
rows made here; no network.  It prints every diff.  Exit code 1 if a script fails; a script that
is not what the change was written for is refused.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path


@dataclass(frozen=True)
class Change:
    """Lines ``first`` .. ``last`` (found by how they begin) become ``lines``."""

    first: str
    last: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """One script: its path in its repository, what changes, how it is called, what it leaves."""

    repository: str
    path: str
    changes: tuple[Change, ...]
    arguments: tuple[str, ...]
    result: str


# Stands in for the package `evaluate`, whose metrics are downloaded.
METRICS = """
class Accuracy:
    def __init__(self):
        self.same = []

    def add_batch(self, predictions, references):
        self.same += [int(p == r) for p, r in zip(predictions, references)]

    def compute(self, predictions=(), references=()):
        self.add_batch(predictions, references)
        return {"accuracy": sum(self.same) / len(self.same)}


def load(*names, **options):
    return Accuracy()
"""

RUN_CLM = "examples/pytorch/language-modeling/run_clm.py"
IMPORT = Change("import evaluate", "import evaluate", ("import evaluate", "import headrace"))
IMPORT_BOTH = Change(
    "import evaluate", "import evaluate", ("import evaluate", "import headrace, peft")
)
CLM_LOAD, CLM_LOAD_END = "        model = AutoModelForCausalLM.from_pretrained(", "        )"
CLM_ARGUMENTS = (
    *("--model_name_or_path", "model", "--train_file", "texts.txt", "--output_dir", "tuned"),
    *("--validation_file", "texts.txt", "--do_train", "--do_eval", "--max_steps", "3"),
    *("--block_size", "64", "--per_device_train_batch_size", "2", "--use_cpu"),
    *("--report_to", "none"),
)

CASES = (
    Case(
        repository="transformers",
        path=RUN_CLM,
        changes=(
            IMPORT_BOTH,
            Change(
                CLM_LOAD,
                CLM_LOAD_END,
                (
                    "        model = peft.get_peft_model(headrace.load("
                    "model_args.model_name_or_path), "
                    'peft.LoraConfig(task_type="CAUSAL_LM"))',
                ),
            ),
        ),
        arguments=CLM_ARGUMENTS,
        result="tuned/adapter_model.safetensors",
    ),
    Case(
        repository="transformers",
        path=RUN_CLM,
        changes=(
            Change(
                "import evaluate", "import evaluate", ("import evaluate", "import headrace.optim")
            ),
            Change(
                CLM_LOAD,
                CLM_LOAD_END,
                (
                    "        model = headrace.load("
                    'model_args.model_name_or_path, train="all", store="store")',
                ),
            ),
            Change(
                "        args=training_args,",
                "        args=training_args,",
                (
                    "        args=training_args,",
                    "        optimizers=(headrace.optim.adamw(model, "
                    "lr=training_args.learning_rate, weight_decay=training_args.weight_decay), "
                    "None),",
                ),
            ),
        ),
        arguments=CLM_ARGUMENTS,
        result="tuned/model.safetensors",
    ),
    Case(
        repository="peft",
        path="examples/olora_finetuning/olora_finetuning.py",
        changes=(
            Change("import torch", "import torch", ("import headrace", "import torch")),
            Change(
                "    model = AutoModelForCausalLM.from_pretrained(",
                "    model = AutoModelForCausalLM.from_pretrained(",
                ('    model = headrace.load(base_model, train="adapters")',),
            ),
        ),
        arguments=(
            *("--base_model", "model", "--data_path", "instructions", "--output_dir", "tuned"),
            *("--init_lora_weights", "gaussian", "--batch_size", "4", "--val_set_size", "4"),
            *("--eval_step", "4", "--save_step", "4", "--cutoff_len", "64"),
        ),
        result="tuned/adapter_model.safetensors",
    ),
    Case(
        repository="peft",
        path="examples/sequence_classification/peft_no_lora_accelerate.py",
        changes=(
            IMPORT,
            Change(
                "    model = AutoModelForSequenceClassification.from_pretrained(",
                "    model = AutoModelForSequenceClassification.from_pretrained(",
                (
                    "    model = headrace.load(args.model_name_or_path, "
                    "auto_class=AutoModelForSequenceClassification)",
                ),
            ),
        ),
        arguments=(
            *("--model_name_or_path", "classifier", "--output_dir", "tuned"),
            *("--peft_type", "prompt_tuning", "--num_train_epochs", "1", "--seed", "1"),
        ),
        result="tuned/adapter_model.safetensors",
    ),
)


def changed(source: str, changes: tuple[Change, ...]) -> str:
    """The script with its lines changed; a place that is not there exactly once is refused."""
    lines = source.splitlines()
    for change in changes:
        starts = [i for i, line in enumerate(lines) if line.startswith(change.first)]
        if len(starts) != 1:
            raise SystemExit(
                f"{change.first.strip()!r} begins {len(starts)} lines of the script; exactly 1 is "
                f"expected: give the commit that docs/examples.md names"
            )
        start = starts[0]
        end = next(i for i in range(start, len(lines)) if lines[i].startswith(change.last))
        lines[start : end + 1] = change.lines
    return "\n".join(lines) + "\n"


def make_material(folder: Path) -> None:
    """Tiny models, a tokenizer, rows of each kind of data and a metric, all made here."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    letters = {letter: i for i, letter in enumerate(["</s>", *sorted(ByteLevel.alphabet())])}
    inner = Tokenizer(BPE(letters, []))
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token="</s>", model_max_length=256
    )
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(letters),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    for kind, name in (
        (AutoModelForCausalLM, "model"),
        (AutoModelForSequenceClassification, "classifier"),
    ):
        kind.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    texts = [f"{n} litres and {n} litres are {2 * n} litres." for n in range(60)]
    (folder / "texts.txt").write_text("\n".join(texts * 4))
    (folder / "instructions").mkdir()
    rows = [{"instruction": f"Double {n}.", "input": "", "output": str(2 * n)} for n in range(40)]
    (folder / "instructions" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = [
        {"sentence1": a, "sentence2": b, "label": int(i % 2), "idx": i}
        for i, (a, b) in enumerate(pairwise(texts))
    ]
    glue = folder / "glue"
    glue.mkdir()
    for split, part in (("train", pairs[:40]), ("validation", pairs[40:])):
        (glue / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    (glue / "README.md").write_text(
        "---\nconfigs:\n- config_name: mrpc\n  data_files:\n"
        "  - split: train\n    path: train.jsonl\n"
        "  - split: validation\n    path: validation.jsonl\n---\n"
    )
    (folder / "evaluate.py").write_text(METRICS)


def run(case: Case, checkout: Path) -> bool:
    """Change and run one script; True if it ended well and left its result."""
    source = (checkout / case.path).read_text(encoding="utf-8")
    altered = changed(source, case.changes)
    name = f"{case.repository}/{case.path}"
    diff = difflib.unified_diff(
        source.splitlines(), altered.splitlines(), f"a/{name}", f"b/{name}", lineterm="", n=0
    )
    print("\n".join(diff), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_material(folder)
        script = folder / Path(case.path).name
        script.write_text(altered, encoding="utf-8")
        offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
        done = subprocess.run(
            [sys.executable, script.name, *case.arguments],
            cwd=folder,
            env={**os.environ, **offline, "HF_HOME": str(folder / "cache")},
            capture_output=True,
            text=True,
            check=False,
        )
        good = done.returncode == 0 and (folder / case.result).exists()
    print(f"{name}: {'runs' if good else done.stdout[-1500:] + done.stderr[-3000:]}", flush=True)
    return good


def main() -> int:
    """Run the cases whose repository was given."""
    parser = argparse.ArgumentParser(description=__doc__)
    for repository in ("transformers", "peft"):
        parser.add_argument(f"--{repository}", type=Path, metavar="DIR")
    checkouts: dict[str, Path | None] = vars(parser.parse_args())
    if not any(checkouts.values()):
        parser.error("give --transformers DIR, --peft DIR or both")
    results = [
        run(case, checkout)
        for case in CASES
        if (checkout := checkouts[case.repository]) is not None
    ]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
