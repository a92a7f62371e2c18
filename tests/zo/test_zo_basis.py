"""Measured input directions: which rows count, and that streaming measures the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import headrace
from headrace.zo import CommonRight, measure_basis, recommended
from headrace.zo.basis import Basis

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama")
    AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32).save_pretrained(path)
    return path


def resident(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def batch(rows: int = 6, padding: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(0, 64, (rows, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding:
        ids = torch.cat([torch.full((rows, padding), 63), ids], 1)
        mask = torch.cat([torch.zeros(rows, padding, dtype=torch.int64), mask], 1)
    return {"input_ids": ids, "attention_mask": mask}


def distance(one: Basis, other: Basis) -> float:
    """Largest sine between the spans of any layer."""
    worst = 0.0
    assert one.names == other.names
    for names in one.names:
        columns = CONFIG.intermediate_size if "down_proj" in names[0] else CONFIG.hidden_size
        a, b = (torch.linalg.qr(basis.matrix(names[0], columns))[0] for basis in (one, other))
        worst = max(worst, float(torch.linalg.matrix_norm(a - b @ (b.T @ a), ord=2)))
    return worst


def test_the_strongest_directions_are_those_of_the_exact_moments(folder: Path) -> None:
    model = resident(folder)
    seen: list[Tensor] = []
    down = model.get_submodule(DOWN.removesuffix(".weight"))
    handle = down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    basis = measure_basis(model, [batch()], rank=3)
    handle.remove()
    rows = nn.functional.normalize(seen[0].detach().reshape(-1, 48), dim=1)
    exact = torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)[:, :3]
    made = basis.matrix(DOWN, 48)
    spans = (exact, made / made.norm(dim=0))
    energy = [float((rows @ q).square().sum() / rows.square().sum()) for q in spans]
    assert energy[1] > 0.95 * energy[0]
    lengths = made.norm(dim=0)
    assert float(lengths.max()) < 1.03
    assert torch.allclose(made.T @ made / lengths / lengths[:, None], torch.eye(3), atol=0.03)


def test_hidden_rows_do_not_count_and_long_ones_are_not_met(folder: Path) -> None:
    model = resident(folder)
    assert (
        distance(measure_basis(model, [batch()]), measure_basis(model, [batch(padding=5)])) < 0.05
    )
    # A token with inputs a thousand times as long as the others' must not carry them all.
    inputs = torch.cat([torch.eye(4).repeat(8, 1), 1e3 * torch.ones(1, 4)])
    linear = nn.Sequential(nn.Linear(4, 2, bias=False))
    basis = measure_basis(linear, [{"input": inputs}], rank=4)
    columns = basis.matrix("0.weight", 4)
    assert columns.norm(dim=0).sort().values.tolist() == pytest.approx([5e-4, 1, 1, 1], rel=0.02)
    assert float((inputs @ columns).abs().max()) < 1.02


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_a_streamed_model_has_the_same_basis(folder: Path, micro_batch: int | None) -> None:
    streamed = headrace.load(folder, train="none", device="cpu", micro_batch=micro_batch)
    try:
        found = measure_basis(streamed, [batch(padding=3)])
    finally:
        streamed.close()
    assert distance(found, measure_basis(resident(folder), [batch(padding=3)])) < 0.03


def test_the_recommended_method_takes_it(folder: Path) -> None:
    basis = measure_basis(resident(folder), [batch()], rank=3)
    directions = recommended(examples=6, basis=basis).directions
    assert isinstance(directions, CommonRight)
    assert directions.rank == 3 and directions.basis is basis
    with pytest.raises(ValueError, match="rank is 2, but the basis has 3 columns"):
        CommonRight(8, rank=2, basis=basis)


def test_layers_that_no_batch_reaches_and_narrow_ones_are_left_out() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(8, 3), nn.Linear(8, 3)
            self.narrow = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.narrow(self.used(x))

    model, inputs = Branches(), [{"x": torch.eye(8)}]
    assert measure_basis(model, inputs).names == (("used.weight",),)
    with pytest.raises(ValueError, match=r"no forward reached unused\.weight"):
        measure_basis(model, inputs, names=["used.weight", "unused.weight"])
    with pytest.raises(ValueError, match="no forward reached"):
        measure_basis(model, [])
    with pytest.raises(ValueError, match="has no linear layer"):
        measure_basis(nn.ReLU(), [])
    with pytest.raises(ValueError, match="no input has more than 8 features"):
        measure_basis(model, inputs, rank=9)
