"""Two gloo ranks against one process with the doubled batch: losses, weights, states, crashes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import headrace
from headrace.errors import InputError
from headrace.offload.errors import StoreError

WORKER = Path(__file__).parent / "ranks_worker.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    target = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(target)
    return target


def run(
    mode: str,
    count: int,
    folder: Path,
    store: Path,
    steps: int,
    *,
    die: tuple[int, int] | None = None,
) -> list[dict[str, Any]]:
    """Run all ranks to their end; ``die``: (rank, step) of one that is lost."""
    store.parent.mkdir(exist_ok=True)
    rendezvous = store.parent / f"{store.name}-{len(list(store.parent.iterdir()))}"
    children = []
    for rank in range(count):
        command = [sys.executable, str(WORKER), mode, str(rank), str(count), str(rendezvous)]
        command += [str(folder), str(store), str(steps)]
        if die is not None and die[0] == rank:
            command.append(str(die[1]))
        children.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    if die is not None:
        assert children[die[0]].wait(timeout=400) == -9
        for child in children:  # whoever is left waits for the lost rank, as it should
            child.kill()
            child.communicate()
        return []
    found = []
    for child in children:
        output, errors = child.communicate(timeout=400)
        assert child.returncode == 0, errors
        found.append(json.loads(output.splitlines()[-1]))
    return found


@pytest.mark.parametrize(
    "mode",
    [
        "full",
        pytest.param("backward", marks=pytest.mark.slow),
        pytest.param("lora", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_give_the_losses_of_one_with_the_doubled_batch(
    mode: str, folder: Path, tmp_path: Path
) -> None:
    [one] = run(mode, 1, folder, tmp_path / "one", 6)
    two = run(mode, 2, folder, tmp_path / "two", 6)
    assert two[0]["losses"] == two[1]["losses"]
    assert two[0]["weights"] == two[1]["weights"]
    assert torch.allclose(
        torch.tensor(two[0]["losses"]), torch.tensor(one["losses"]), rtol=1e-6, atol=0
    )
    assert two[0]["losses"][4] < two[0]["losses"][0]  # the same batch
    if mode != "lora":
        for rank in two:
            assert abs(rank["state_bytes"] / one["state_bytes"] - 0.5) < 0.05


@pytest.mark.parametrize("mode", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_lost_rank_resumes_where_all_ranks_have_been(
    mode: str, folder: Path, tmp_path: Path
) -> None:
    whole = run(mode, 2, folder, tmp_path / "whole", 6)
    # Rank 1 is lost before it commits step 4; rank 0 has that commit, and must give it up.
    run(mode, 2, folder, tmp_path / "cut", 6, die=(1, 4))
    resumed = run(mode, 2, folder, tmp_path / "cut", 6)
    assert [rank["first"] for rank in resumed] == [3, 3]
    for rank in resumed:
        assert rank["losses"] == whole[0]["losses"][3:]
        assert rank["weights"] == whole[0]["weights"]


def test_another_number_of_ranks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "two" / "rank-0-of-2").mkdir(parents=True)
    (tmp_path / "two" / "rank-1-of-2").mkdir()
    with pytest.raises(StoreError, match=r"written by 2 ranks and this run has 1"):
        headrace.resume(tmp_path / "two")


def test_ranks_that_cannot_talk_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"torch\.distributed is not initialised"):
        headrace.load(folder, train="all", store=tmp_path / "store", device="cpu")
    assert not (tmp_path / "store").exists()


def trainer_history(count: int, mode: str, folder: Path, work: Path, *more: str) -> Any:
    command = [sys.executable]
    if count > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    script = Path(__file__).parent / "ranks_trainer.py"
    done = subprocess.run(
        [*command, str(script), mode, str(folder), str(work), *more],
        capture_output=True,
        text=True,
        timeout=400,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("history")]
    return json.loads(lines[0].removeprefix("history")) if lines else done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_stock_trainer_under_torchrun_has_the_history_of_one_process(
    mode: str, folder: Path, tmp_path: Path
) -> None:
    one = trainer_history(1, mode, folder, tmp_path / "one")
    two = trainer_history(2, mode, folder, tmp_path / "two")
    assert len(one) == 4
    assert torch.allclose(torch.tensor(two), torch.tensor(one), rtol=1e-6, atol=0)


@pytest.mark.slow
def test_autocast_that_would_be_lost_is_refused(folder: Path, tmp_path: Path) -> None:
    error = trainer_history(2, "full", folder, tmp_path, "bf16")
    assert "bf16=True" in error and "dtype" in error
