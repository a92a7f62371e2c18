"""Fixtures of the whole suite: the device under test and tiny models on disk."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # a core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the streamed runs: cpu or cuda")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """The device on which streamed and resident runs happen."""
    return str(request.config.getoption("--device"))


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
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letter_tokenizer, eos_token="</s>", pad_token="</s>"
    )
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
