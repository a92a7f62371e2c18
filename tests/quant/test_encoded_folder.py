"""Encoding a checkpoint to a folder: complete, resumable, small in memory, and hard to fool."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

from headrace.quant import TensorSpec
from headrace.quant.fold import (
    PendingTensor,
    default_choice,
    encode_folder,
    pending_from_checkpoint,
)
from headrace.quant.folder import INDEX_NAME, EncodedFolder
from headrace.quant.int8_rowwise import Int8RowwiseCodec
from headrace.quant.model import (
    declare_encoded,
    decoding_bytes,
    encode_model,
    encoded_weights,
)
from headrace.quant.nf4 import Nf4Codec
from headrace.quant.shards import ShardFile


def make_checkpoint(folder):
    folder.mkdir()
    torch.manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(50, 33),
        "model.norm.weight": torch.ones(33),
    }
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "self_attn.q_proj.weight": torch.randn(33, 33),
            prefix + "self_attn.q_proj.bias": torch.randn(33),
            prefix + "input_layernorm.weight": torch.ones(33),
            prefix + "mlp.gate.weight": torch.randn(4, 33),
            prefix + "mlp.experts.gate_up_proj": torch.randn(4, 10, 33),
        }
    tensors = {name: value.to(torch.bfloat16) for name, value in tensors.items()}
    names = list(tensors)
    save_file({name: tensors[name] for name in names[:8]}, folder / "model-1.safetensors")
    save_file({name: tensors[name] for name in names[8:]}, folder / "model-2.safetensors")
    return tensors


def encode(checkpoint, out, codec=None, heard=None, source=None):
    return encode_folder(
        pending_from_checkpoint(checkpoint),
        out,
        choose=default_choice(codec or Nf4Codec()),
        source=source or {"checkpoint": "tiny"},
        on_tensor=(heard if heard is not None else []).append,
    )


@pytest.fixture
def checkpoint(tmp_path):
    make_checkpoint(tmp_path / "model")
    return tmp_path / "model"


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_everything_comes_back_and_the_report_tells_the_error(tmp_path, checkpoint):
    heard = []
    folder = encode(checkpoint, tmp_path / "out", heard=heard)
    tensors = load_file(checkpoint / "model-1.safetensors") | load_file(
        checkpoint / "model-2.safetensors"
    )
    assert set(folder.records) == set(tensors) == {report.name for report in heard}
    codec = Nf4Codec()
    for report in heard:
        x = tensors[report.name]
        if report.name.endswith(("q_proj.weight", "gate_up_proj")):
            assert report.codec == "nf4"
            parts = codec.encode(x)
            read = folder.read_parts(report.name)
            assert all(torch.equal(read[name], part) for name, part in parts.items())
            decoded = folder.decode(report.name)
            assert torch.equal(decoded, codec.decode(parts, tuple(x.shape), torch.bfloat16))
            error = codec.decode(parts, tuple(x.shape)) - x.float()
            relative = (error.square().mean() / x.float().square().mean()).sqrt().item()
            assert report.relative_rms == pytest.approx(relative, rel=1e-5)
            assert report.largest_error == pytest.approx(error.abs().max().item())
            assert report.bytes_after == codec.nbytes(tuple(x.shape)) < report.bytes_before
        else:
            assert report.codec == "kept"
            assert torch.equal(folder.read_kept(report.name), x)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "encoded-model.embed_tokens.safetensors",
        "encoded-model.layers.0.safetensors",
        "encoded-model.layers.1.safetensors",
        "encoded-model.layers.2.safetensors",
        "encoded-model.norm.safetensors",
        INDEX_NAME,
        "model.safetensors.index.json",
    ]


def test_shards_are_plain_safetensors_with_aligned_data(tmp_path, checkpoint):
    folder = encode(checkpoint, tmp_path / "out")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    shard = folder.shard_file(name)
    theirs = load_file(shard.path)
    assert torch.equal(theirs[f"{name}_codes"], folder.read_parts(name)["codes"])
    assert set(theirs) == set(shard.tensors)
    first = min(stored.offset_bytes for stored in shard.tensors.values())
    assert first % 4096 == 0
    for stored in shard.tensors.values():
        assert stored.offset_bytes % stored.spec.dtype.itemsize == 0


def test_two_runs_and_an_interrupted_one_give_the_same_bytes(tmp_path, checkpoint):
    encode(checkpoint, tmp_path / "one")
    encode(checkpoint, tmp_path / "two")
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")

    class Interrupted(Exception):
        pass

    count = 0

    def interrupting(report):
        nonlocal count
        count += 1
        if count == 7:
            raise Interrupted

    pending = pending_from_checkpoint(checkpoint)
    arguments = {"choose": default_choice(Nf4Codec()), "source": {"checkpoint": "tiny"}}
    with pytest.raises(Interrupted):
        encode_folder(pending, tmp_path / "three", on_tensor=interrupting, **arguments)
    with pytest.raises(ValueError, match="interrupted"):
        EncodedFolder(tmp_path / "three")
    finished = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "three").glob("*.safetensors")}
    assert finished
    (tmp_path / "three" / "encoded-model.norm.safetensors.partial").write_bytes(b"torn")
    encode(checkpoint, tmp_path / "three")
    for name, stamp in finished.items():
        assert (tmp_path / "three" / name).stat().st_mtime_ns == stamp, "redone"
    assert folder_bytes(tmp_path / "three") == folder_bytes(tmp_path / "one")
    with pytest.raises(ValueError, match="already holds"):
        encode(checkpoint, tmp_path / "three")


def test_a_run_is_never_continued_with_other_settings(tmp_path, checkpoint):
    pending = pending_from_checkpoint(checkpoint)

    def stop(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_folder(
            pending[::-1],
            tmp_path / "out",
            choose=default_choice(Nf4Codec()),
            source={"checkpoint": "tiny"},
            on_tensor=stop,
        )
    with pytest.raises(ValueError, match=r"other settings.*q_proj|other settings.*gate_up_proj"):
        encode(checkpoint, tmp_path / "out", codec=Int8RowwiseCodec())
    with pytest.raises(ValueError, match="another"):
        encode(checkpoint, tmp_path / "out", source={"checkpoint": "another"})


def test_non_finite_weights_are_refused_by_name(tmp_path):
    (tmp_path / "model").mkdir()
    bad = torch.ones(4, 4)
    bad[1, 2] = torch.inf
    save_file({"layers.0.fc.weight": bad}, tmp_path / "model" / "m.safetensors")
    with pytest.raises(ValueError, match=r"layers\.0\.fc\.weight.*1 values"):
        encode(tmp_path / "model", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.partial"))


def damage_index(folder, change):
    path = folder / INDEX_NAME
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


TARGET = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(format="other"), "format"),
        (lambda index: index.update(version=2), "version"),
        (lambda index: index.pop("tensors"), "lacks"),
        (lambda index: index["tensors"][TARGET].pop("shape"), "q_proj.*shape"),
        (lambda index: index["tensors"][TARGET].update(shape=[33, -33]), "q_proj"),
        (lambda index: index["tensors"][TARGET].update(shape=[33, 3300]), "q_proj"),
        (lambda index: index["tensors"][TARGET].update(dtype="float128"), "float128"),
        (lambda index: index["tensors"][TARGET].update(shard="../evil.safetensors"), "plain file"),
        (lambda index: index["tensors"][TARGET].update(shard="gone.safetensors"), "missing"),
        (lambda index: index["tensors"][TARGET]["codec"].update(codec="os.system"), "os.system"),
        (lambda index: index["tensors"][TARGET]["codec"].update(block_size="64"), "block_size"),
        (lambda index: index["tensors"][TARGET]["codec"].update(block_size=128), "q_proj"),
        (lambda index: index["tensors"][TARGET].update(parts={}), "parts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_lying_index_is_refused_by_name(tmp_path, checkpoint, change, message):
    encode(checkpoint, tmp_path / "out")
    damage_index(tmp_path / "out", change)
    with pytest.raises(ValueError, match=message):
        EncodedFolder(tmp_path / "out")


def test_flipped_bits_and_short_files_are_refused_by_name(tmp_path, checkpoint):
    folder = encode(checkpoint, tmp_path / "out")
    shard = folder.shard_file(TARGET)
    stored = shard.tensors[f"{TARGET}_codes"]
    with shard.path.open("r+b") as file:
        file.seek(stored.offset_bytes + 5)
        byte = file.read(1)[0]
        file.seek(stored.offset_bytes + 5)
        file.write(bytes([byte ^ 4]))
    with pytest.raises(ValueError, match=r"layers\.1.*q_proj\.weight_codes.*damaged"):
        EncodedFolder(tmp_path / "out").read_parts(TARGET)
    os.truncate(shard.path, shard.path.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"encoded-model\.layers\.1\.safetensors"):
        EncodedFolder(tmp_path / "out")
    with pytest.raises(ValueError, match="claims bytes"):
        ShardFile(shard.path)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xff" * 8,
        (20).to_bytes(8, "little") + b"{not json at all....",
        (2).to_bytes(8, "little") + b"[]",
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,99999]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"PICKLE","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}',
        b'{"a":7}',
        b"[" * 50_000,
    ],
    ids=lambda header: repr(header[:30]),
)
def test_hostile_headers_are_refused(tmp_path, header):
    path = tmp_path / "hostile.safetensors"
    if header[:1] in (b"{", b"["):
        header = len(header).to_bytes(8, "little") + header + b"\0" * 16
    path.write_bytes(header)
    with pytest.raises(ValueError, match="hostile"):
        ShardFile(path)


def test_memory_stays_at_one_tensor(tmp_path):
    """Peak RSS grows by about the largest tensor and its parts, not by the checkpoint."""
    (tmp_path / "model").mkdir()
    tensors = {
        f"layers.{i}.fc.weight": torch.full((2048, 4096), 0.5, dtype=torch.bfloat16)
        for i in range(12)
    }
    save_file(tensors, tmp_path / "model" / "m.safetensors")  # 12 tensors of 16 MiB
    script = textwrap.dedent(
        """
        import resource, sys
        from pathlib import Path
        import torch
        torch.set_num_threads(1)
        from headrace.quant.fold import default_choice, encode_folder, pending_from_checkpoint
        from headrace.quant.nf4 import Nf4Codec
        codec = Nf4Codec()
        codec.decode(codec.encode(torch.randn(1 << 21)), (1 << 21,))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        encode_folder(
            pending_from_checkpoint(Path(sys.argv[1])),
            Path(sys.argv[2]),
            choose=default_choice(codec),
            source={},
            on_tensor=lambda report: None,
        )
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        """
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    growth_mib = int(run.stdout) / 1024
    assert growth_mib < 2 * 16 + 40


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2_moe", "gpt2"])
def test_a_model_shaped_for_a_folder_computes_what_the_encoded_model_does(tmp_path, family):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    if family != "gpt2":
        sizes["num_key_value_heads"] = 2
    if family == "qwen2_moe":
        sizes |= {
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
        }
    config = AutoConfig.for_model(family, **sizes)
    torch.manual_seed(0)
    resident = AutoModelForCausalLM.from_config(config)
    pending = [
        PendingTensor(name, TensorSpec(tuple(p.shape), p.dtype), p.detach)
        for name, p in resident.named_parameters()
    ]
    choose = default_choice(Nf4Codec())
    folder = encode_folder(
        pending, tmp_path / "out", choose=choose, source={}, on_tensor=lambda report: None
    )
    names = encode_model(resident, choose)
    assert sorted(names) == sorted(n for n, r in folder.records.items() if r.codec is not None)
    assert sorted(encoded_weights(resident)) == sorted(names)
    largest = max(weight.numel() * 4 for weight in encoded_weights(resident).values())
    assert largest < decoding_bytes(resident) < largest * 20 + (1 << 17)
    experts = [name for name in names if "experts." in name and "shared" not in name]
    assert bool(experts) == (family in ("mixtral", "qwen2_moe"))
    with torch.device("meta"):
        shaped = AutoModelForCausalLM.from_config(config)
    declare_encoded(shaped, folder.records)
    shaped.to_empty(device="cpu")
    shaped.tie_weights()
    weight_map = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = {}
    for file in set(weight_map["weight_map"].values()):
        stored |= load_file(tmp_path / "out" / file)
    assert set(stored) == {name for name, _ in shaped.named_parameters()}
    for name, parameter in shaped.named_parameters():
        parameter.data = stored[name]
    for ours, theirs in zip(shaped.buffers(), resident.buffers(), strict=True):
        ours.copy_(theirs)
    tokens = torch.arange(24).view(2, 12)
    both = (shaped.eval(), resident.eval())
    losses = [each(input_ids=tokens, labels=tokens).loss for each in both]
    assert torch.equal(*losses)
    other = declare_other_width(config, family)
    with pytest.raises(ValueError, match="different models"):
        declare_encoded(other, folder.records)


def declare_other_width(config, family):
    from transformers import AutoModelForCausalLM

    other = config.to_dict()
    other["n_embd" if family == "gpt2" else "hidden_size"] = 64
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(type(config).from_dict(other))


def test_shared_parameters_are_not_encoded_behind_the_others_back():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 8), "b": torch.nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    with pytest.raises(ValueError, match=r"a\.weight.*b\.weight"):
        encode_model(model, default_choice(Nf4Codec()))
