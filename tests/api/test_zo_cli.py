"""``headrace zo replay`` and ``headrace tune --method zo``: the same bits, whatever interrupts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from headrace.cli import main
from headrace.zo import ZOSettings, ZOStep, causal_lm_losses, read_log, recommended

TEXT = "the quick brown fox jumps over the lazy dog and runs away from it. "


def resident(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in resident(folder).named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def runs(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Logs of two short resident runs, and the models that they ended with."""
    folder = tmp_path_factory.mktemp("runs")
    ids = torch.randint(0, 258, (2, 12), generator=torch.Generator().manual_seed(1))
    found = {}
    low_rank = recommended(lr=1e-3, copies=5, examples=1)
    for name, settings in {"mezo": ZOSettings(lr=1e-3), "low-rank": low_rank}.items():
        model = resident(model_folder)
        zo = ZOStep(model, settings, log=folder / f"{name}.zolog")
        for step in range(5):
            zo.step(
                lambda m: causal_lm_losses(m, {"input_ids": ids, "labels": ids}, 1)[0], batch=step
            )
        with zo.merged():
            model.save_pretrained(folder / name)
        zo.close()
        found[name] = folder / name
    return found


@pytest.mark.parametrize("name", ["mezo", "low-rank"])
def test_replay_rebuilds_the_model_bit_for_bit(
    name: str,
    runs: dict[str, Path],
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    log, out = runs[name].with_suffix(".zolog"), tmp_path / "rebuilt"
    arguments = ["zo", "replay", str(model_folder), str(log), str(out), "--threads", "3"]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 5
    assert same(weights_of(out), weights_of(runs[name]))
    assert not same(weights_of(out), weights_of(model_folder))
    assert (out / "replay.zolog").read_bytes() == log.read_bytes()
    assert (out / "tokenizer.json").is_file()


def damaged(log: Path, folder: Path) -> Path:
    data = bytearray(log.read_bytes())
    data[-300] ^= 1
    (folder / "bad.zolog").write_bytes(data)
    return folder / "bad.zolog"


BAD: dict[str, tuple[Callable[[Path, Path, Path], list[Any]], str]] = {
    "no log": (lambda base, log, tmp: [base, tmp / "none.zolog", tmp / "out"], "no such file"),
    "no base": (lambda base, log, tmp: [tmp / "none", log, tmp / "out"], "no such folder"),
    "damaged log": (
        lambda base, log, tmp: [base, damaged(log, tmp), tmp / "out"],
        "does not match its checksum",
    ),
    "not a log": (lambda base, log, tmp: [base, base / "config.json", tmp / "out"], "bad magic"),
    "no tokenizer": (
        lambda base, log, tmp: [log.parent / "mezo", log, tmp / "out"],
        "tokenizer",
    ),
    "out holds files": (lambda base, log, tmp: [base, log, base], "holds files already"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_line_and_leaves_nothing(
    case: str,
    runs: dict[str, Path],
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make, message = BAD[case]
    given = make(model_folder, runs["mezo"].with_suffix(".zolog"), tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    assert main(["zo", "replay", *map(str, given)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error, error
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_base_that_has_changed_is_refused(
    runs: dict[str, Path], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    resident(runs["mezo"]).save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((model_folder / name).read_bytes())
    log = runs["mezo"].with_suffix(".zolog")
    assert main(["zo", "replay", str(other), str(log), str(tmp_path / "out")]) == 2
    assert "do not belong together" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# tune --method zo


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": TEXT * n}) + "\n" for n in range(4, 12)))
    return path


def tune_arguments(folder: Path, model: Path, data: Path, **changed: Any) -> list[str]:
    given = {
        "model": model,
        "data": data,
        "out": folder / "out",
        "method": "zo",
        "device": "cpu",
        "device_budget": "40MB",
        "host_budget": "120MB",
        "steps": 6,
        "batch_size": 2,
        "seq_len": 32,
        "sample_tokens": 4,
        "lr": 1e-3,
        **changed,
    }
    arguments = ["tune"]
    for name, value in given.items():
        arguments += ["--" + name.replace("_", "-"), str(value)]
    return arguments


@pytest.mark.parametrize("zo_method", ["recommended", "mezo"])
def test_tune_leaves_a_model_that_its_log_rebuilds(
    zo_method: str,
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = tune_arguments(tmp_path, model_folder, data, zo_method=zo_method)
    assert main([*arguments, "--eval-every", "3", "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert len(result["step_losses"]) == 6 and result["loss_after"] != result["loss_before"]
    assert "held-out loss after step 3" in captured.err
    assert "busy: none" not in captured.err
    _, records = read_log(tmp_path / "out.store" / "replay.zolog")
    assert [record.step for record in records] == list(range(6))
    assert len(records[0].losses) == (2 if zo_method == "mezo" else 4 * 2)
    rebuilt = tmp_path / "rebuilt"
    log = tmp_path / "out.store" / "replay.zolog"
    assert main(["zo", "replay", str(model_folder), str(log), str(rebuilt)]) == 0
    assert same(weights_of(rebuilt), weights_of(tmp_path / "out"))
    assert not same(weights_of(rebuilt), weights_of(model_folder))
    assert (tmp_path / "out" / "report.html").is_file()


def test_directions_of_gpt2_are_drawn_and_that_is_said(
    model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "gpt2"
    shutil.copytree(model_folder, folder)
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    config = GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(folder)
    arguments = tune_arguments(tmp_path, folder, data, zo_method="recommended")
    assert main(arguments) == 0
    assert "directions are drawn, not measured" in capsys.readouterr().err


def test_losses_are_those_of_the_resident_model(
    model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import headrace
    from headrace.zo_tuning import member_losses

    ids = torch.randint(0, 258, (3, 20), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[1, 10:] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    streamed = headrace.load(
        model_folder, train="none", device="cpu", device_budget="40MB", host_budget="80MB"
    )
    try:
        with torch.no_grad():
            ours = member_losses(streamed, batch, 2)
            theirs = causal_lm_losses(resident(model_folder), batch, 2)
            rows = member_losses(streamed, batch, 2, parts=3)
            their_rows = causal_lm_losses(resident(model_folder), batch, 2, parts=3)
    finally:
        streamed.close()
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert rows == pytest.approx(their_rows, rel=1e-3)
    assert len(rows) == 6 and rows[0] != rows[1]


def test_killed_and_resumed_is_the_calm_run(
    model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calm = tmp_path / "calm"
    calm.mkdir()
    steps = 12
    assert main(tune_arguments(calm, model_folder, data, steps=steps)) == 0
    command = [sys.executable, "-m", "headrace"]
    command += tune_arguments(tmp_path, model_folder, data, steps=steps)
    log = tmp_path / "out.store" / "replay.zolog"
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    finished = (calm / "out.store" / "replay.zolog").stat().st_size
    header, _ = read_log(calm / "out.store" / "replay.zolog")
    half = finished - header.record_bytes * steps // 2
    while child.poll() is None and (not log.exists() or log.stat().st_size < half):
        time.sleep(1e-3)  # polls the child's own output; the child does not wait for us
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert log.stat().st_size < finished, "the child was to be killed in the middle"
    capsys.readouterr()
    assert main(["tune", "--resume", str(tmp_path / "out.store")]) == 0
    assert "going on after step" in capsys.readouterr().err
    assert log.read_bytes() == (calm / "out.store" / "replay.zolog").read_bytes()
    assert same(weights_of(tmp_path / "out"), weights_of(calm / "out"))


def test_what_cannot_be_resumed_is_refused(
    model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tune_arguments(tmp_path, model_folder, data, steps=2)) == 0
    store = tmp_path / "out.store"
    capsys.readouterr()
    assert main(["tune", "--resume", str(store), "--lr", "1"]) == 2
    assert "--lr cannot change" in capsys.readouterr().err
    again = tune_arguments(tmp_path, model_folder, data, out=tmp_path / "second", store=store)
    assert main(again) == 2
    assert "holds files already" in capsys.readouterr().err
    data.write_text(json.dumps({"text": TEXT * 9}) + "\n" + json.dumps({"text": TEXT}) + "\n")
    assert main(["tune", "--resume", str(store), "--out", str(tmp_path / "third")]) == 2
    assert "other training rows" in capsys.readouterr().err
    (store / "run.json").write_text("{}")
    assert main(["tune", "--resume", str(store), "--out", str(tmp_path / "third")]) == 2
    assert "not the record" in capsys.readouterr().err
    decayed = tune_arguments(tmp_path, model_folder, data, out=tmp_path / "x", weight_decay=0.1)
    assert main(decayed) == 2
    assert "--weight-decay" in capsys.readouterr().err
    assert not (tmp_path / "third").exists() and not (tmp_path / "x").exists()


# encoded bases


@pytest.fixture(scope="module")
def encoded_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoded") / "int4"
    assert main(["quantize", str(model_folder), str(folder), "--format", "int4", "--json"]) == 0
    return folder


@pytest.mark.parametrize("zo_method", ["recommended", "mezo"])
def test_an_encoded_base_is_refused_before_anything_is_trained(
    zo_method: str,
    encoded_folder: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    assert main(tune_arguments(tmp_path, encoded_folder, data, zo_method=zo_method)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "28 weights are encoded, the first 'model.layers.0." in error
    assert "give the checkpoint that they were made of" in error and "trains_scales" in error
    assert {path.name for path in tmp_path.iterdir()} == before


def test_replay_on_an_encoded_base_is_refused(
    runs: dict[str, Path],
    encoded_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    log, out = runs["low-rank"].with_suffix(".zolog"), tmp_path / "out"
    assert main(["zo", "replay", str(encoded_folder), str(log), str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "28 weights are encoded" in error and "ZOStep.resume" in error
    assert list(tmp_path.iterdir()) == []
