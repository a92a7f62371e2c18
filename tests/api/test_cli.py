"""The command line: what works, and bad input: exit code 2, one line, nothing half-written."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from headrace.cli import main
from headrace.errors import InputError
from headrace.offload.errors import LaneError, ResidencyError
from headrace.offload.lock import FolderLock

TEXT = "the quick brown fox jumps over the lazy dog and runs away from it. "


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": TEXT * n}) + "\n" for n in range(4, 12)))
    return path


class Tune:
    """Runs ``headrace tune`` with small defaults, each replaced or dropped (None) by keyword."""

    def __init__(self, folder: Path, model: Path, data: Path) -> None:
        self.out = folder / "out"
        self.given: dict[str, Any] = {
            "model": model,
            "data": data,
            "out": self.out,
            "device": "cpu",
            "device_budget": "4MB",
            "host_budget": "120MB",
            "steps": 3,
            "batch_size": 4,
            "micro_batch": 2,
            "seq_len": 64,
            "sample_tokens": 4,
        }

    def __call__(self, *flags: str, **changed: Any) -> int:
        arguments = ["tune", *flags]
        for name, value in {**self.given, **changed}.items():
            if value is not None:
                arguments += ["--" + name.replace("_", "-"), str(value)]
        return main(arguments)


@pytest.fixture
def tune(tmp_path: Path, model_folder: Path, data: Path) -> Tune:
    return Tune(tmp_path, model_folder, data)


def below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


# What works


def test_a_full_fine_tune_leaves_a_folder_that_opens(
    tune: Tune, model_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert tune("--json", method="full", lr=1e-2, steps=6, eval_every=3) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["loss_after"] < result["loss_before"] - 0.1
    assert "held-out loss after step 3" in captured.err
    assert len(result["step_losses"]) == 6 and result["steps"] == 6
    tuned = AutoModelForCausalLM.from_pretrained(tune.out)
    before = AutoModelForCausalLM.from_pretrained(model_folder)
    for (name, new), old in zip(tuned.named_parameters(), before.parameters(), strict=True):
        assert new.dtype == old.dtype and new.isfinite().all(), name
        assert not torch.equal(new, old), name
    assert len(AutoTokenizer.from_pretrained(tune.out)("abc")["input_ids"]) == 3
    assert (tune.out / "report.html").is_file()
    assert not [name for name in below(tmp_path) if "partial" in name]
    assert main(["report", str(tune.out)]) == 0
    assert "Peak bytes" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "out.store")]) == 0
    assert main(["verify", "--json", str(tune.out)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ok"] is True


def test_lora_leaves_an_adapter_folder_and_writes_no_store(
    tune: Tune, model_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in model_folder.iterdir()}
    assert tune(lr=1e-2, lora_rank=4, lora_alpha=8) == 0
    output = capsys.readouterr().out
    assert "held-out loss" in output and "sample after" in output
    assert (tune.out / "adapter_model.safetensors").is_file()
    tuned = AutoModelForCausalLM.from_pretrained(tune.out)
    assert any("lora_B" in name and p.any() for name, p in tuned.named_parameters())
    assert {path: path.read_bytes() for path in model_folder.iterdir()} == before
    assert not [name for name in below(tmp_path) if "store" in name]


def test_export_merges_adapters_as_peft_does(
    tune: Tune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(lr=1e-2, lora_rank=4, lora_alpha=8) == 0
    merged = tmp_path / "merged"
    budgets = ["--device-budget", "4MB", "--host-budget", "60MB"]
    assert main(["export", str(tune.out), "--out", str(merged), *budgets]) == 0
    ours = AutoModelForCausalLM.from_pretrained(merged).state_dict()
    base = AutoModelForCausalLM.from_pretrained(tune.given["model"])
    theirs = PeftModel.from_pretrained(base, tune.out).merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    assert len(AutoTokenizer.from_pretrained(merged)("abc")["input_ids"]) == 3
    assert main(["export", str(tune.out), "--out", str(merged)]) == 2


def test_chats_with_prompt_and_evaluation_data(
    tune: Tune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = tmp_path / "chats.jsonl"
    said = [("user", "say it"), ("assistant", TEXT)]
    messages = [{"role": role, "content": content} for role, content in said]
    chats.write_text((json.dumps({"messages": messages}) + "\n") * 4)
    assert tune("--json", data=chats, eval_data=chats, seq_len=128, prompt="hello") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["loss_before"] > 0
    assert "sample before: 'hello'" in captured.err


def test_doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--store", str(tmp_path / "not" / "yet")]) == 0
    names = [fact["name"] for fact in json.loads(capsys.readouterr().out)]
    assert {"python", "torch", "host memory", "direct I/O", "store folder"} <= {*names}
    assert main(["doctor", "--store", str(tmp_path)]) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["doctor", "tune", "verify", "export", "report"])
def test_every_command_has_help_with_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"example:\n  headrace {command}" in capsys.readouterr().out


# Bad input


class Refusal:
    """Checks a refusal: exit code 2, one line on the standard error, nothing new on the disk."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._folder = folder
        self._capsys = capsys
        self._before = below(folder)

    def check(self, code: int, reason: str) -> None:
        captured = self._capsys.readouterr()
        assert code == 2, captured
        assert captured.out == ""
        told = [line for line in captured.err.splitlines() if line]
        assert len(told) == 1 and told[0].startswith("headrace"), captured.err
        assert reason in told[0]
        assert below(self._folder) == self._before


@pytest.fixture
def refusal(tune: Tune, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refusal:
    return Refusal(tmp_path, capsys)  # after ``tune``: its data file is no news


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"model": "/no/such/model"}, "--model /no/such/model: no such folder"),
        ({"data": "/no/such.jsonl"}, "/no/such.jsonl: cannot be read"),
        ({"data": None}, "needs --data"),
        ({"out": "/dev/null"}, "--out /dev/null is not a folder"),
        ({"device_budget": "lots"}, "--device-budget is 'lots'; give bytes such as 12GB"),
        ({"host_budget": "0"}, "--host-budget is '0'; give more than 0 bytes"),
        ({"steps": "0"}, "--steps is 0; give 1 or more"),
        ({"epochs": "2"}, "--steps and --epochs were both given"),
        ({"steps": None, "epochs": "-1"}, "--epochs is -1.0; give more than 0"),
        ({"lr": "nan"}, "--lr is nan"),
        ({"lr": "inf"}, "--lr is inf"),
        ({"device": "toaster"}, "--device is 'toaster'; give cpu, cuda, or cuda:1"),
        ({"device": "cuda:99"}, "--device is cuda:99, but torch finds"),
        ({"batch_size": "5000"}, "fewer than the batch size 5000"),
        ({"seq_len": "1"}, "--seq-len is 1"),
        ({"held_out": "1"}, "--held-out is 1.0"),
        ({"update": "backward", "max_grad_norm": "1"}, "give --update forward"),
        ({"device_budget": "1kB"}, "device_budget"),
        ({"host_budget": "1kB"}, "host_budget"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_bad_options(
    tune: Tune, refusal: Refusal, changed: dict[str, Any], reason: str, method: str
) -> None:
    refusal.check(tune(method=method, **changed), reason)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["tune", "--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["tune", "--method", "magic"], "invalid choice: 'magic'"),
        (["tune", "--what"], "unrecognized arguments: --what"),
        (["verify"], "required: folders"),
    ],
)
def test_what_the_parser_refuses(arguments: list[str], reason: str, refusal: Refusal) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert isinstance(ended.value.code, int)
    refusal.check(ended.value.code, reason)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "data.jsonl: holds no line of data"),
        ('{"text": "a"}\n{"text": \n', "data.jsonl:2: is not JSON"),
        ('{"text": "a"}\n{"text": 3}\n', "data.jsonl:2: 'text' is a number"),
        ('{"text": "a"}\n', "has one document, so none can be held out"),
    ],
)
def test_bad_data(tune: Tune, data: Path, refusal: Refusal, content: str, reason: str) -> None:
    data.write_text(content)
    refusal.check(tune(), reason)


def test_a_tokenizer_without_a_template(
    tune: Tune,
    data: Path,
    model_folder: Path,
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model_folder, bare)
    (bare / "chat_template.jinja").unlink()
    make_tokenizer(None).save_pretrained(bare)
    data.write_text('{"messages": [{"role": "user", "content": "a"}]}\n' * 4)
    Refusal(tmp_path, capsys).check(tune(model=bare), "data.jsonl:1: has 'messages', but")


@pytest.mark.parametrize("harm", ["missing", "truncated", "no index", "no config", "no weights"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_damaged_checkpoint(
    tune: Tune,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    harm: str,
    method: str,
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    shards = sorted(broken.glob("*.safetensors"))
    culprit = shards[-1]
    if harm == "missing":
        culprit.unlink()
    elif harm == "truncated":
        culprit.write_bytes(culprit.read_bytes()[:-100])
    elif harm == "no index":
        culprit = broken / "model.safetensors.index.json"
        culprit.unlink()
    elif harm == "no config":
        culprit = broken / "config.json"
        culprit.unlink()
    else:
        culprit = broken
        for path in [*shards, broken / "model.safetensors.index.json"]:
            path.unlink()
    Refusal(tmp_path, capsys).check(
        tune(model=broken, method=method), str(broken if "no " in harm else culprit)
    )


def test_a_result_folder_in_use(
    tune: Tune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune.out.mkdir()
    (tune.out / "mine").write_text("keep")
    Refusal(tmp_path, capsys).check(tune(), "holds files already")


def test_a_store_in_use_by_another_run(
    tune: Tune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    lock = FolderLock(store)
    try:
        Refusal(tmp_path, capsys).check(
            tune(method="full", store=store), f"the store {store} is in use"
        )
    finally:
        lock.release()


def test_a_store_folder_with_something_else_in_it(
    tune: Tune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "thesis.tex").write_text("years of work")
    assert tune(method="full", store=store) == 2
    assert str(store) in capsys.readouterr().err
    assert not tune.out.exists()
    assert (store / "thesis.tex").read_text() == "years of work"


def test_a_full_disk(
    tune: Tune,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    code = tune(method="full")
    captured = capsys.readouterr()
    assert code == 2 and len(captured.err.strip().splitlines()) == 1
    assert not tune.out.exists()


@pytest.mark.parametrize("command", ["report", "verify"])
def test_folders_that_are_not_there(command: str, tmp_path: Path, refusal: Refusal) -> None:
    refusal.check(main([command, str(tmp_path / "none")]), str(tmp_path / "none"))


def test_damage_in_a_store_is_found(tune: Tune, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune(method="full") == 0
    store = Path(f"{tune.out}.store")
    extents = store / "extents.bin"
    raw = bytearray(extents.read_bytes())
    for place in range(5000, len(raw), 4096):
        raw[place] ^= 1
    extents.write_bytes(bytes(raw))
    capsys.readouterr()
    assert main(["verify", str(store)]) == 2
    assert "parts are damaged" in capsys.readouterr().out


# Whose fault it is


def raising(error: BaseException) -> Callable[..., None]:
    def run(*_: object, **__: object) -> None:
        raise error

    return run


def with_cause(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        InputError("two\nlines"),
        OSError(errno.ENOSPC, "No space left on device"),
        with_cause(LaneError("write failed"), OSError(errno.ENOSPC, "No space left on device")),
    ],
)
def test_faults_of_the_user_make_one_line(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("headrace.doctor.examine", raising(error))
    assert main(["doctor"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "error",
    [
        ResidencyError("a bug"),
        LaneError("a device fell off"),
        FileNotFoundError(errno.ENOENT, "a bug"),
        ValueError("a bug"),
    ],
)
def test_our_faults_keep_their_traceback(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.doctor.examine", raising(error))
    with pytest.raises(type(error)):
        main(["doctor"])


def test_an_interrupt_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("headrace.doctor.examine", raising(KeyboardInterrupt()))
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "headrace: interrupted\n"


def test_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "headrace", "report", "none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("headrace: none/headrace.json: cannot be read")
    assert done.stderr.count("\n") == 1


# A disk that is full at the end


DISK_IS_FULL = SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("method", ["full", "zo"])
def test_a_disk_without_room_for_the_result_is_refused_at_the_start(
    tune: Tune,
    method: str,
    refusal: Refusal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    refusal.check(tune(method=method), f"{tune.out} needs ")
    assert not tune.out.exists() and not Path(f"{tune.out}.store").exists()


@pytest.mark.parametrize("method", ["full", "zo"])
def test_a_disk_that_is_full_at_the_end_costs_no_step(
    tune: Tune,
    method: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", raising(DISK_IS_FULL))
        code = tune(method=method)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    store = Path(f"{tune.out}.store")
    assert code == 2 and "No space left on device" in said, said
    assert f"headrace tune --resume {store}" in said and "closing failed" not in said
    assert not tune.out.exists() and not [name for name in below(tmp_path) if "partial" in name]
    assert main(["tune", "--resume", str(store)]) == 0
    tuned = AutoModelForCausalLM.from_pretrained(tune.out)
    assert all(bool(p.isfinite().all()) for p in tuned.parameters())


def test_a_disk_too_full_for_adapters_makes_one_line(
    tune: Tune, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft.peft_model.safe_save_file", raising(DISK_IS_FULL))
    assert tune(method="lora") == 2
    assert "No space left on device" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not tune.out.exists() and not [name for name in below(tmp_path) if "partial" in name]
