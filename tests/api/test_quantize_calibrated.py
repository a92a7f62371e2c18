"""Calibrated encoding through the stream: GPTQ, HQQ and EoRA, layer by layer, resumable."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from streaming_cases import batches, make_folder, resident_model
from transformers import AutoConfig, AutoModelForCausalLM

import headrace
from headrace.calibrating import CalibrationBatch, Calibrator
from headrace.cli import main
from headrace.foreign_quantizing import quantize_for_transformers
from headrace.quant.fold import TensorReport
from headrace.quant.folder import EncodedFolder
from headrace.quant.gptq import InputMoments, gptq
from headrace.quant.model import encoded_weights
from headrace.quant.nf4 import Nf4Codec


def calibration(count: int = 4) -> CalibrationBatch:
    return CalibrationBatch(tuple(batches(count, rows=4, tokens=32)))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        value: torch.Tensor = model(batches(1)[0]).logits
    return value


def distance(model: Any, exact: torch.Tensor) -> float:
    return float((logits(model).float() - exact.float()).norm() / exact.float().norm())


def same_files(left: Path, right: Path) -> None:
    names = sorted(p.name for p in left.iterdir() if p.is_file())
    assert names == sorted(p.name for p in right.iterdir() if p.is_file())
    for name in names:
        assert (left / name).read_bytes() == (right / name).read_bytes(), name


def counting(name: str, moments: dict[str, InputMoments]) -> Callable[..., None]:
    def hook(module: Any, args: tuple[Any, ...]) -> None:
        moments.setdefault(name, InputMoments(module.in_features)).add(args[0])

    return hook


def test_the_codes_are_those_of_a_resident_calibration(tmp_path: Path) -> None:
    """Layer 0's inputs come from exact weights, layer 1's from an encoded layer 0."""
    folder = make_folder("llama", tmp_path, torch.float32)
    data = calibration()
    encoded = headrace.quantize(folder, tmp_path / "out", format="nf4", calibration=data)
    model = resident_model(folder).eval()
    codec = Nf4Codec()
    for number in (0, 1):
        layer = model.get_submodule(f"model.layers.{number}")
        moments: dict[str, InputMoments] = {}
        linears = {n: m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}

        hooks = [m.register_forward_pre_hook(counting(n, moments)) for n, m in linears.items()]
        with torch.no_grad():
            for batch in data.batches:
                model(batch)
        for handle in hooks:
            handle.remove()
        for name, linear in linears.items():
            weight = linear.weight.detach()
            result = gptq(weight, moments[name].matrix(), codec)
            full = f"model.layers.{number}.{name}.weight"
            parts = encoded.read_parts(full)
            assert all(torch.equal(parts[p], result.parts[p]) for p in parts), full
            record = encoded.records[full]
            assert record.error is not None
            assert record.error["output"] == pytest.approx(result.error, rel=1e-4)
            linear.weight.data = codec.decode(result.parts, tuple(weight.shape))


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3_text"])
@pytest.mark.parametrize("word", ["gptq", "hqq", "nf4"])
def test_calibration_lowers_every_output_error_and_eora_lowers_it_again(
    tmp_path: Path, family: str, word: str
) -> None:
    folder = make_folder(family, tmp_path, torch.bfloat16)
    exact = logits(resident_model(folder, torch.bfloat16).eval())
    reports: list[TensorReport] = []
    out = tmp_path / "out"
    headrace.quantize(
        folder, out, format=word, calibration=calibration(), eora_rank=4, on_tensor=reports.append
    )
    encoded = [report for report in reports if report.codec != "kept"]
    assert encoded
    nearest = sum(report.output_errors["output_nearest"] for report in encoded)
    assert sum(report.output_errors["output"] for report in encoded) < 0.97 * nearest
    stacks = [report for report in encoded if "experts" in report.name]
    assert bool(stacks) == (family == "mixtral")
    assert all("output_corrected" not in report.output_errors for report in stacks)
    for report in encoded:
        errors = report.output_errors
        if report not in stacks:
            assert errors["output_corrected"] < 0.95 * errors["output"], report.name
    assert not (out / "calibration").exists()

    base = headrace.load(out, train="adapters", device="cpu")
    before = distance(base, exact)
    model = PeftModel.from_pretrained(base, str(out / "eora"), is_trainable=True)
    assert distance(model, exact) < before
    model(batches(1)[0], labels=batches(1)[0]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    base.close()


def test_an_interrupted_calibration_goes_on_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder("llama", tmp_path, torch.bfloat16)
    settings: dict[str, Any] = {"format": "gptq", "calibration": calibration(), "eora_rank": 2}
    headrace.quantize(folder, tmp_path / "whole", **settings)
    original, layers = Calibrator._encode_layer, []

    def failing(self: Calibrator, number: int) -> None:
        layers.append(number)
        if number == 2 and len(layers) == 3:
            raise OSError("the power went")
        original(self, number)

    monkeypatch.setattr(Calibrator, "_encode_layer", failing)
    with pytest.raises(OSError, match="power"):
        headrace.quantize(folder, tmp_path / "cut", **settings)
    # Other data, or another rank, is another encoding.
    with pytest.raises(ValueError, match="begun from the source"):
        headrace.quantize(folder, tmp_path / "cut", **{**settings, "calibration": calibration(3)})
    with pytest.raises(ValueError, match="begun from the source"):
        headrace.quantize(folder, tmp_path / "cut", **{**settings, "eora_rank": 3})
    shutil.copytree(tmp_path / "cut", tmp_path / "robbed")
    headrace.quantize(folder, tmp_path / "cut", **settings)
    assert layers == [0, 1, 2, 2, 3], "finished layers are not calibrated again"
    same_files(tmp_path / "cut", tmp_path / "whole")
    weights = [p / "eora/adapter_model.safetensors" for p in (tmp_path / "cut", tmp_path / "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    for path in (tmp_path / "robbed/calibration").glob("inputs-*"):
        path.unlink()
    with pytest.raises(headrace.InputError, match=r"inputs-00002.*is missing"):
        headrace.quantize(folder, tmp_path / "robbed", **settings)


def test_hqq_needs_no_data(tmp_path: Path) -> None:
    folder = make_folder("mixtral", tmp_path, torch.bfloat16)
    exact = logits(resident_model(folder, torch.bfloat16).eval())
    headrace.quantize(folder, tmp_path / "hqq", format="hqq")
    records = EncodedFolder(tmp_path / "hqq").records.values()
    assert {r.codec.name for r in records if r.codec is not None} == {"int4_group"}
    model = headrace.load(tmp_path / "hqq", train="none", device="cpu")
    assert 0 < distance(model, exact) < 0.15
    model.close()


def test_what_cannot_be_calibrated_is_refused_by_name(tmp_path: Path) -> None:
    llama = make_folder("llama", tmp_path, torch.bfloat16)
    with pytest.raises(headrace.InputError, match="calibration data"):
        headrace.quantize(llama, tmp_path / "a", format="gptq")
    with pytest.raises(headrace.InputError, match="calibration data"):
        headrace.quantize(llama, tmp_path / "a", format="nf4", eora_rank=4)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "vocab_size": 97}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}
    config = AutoConfig.for_model("gpt_oss", **sizes, **counts, **experts)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "oss")
    with pytest.raises(headrace.InputError, match=r"layers\.0\.mlp\.experts.*not watched"):
        headrace.quantize(
            tmp_path / "oss", tmp_path / "b", format="nf4", calibration=calibration(1)
        )
    assert not (tmp_path / "b/encoded.index.json").exists()


@pytest.mark.parametrize("word", ["gptq", "nf4"])
def test_weights_with_their_inputs_first_are_calibrated(tmp_path: Path, word: str) -> None:
    """GPT-2 keeps (in, out); both layouts, and the adapter of its corrections."""
    folder = make_folder("gpt2", tmp_path, torch.bfloat16)
    exact = logits(resident_model(folder, torch.bfloat16).eval())
    reports: list[TensorReport] = []
    headrace.quantize(
        folder,
        tmp_path / "out",
        format=word,
        calibration=calibration(),
        eora_rank=4,
        on_tensor=reports.append,
    )
    errors = [report.output_errors for report in reports if report.codec != "kept"]
    assert len(errors) == 16
    assert all(e["output_corrected"] < e["output"] < e["output_nearest"] for e in errors)
    base = headrace.load(tmp_path / "out", train="adapters", device="cpu")
    before = distance(base, exact)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fan_in_fan_out")
        model = PeftModel.from_pretrained(base, str(tmp_path / "out/eora"), is_trainable=True)
    assert distance(model, exact) < 0.95 * before
    base.close()
    reports.clear()
    quantize_for_transformers(
        folder,
        tmp_path / "foreign",
        format=word,
        calibration=calibration(),
        on_tensor=reports.append,
    )
    errors = [report.output_errors for report in reports if report.codec != "kept"]
    assert all(e["output"] < e["output_nearest"] for e in errors)
    model = headrace.load(tmp_path / "foreign", train="none", device="cpu")
    assert distance(model, exact) < 1.1 * before
    model.close()


def test_what_eora_leaves_uncorrected_is_said(tmp_path: Path) -> None:
    folder = make_folder("mixtral", tmp_path, torch.bfloat16)
    with pytest.warns(UserWarning, match=r"8 stacks of experts such as .*experts.*% of the enc"):
        headrace.quantize(
            folder, tmp_path / "out", format="nf4", calibration=calibration(1), eora_rank=2
        )
    settings = json.loads((tmp_path / "out/eora/adapter_config.json").read_text())
    assert not any("experts" in module for module in settings["target_modules"])


def test_gptq_in_its_own_layout_is_read_back_to_the_same_weights(tmp_path: Path) -> None:
    folder = make_folder("llama", tmp_path, torch.bfloat16)
    reports: list[TensorReport] = []
    quantize_for_transformers(
        folder,
        tmp_path / "out",
        format="gptq",
        calibration=calibration(),
        on_tensor=reports.append,
    )
    encoded = [report for report in reports if report.codec != "kept"]
    assert len(encoded) == 28
    assert all(r.output_errors["output"] < r.output_errors["output_nearest"] for r in encoded)
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["bits"], settings["group_size"]) == ("gptq", 4, 32)
    model = headrace.load(tmp_path / "out", train="none", device="cpu")
    assert len(encoded_weights(model)) == 28
    assert distance(model, logits(resident_model(folder, torch.bfloat16).eval())) < 0.2
    model.close()


def test_transformers_layout_resumes_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder("llama", tmp_path, torch.bfloat16)
    quantize_for_transformers(folder, tmp_path / "whole", format="nf4")
    seen: list[TensorReport] = []

    def stop(report: TensorReport) -> None:
        seen.append(report)
        if ".layers.2." in report.name:
            raise OSError("the power went")

    with pytest.raises(OSError, match="power"):
        quantize_for_transformers(folder, tmp_path / "cut", format="nf4", on_tensor=stop)
    with pytest.raises(headrace.InputError, match="was begun from"):
        quantize_for_transformers(folder, tmp_path / "cut", format="fp4")
    quantize_for_transformers(folder, tmp_path / "cut", format="nf4")
    same_files(tmp_path / "cut", tmp_path / "whole")
    with pytest.raises(headrace.InputError, match="finished encoding"):
        quantize_for_transformers(folder, tmp_path / "cut", format="nf4")
    with pytest.raises(headrace.InputError, match="encoded already"):
        headrace.quantize(tmp_path / "whole", tmp_path / "again")


def test_the_command_calibrates_on_a_file(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "text.jsonl"
    lines = [
        {"text": f"line {n} of a text that is long enough to fill a row " * 3} for n in range(9)
    ]
    data.write_text("\n".join(json.dumps(line) for line in lines))
    out = str(tmp_path / "out")
    arguments = ["quantize", str(model_folder), out, "--format", "gptq", "--json"]
    arguments += ["--calibration", str(data), "--calibration-tokens", "48", "--eora-rank", "4"]
    assert main(arguments) == 0
    record = json.loads(capsys.readouterr().out)
    errors = [t["output_errors"] for t in record["tensors"] if t["output_errors"]]
    assert len(errors) == 28
    assert all(e["output_corrected"] < e["output_nearest"] for e in errors)
    assert (tmp_path / "out/eora/adapter_config.json").is_file()
    assert main(["quantize", str(model_folder), out + "2", "--format", "gptq"]) == 2
    assert "calibration data" in capsys.readouterr().err
    short = [*arguments[:2], out + "3", *arguments[3:]]
    short[short.index("48")] = "100000"
    assert main(short) == 2
    assert "does not fill a row" in capsys.readouterr().err
