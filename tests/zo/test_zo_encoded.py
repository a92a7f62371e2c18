"""Zeroth order over encoded weights: codes never change, resident or streamed, low rank or QZO."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import headrace
from headrace.quant.codec import Codec
from headrace.quant.int4_group import Int4GroupCodec
from headrace.quant.int8_rowwise import Int8RowwiseCodec
from headrace.quant.linear import EncodedLinear
from headrace.quant.nf4 import Nf4Codec
from headrace.zo.lowrank import LowRank
from headrace.zo.objective import causal_lm_losses
from headrace.zo.one_sided import OneSided
from headrace.zo.quantised import encoded_matrices, qzo_settings, scale_parameters, trains_scales
from headrace.zo.settings import ZOSettings
from headrace.zo.step import ZOStep
from headrace.zo.streamed import StreamedWeights
from headrace.zo.weights import ResidentWeights

LOW_RANK = ZOSettings(lr=1e-2, estimator=OneSided(4), directions=LowRank(4, steps=2))
QZO = qzo_settings(lr=1e-6)
INT4 = Int4GroupCodec(scale_dtype="float32")
STEPS = 5


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    folder = tmp_path_factory.mktemp("plain")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoded(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Codec], Path]:
    made: dict[str, Path] = {}

    def folder(codec: Codec) -> Path:
        if codec.name not in made:
            made[codec.name] = tmp_path_factory.mktemp("encoded") / codec.name
            headrace.quantize(plain, made[codec.name], format=codec)
        return made[codec.name]

    return folder


def resident_model(folder: Path, codec: Codec) -> nn.Module:
    """The model with the linear layers of its decoder encoded, all in memory."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, EncodedLinear.from_linear(child, codec))
    return model


def batch(step: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def together(zo: ZOStep, steps: int) -> list[tuple[float, ...]]:
    def objective(model: nn.Module, members: int) -> list[float]:
        return causal_lm_losses(model, batch(zo.next_step), members)

    return [zo.step_together(objective).record.losses for _ in range(steps)]


def apart(zo: ZOStep, steps: int) -> list[tuple[float, ...]]:
    def objective(model: nn.Module) -> float:
        return causal_lm_losses(model, batch(zo.next_step), 1)[0]

    return [zo.step(objective).record.losses for _ in range(steps)]


def streamed(folder: Path, room: str) -> nn.Module:
    budgets = {"device_budget": "1GB", "host_budget": "1GB"}
    if room == "disk":
        budgets = {"device_budget": 1 << 20, "host_budget": 600 << 10}
    return headrace.load(folder, train="none", device="cpu", **budgets)


@pytest.mark.parametrize("room", ["resident", "disk"])
@pytest.mark.parametrize("codec", [Nf4Codec(), INT4], ids=lambda codec: codec.name)
def test_streamed_low_rank_has_the_resident_bits(
    codec: Codec, room: str, plain: Path, encoded: Callable[[Codec], Path], tmp_path: Path
) -> None:
    folder = encoded(codec)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = resident_model(plain, codec)
    resident = ResidentWeights(encoded_matrices(model))
    reference = ZOStep(model, LOW_RANK, weights=resident)
    expected = together(reference, STEPS)
    final = dict(reference.export())

    stream = streamed(folder, room)

    def select(name: str, _: nn.Parameter) -> bool:
        return name in reference.trained_names

    weights = StreamedWeights(
        stream, headrace.runtime_of(stream), LOW_RANK.directions, select=select
    )
    zo = ZOStep(stream, LOW_RANK, weights=weights, log=tmp_path / "log")
    assert together(zo, STEPS) == expected
    assert set(zo.trained_names) == set(reference.trained_names) and len(zo.trained_names) == 14
    for name, tensor in zo.export():
        assert torch.equal(tensor, final[name]), name
    for name in zo.trained_names:
        ours, theirs = weights.adapter_of(name), resident.adapter_of(name)
        assert ours is not None and theirs is not None
        assert ours.factors is not None and theirs.factors is not None
        assert ours.factors[0].shape[1] == 4 * (STEPS // 2)
        assert torch.equal(ours.factors[0], theirs.factors[0])
    zo.close()
    stream.close()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    again = streamed(folder, room)
    resumed = ZOStep.resume(
        again,
        tmp_path / "log",
        weights=lambda select: StreamedWeights(
            again, headrace.runtime_of(again), LOW_RANK.directions, select=select
        ),
    )
    assert together(resumed, 2) == together(reference, 2)
    resumed.close()
    again.close()


@pytest.mark.parametrize(
    ("codec", "room"),
    [(INT4, "resident"), (INT4, "disk"), (Int8RowwiseCodec(), "disk")],
    ids=["int4 resident", "int4 disk", "int8 disk"],
)
def test_streamed_qzo_has_the_resident_bits(
    codec: Codec, room: str, plain: Path, encoded: Callable[[Codec], Path], tmp_path: Path
) -> None:
    folder = encoded(codec)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = resident_model(plain, codec)
    reference = ZOStep(model, QZO, weights=ResidentWeights(scale_parameters(model)))
    expected = apart(reference, STEPS)
    final = dict(reference.export())

    stream = streamed(folder, room)
    runtime = headrace.runtime_of(stream)
    weights = StreamedWeights(stream, runtime, QZO.directions, select=trains_scales(stream))
    zo = ZOStep(stream, QZO, weights=weights, log=tmp_path / "log")
    assert together(zo, STEPS) == expected
    exported = dict(zo.export())
    assert exported.keys() == final.keys() and len(final) == 14
    for name, tensor in final.items():
        assert torch.equal(exported[name], tensor), name
    assert any(
        not torch.equal(exported[n], p)
        for n, p in scale_parameters(resident_model(plain, codec)).items()
    )
    zo.close()
    stream.close()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_low_rank_over_codes_is_low_rank_over_their_values() -> None:
    """Kept windows and merged windows are one function, in fp64 to the fp32 of the factors."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 24)
            self.second = nn.Linear(24, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    torch.manual_seed(0)
    codec = Int4GroupCodec(block_size=8, scale_dtype="float32")
    net = Net().double()
    for name, child in list(net.named_children()):
        setattr(net, name, EncodedLinear.from_linear(child, codec))
    matrices = encoded_matrices(net)
    values = Net().double()
    for name, child in values.named_children():
        child.weight.data = matrices[f"{name}.weight"].decode()
    values.first.bias = net.first.bias
    x = torch.randn(6, 16, dtype=torch.float64)

    def losses(model: nn.Module, members: int) -> list[float]:
        outputs = model(x.repeat(members, 1)).view(members, -1)
        return [float(output.square().mean()) for output in outputs]

    coded = ZOStep(net, LOW_RANK, weights=ResidentWeights(matrices))
    explicit = ZOStep(values, LOW_RANK)
    assert set(coded.trained_names) == set(explicit.trained_names)
    for _ in range(7):
        ours = coded.step_together(losses).record.losses
        theirs = explicit.step_together(losses).record.losses
        assert ours == pytest.approx(theirs, abs=1e-6)
    for name, weight in coded.export():
        assert torch.allclose(weight, dict(explicit.export())[name], atol=1e-6)


def test_dense_directions_and_merges_are_refused_for_codes(plain: Path) -> None:
    model = resident_model(plain, INT4)
    with pytest.raises(ValueError, match="is encoded and its codes are fixed"):
        ZOStep(model, ZOSettings(), weights=ResidentWeights(encoded_matrices(model)))
    weights = ResidentWeights(encoded_matrices(model))
    zo = ZOStep(model, LOW_RANK, weights=weights)
    with pytest.raises(ValueError, match="takes no merge"), zo.merged():
        pass
