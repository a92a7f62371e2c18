"""Damaged and foreign low-bit checkpoints: each is refused by name before anything runs."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_cases import LAYOUTS, fp8, linear, rewrite
from safetensors.torch import load_file, save_file
from streaming_cases import make_folder
from torch import Tensor

import headrace
from headrace.quant.native_layouts import NativeWeight, StoredTensors, native_weights
from headrace.quant.spec import TensorSpec

Q = "model.layers.2.self_attn.q_proj"
Tensors = dict[str, Tensor]
ORIGINALS = tempfile.TemporaryDirectory()


@functools.cache
def original(family: str) -> Path:
    """A tiny model that every test copies; removed with the process's temporary folder."""
    return make_folder(family, Path(ORIGINALS.name), torch.bfloat16)


def checkpoint(tmp_path: Path, layout: str) -> Path:
    folder = shutil.copytree(original("llama"), tmp_path / "model")
    described, encode = LAYOUTS[layout]
    rewrite(folder, described, lambda n, w: encode(w) if linear(n) else None)
    return folder


def harmed(folder: Path, harm: Callable[[Tensors, dict[str, Any]], None]) -> None:
    """Let ``harm`` change the tensors and the configuration of a folder."""
    file, config_file = folder / "model.safetensors", folder / "config.json"
    tensors, config = load_file(file), json.loads(config_file.read_text())
    harm(tensors, config)
    save_file({n: t.contiguous() for n, t in tensors.items()}, file, {"format": "pt"})
    config_file.write_text(json.dumps(config))


def drop(name: str) -> Callable[[Tensors, dict[str, Any]], None]:
    def harm(tensors: Tensors, config: dict[str, Any]) -> None:
        del tensors[name]

    return harm


def change(name: str, make: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def harm(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[name] = make(tensors[name])

    return harm


def describe(**values: Any) -> Callable[..., None]:
    def harm(tensors: Tensors, config: dict[str, Any]) -> None:
        config["quantization_config"] |= values

    return harm


def cut(tensor: Tensor) -> Tensor:
    return tensor[..., :-1].clone()


def turned(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous()


CASES: list[tuple[str, Callable[..., None], str]] = [
    ("fp8-blocks", drop(f"{Q}.weight_scale_inv"), f"{Q}.weight' is FP8 and must have one"),
    ("fp8-blocks", change(f"{Q}.weight_scale_inv", cut), f"{Q}.weight_scale_inv"),
    ("fp8-blocks", change(f"{Q}.weight_scale_inv", lambda t: t.double()), "is no scale"),
    ("fp8-blocks", change(f"{Q}.weight", cut), f"{Q}.weight"),
    ("fp8-blocks", change(f"{Q}.weight", lambda t: t.view(-1)), "is no matrix"),
    ("fp8-blocks", describe(quant_method="fp9"), "'fp9' are not understood"),
    ("fp8-blocks", describe(quant_method="gptq"), "no tensor of that layout"),
    ("fp8-rows", change(f"{Q}.weight_scale", lambda t: t[:-2].clone()), f"{Q}.weight_scale"),
    ("int8-rows", drop(f"{Q}.weight_scale"), f"{Q}.weight_scale' is missing"),
    ("int8-rows", change(f"{Q}.weight_scale", lambda t: t[:-2].clone()), f"{Q}.weight_scale"),
    ("llm-int8", change(f"{Q}.SCB", cut), f"{Q}.SCB"),
    ("llm-int8", change(f"{Q}.weight", lambda t: t.to(torch.int16)), "is not INT8"),
    ("nvfp4-modelopt", drop(f"{Q}.weight_scale_2"), f"{Q}.weight_scale_2' is missing"),
    ("nvfp4-modelopt", change(f"{Q}.weight_scale", cut), f"{Q}.weight_scale"),
    ("nvfp4-packed", change(f"{Q}.weight_packed", cut), f"{Q}.weight"),
    ("gptq", drop(f"{Q}.qzeros"), f"{Q}.qzeros' is missing"),
    ("gptq", change(f"{Q}.g_idx", lambda t: t + 1), f"{Q}.g_idx' names groups outside"),
    ("gptq", change(f"{Q}.g_idx", lambda t: t.long()), f"{Q}.g_idx' has dtype"),
    ("gptq", change(f"{Q}.scales", lambda t: t.float()), f"{Q}.scales"),
    ("gptq", change(f"{Q}.scales", lambda t: t[:0].clone()), f"{Q}.qweight"),
    ("gptq", change(f"{Q}.qweight", cut), f"{Q}.weight"),
    ("gptq", describe(bits=3), "GPTQ of 3 bits"),
    ("gptq", describe(checkpoint_format="gptq_v2"), "gptq_v2"),
]


@pytest.mark.parametrize(
    ("layout", "harm", "message"), CASES, ids=[f"{c[0]}-{n}" for n, c in enumerate(CASES)]
)
def test_a_harmed_native_checkpoint_is_refused_by_name(
    tmp_path: Path, layout: str, harm: Callable[..., None], message: str
) -> None:
    folder = checkpoint(tmp_path, layout)
    harmed(folder, harm)
    with pytest.raises(ValueError) as caught:
        headrace.load(folder, device="cpu", device_budget="4MB", host_budget="2MB")
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)


BNB: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
    ("quant_map", lambda t: t.flip(0), "codes are foreign"),
    ("absmax", lambda t: t[:-1].clone(), "absmax"),
    ("nested_absmax", lambda t: torch.zeros(5), "nested_absmax"),
    ("quant_state.bitsandbytes__nf4", lambda t: t[:-3].clone(), "is no quantisation state"),
    ("quant_state.bitsandbytes__nf4", lambda t: t * 0, "is no quantisation state"),
    (
        "quant_state.bitsandbytes__nf4",
        lambda t: torch.tensor(
            list(bytes(t.tolist()).replace(b'"shape": [32', b'"shape": [-2')), dtype=torch.uint8
        ),
        "says shape",
    ),
    (
        "quant_state.bitsandbytes__nf4",
        lambda t: torch.tensor(
            list(bytes(t.tolist()).replace(b'"blocksize": 64', b'"blocksize": 0')),
            dtype=torch.uint8,
        ),
        "blocksize",
    ),
]


@pytest.mark.parametrize(("suffix", "make", "message"), BNB, ids=range(len(BNB)))
def test_a_harmed_bitsandbytes_checkpoint_is_refused_by_name(
    tmp_path: Path, suffix: str, make: Callable[[Tensor], Tensor], message: str
) -> None:
    folder = original("llama")
    headrace.quantize_for_transformers(folder, tmp_path / "nf4", format="nf4")
    shard = tmp_path / "nf4/model-model.layers.2.safetensors"
    tensors = load_file(shard)
    name = f"{Q}.weight.{suffix}"
    tensors[name] = make(tensors[name])
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(ValueError) as caught:
        headrace.load(tmp_path / "nf4", device="cpu")
    assert message in str(caught.value)
    assert Q in str(caught.value)


def test_the_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "gptq")
    harmed(folder, lambda tensors, config: config.update(intermediate_size=48))
    with pytest.raises(ValueError, match=r"mlp\.\w+\.weight.*another model"):
        headrace.load(folder, device="cpu")
    harmed(folder, lambda tensors, config: config.update(intermediate_size=64, num_hidden_layers=5))
    with pytest.raises(ValueError, match=r"layers\.4"):
        headrace.load(folder, device="cpu")


def test_a_shard_cut_short_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "fp8-blocks")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        headrace.load(folder, device="cpu")


def test_experts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(original("qwen3_moe"), tmp_path / "model")
    described = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    rewrite(folder, described, lambda n, w: fp8(w, 16) if linear(n) else None)
    expert = "model.layers.1.mlp.experts.3"
    harmed(folder, lambda t, c: [t.pop(f"{expert}.up_proj.weight{s}") for s in ("", "_scale_inv")])
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts.*cannot be put together"):
        headrace.load(folder, device="cpu")


WORDS = ["bitsandbytes", "compressed-tensors", "fp8", "gptq", "modelopt", "mxfp4", "mxfp8", "x"]
SUFFIXES = [
    *("weight", "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_packed"),
    *("weight_global_scale", "qweight", "qzeros", "scales", "g_idx", "SCB", "weight.absmax"),
    *("weight.quant_map", "weight.quant_state.bitsandbytes__nf4", "proj_blocks", "proj_scales"),
    *("weight.nested_absmax", "weight.quant_state.bitsandbytes__", "_blocks", "qweight.qweight"),
]
TYPES = [torch.uint8, torch.int8, torch.int32, torch.float16, torch.float32, torch.float8_e4m3fn]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    method=st.sampled_from(WORDS),
    stored=st.dictionaries(
        st.sampled_from(SUFFIXES),
        st.tuples(st.lists(st.integers(0, 40), max_size=4), st.sampled_from(TYPES)),
        max_size=6,
    ),
    extra=st.dictionaries(
        st.sampled_from(["bits", "weight_block_size", "checkpoint_format", "group_size"]),
        st.one_of(st.none(), st.integers(-3, 9), st.lists(st.integers(-1, 99), max_size=3)),
        max_size=3,
    ),
    content=st.binary(max_size=40),
)
def test_any_header_gives_weights_that_fit_or_an_error_that_names_the_file(
    method: str,
    stored: dict[str, tuple[list[int], torch.dtype]],
    extra: dict[str, Any],
    content: bytes,
) -> None:
    specs = {f"a.{suffix}": TensorSpec(tuple(s), dtype) for suffix, (s, dtype) in stored.items()}

    def read(name: str) -> Tensor:
        spec = specs[name]
        data = (content or b"\0") * spec.nbytes
        return (
            torch.frombuffer(bytearray(data[: spec.nbytes] or b"\0"), dtype=torch.uint8)[
                : spec.nbytes
            ]
            .view(spec.dtype)
            .view(spec.shape)
        )

    tensors = StoredTensors(specs, read, "the-file")
    try:
        found = native_weights({"quant_method": method, **extra}, tensors)
    except ValueError as error:
        assert "the-file" in str(error)
        return
    for weight in found:
        check(weight, specs)


def check(weight: NativeWeight, specs: dict[str, TensorSpec]) -> None:
    """The bytes of every part are as many as the codec reads."""
    for part, spec in weight.codec.spec(weight.shape).items():
        if part in weight.literals:
            assert weight.literals[part].numel() == spec.numel
        else:
            assert specs[weight.stored[part]].nbytes == spec.nbytes
