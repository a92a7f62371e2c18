"""What a streamed model does beside the plain step: bad gradients, tiles, parking, accumulation,
generation between steps, dropout, unused parameters, and clear refusals."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming_cases import VOCABULARY, batches, streamed_weights
from streaming_runs import (
    BIG_BYTES,
    ROWS,
    TOKENS,
    Setting,
    budgets_for,
    folder_of,
    load_streamed,
    resident_step,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers import LlamaForCausalLM as Llama

import headrace
from headrace.offload.activation import ParkPlace
from headrace.offload.errors import (
    BudgetError,
    HeadraceError,
    SourceError,
    StoreLockedError,
    UnsupportedModelError,
)
from headrace.offload.timeline import LaneName
from headrace.offload.workspace import LOGIT_BYTES
from headrace.optim import adamw
from headrace.structure import cut

BIG = (BIG_BYTES, BIG_BYTES)
HYPER: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
MODES = pytest.mark.parametrize("update", ["forward", "backward"])

Opener = Callable[..., Any]


@pytest.fixture
def opened(device: str, tmp_path: Path) -> Iterator[Opener]:
    """Opens streamed models and closes them at the end."""
    models: list[Any] = []

    def open_one(
        folder: Path, setting: Setting, budgets: tuple[int, int] = BIG, **more: Any
    ) -> Any:
        store = more.pop("store", tmp_path / f"store-{len(models)}")
        models.append(load_streamed(folder, setting, device, store, budgets, **more))
        return models[-1]

    yield open_one
    for model in models:
        model.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def small_llama(folder: Path, **changes: Any) -> Path:
    """A random Llama with some dimensions changed."""
    if not (folder / "config.json").exists():
        torch.manual_seed(7)
        base: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
        Llama(LlamaConfig(**{**base, **changes})).save_pretrained(folder)
    return folder


def resident(folder: Path, device: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).to(device).train()


def ids(count: int, device: str) -> list[Tensor]:
    return [b.to(device) for b in batches(count, rows=ROWS, tokens=TOKENS)]


def unequal(model: Any, reference: nn.Module) -> list[str]:
    """Names of parameters whose bits differ."""
    named = dict(reference.named_parameters())
    found = streamed_weights(model)
    assert found.keys() == {n for n in named if n in found} and found
    return [n for n, t in found.items() if not torch.equal(t, named[n].detach().cpu())]


def streamed_step(model: Any, optimizer: Any, batch: Tensor) -> float:
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def lane_bytes(model: Any, lane: LaneName) -> int:
    return model._runtime.timeline.total_bytes(lane)


# Bad gradients


def spoil_output_gradient(layer: nn.Module, armed: list[float]) -> None:
    """While ``armed`` holds a factor, the gradient of the layer's output is multiplied by it."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if armed and tensor.requires_grad:
            factor = armed[0]
            tensor.register_hook(lambda g: g * factor)

    layer.register_forward_hook(hook)


@MODES
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("durability", ["step", "checkpoint"])
@pytest.mark.parametrize("placement", ["big", "disk"])
def test_bad_step_is_skipped_whole(
    update: str,
    value: float,
    durability: str,
    placement: str,
    models: Path,
    device: str,
    opened: Opener,
    tmp_path: Path,
) -> None:
    """Later layers see good gradients and are updated early in 'backward'; that must not stay."""
    setting = Setting("qwen2", update=update, placement=placement)
    folder = folder_of(setting, models)
    reference = resident(folder, device)
    theirs = adamw(reference, **HYPER)
    budgets = budgets_for(setting, folder, device, tmp_path / "probe")
    model = opened(folder, setting, budgets, durability=durability)
    ours = adamw(model, **HYPER)
    armed: list[float] = []
    spoil_output_gradient(model.model.layers[1], armed)
    for step, batch in enumerate(ids(5, device)):
        expected = resident_step(reference, batch, setting.micro_batches)
        if step in (0, 2):
            armed.append(value)
        else:
            theirs.step()
        theirs.zero_grad()
        assert streamed_step(model, ours, batch) == expected
        armed.clear()
    assert ours.skipped_steps == 2
    statistics = model._runtime.statistics()
    assert (statistics.skipped_steps, statistics.steps) == (2, 3)
    assert unequal(model, reference) == []


@MODES
def test_infinite_loss_scale_is_skipped(
    update: str, models: Path, device: str, opened: Opener
) -> None:
    setting = Setting("llama", update=update)
    folder = folder_of(setting, models)
    reference = resident(folder, device)
    model = opened(folder, setting)
    optimizer = adamw(model, **HYPER)
    (batch,) = ids(1, device)
    (model(input_ids=batch, labels=batch).loss * float("inf")).backward()
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert unequal(model, reference) == []


def test_bad_step_of_adapters_is_skipped(models: Path, device: str, opened: Opener) -> None:
    from streaming_runs import adapted

    setting = Setting("llama", method="lora")
    model = adapted(opened(folder_of(setting, models), setting))
    optimizer = adamw(model, **HYPER)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    (batch,) = ids(1, device)
    (model(input_ids=batch, labels=batch).loss * float("nan")).backward()
    optimizer.step()
    assert optimizer.skipped_steps == 1
    after = dict(model.named_parameters())
    assert all(torch.equal(t, after[n]) for n, t in before.items())


# Bytes moved


@MODES
def test_large_budgets_read_the_disk_once(
    update: str, models: Path, device: str, opened: Opener
) -> None:
    setting = Setting("llama", update=update)
    model = opened(folder_of(setting, models), setting)
    chunks = model._runtime.engine.chunks.values()
    in_shards = sum(c.backing.host_nbytes for c in chunks)
    weights = sum(c.layout.nbytes for c in chunks)
    assert lane_bytes(model, LaneName.DISK_READ) == 0
    optimizer = adamw(model, **HYPER)
    assert 0 < lane_bytes(model, LaneName.DISK_READ) <= in_shards
    assert lane_bytes(model, LaneName.DISK_WRITE) == weights
    imported = lane_bytes(model, LaneName.DISK_READ)
    for step, batch in enumerate(ids(4, device)):
        streamed_step(model, optimizer, batch)
        # Each chunk once; states begin as zeroes and are never read.
        assert lane_bytes(model, LaneName.DISK_READ) - imported == weights, step
    model._runtime.flush()
    states = sum(
        len(list(t.pieces)) and t.nbytes
        for of_chunk in model._runtime.updates._states._tiles.values()
        for t in of_chunk
    )
    assert lane_bytes(model, LaneName.DISK_WRITE) == weights + 4 * (weights + states)


def test_adapters_never_write_the_base(
    models: Path, device: str, opened: Opener, tmp_path: Path
) -> None:
    from streaming_runs import adapted

    setting = Setting("llama", method="lora", placement="disk")
    folder = folder_of(setting, models)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    budgets = budgets_for(setting, folder, device, tmp_path / "probe")
    model = opened(folder, setting, budgets, activations="auto")
    adapters = adapted(model)
    optimizer = adamw(adapters, **HYPER)
    for batch in ids(3, device):
        streamed_step(adapters, optimizer, batch)
    assert lane_bytes(model, LaneName.DISK_READ) > 0
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@MODES
def test_disk_bytes_do_not_grow_with_micro_batches(
    update: str, models: Path, device: str, opened: Opener, tmp_path: Path
) -> None:
    folder = small_llama(models / "deep", num_hidden_layers=8)
    # Budgets that one micro-batch needs, so that all runs have the same.
    budgets = budgets_for(
        Setting("llama", update=update, placement="disk", micro_batches=1),
        folder,
        device,
        tmp_path / "probe",
    )
    moved: dict[int, dict[LaneName, int]] = {}
    for micro_batches in (1, 3, 4):
        setting = Setting("llama", update=update, micro_batches=micro_batches)
        model = opened(folder, setting, budgets, activations="disk")
        optimizer = adamw(model, **HYPER)
        for batch in ids(4, device):
            streamed_step(model, optimizer, batch)
        model._runtime.flush()
        moved[micro_batches] = {
            lane: lane_bytes(model, lane) for lane in (LaneName.DISK_READ, LaneName.DISK_WRITE)
        }
    assert moved[1][LaneName.DISK_READ] > 0
    weights = sum(c.layout.nbytes for c in model._runtime.engine.chunks.values())
    for lane in (LaneName.DISK_READ, LaneName.DISK_WRITE):
        # Which prefetch found room depends on timing: allow less than one set of weights in 4
        # steps, where a second visit per micro-batch would add eight.
        for micro_batches in (3, 4):
            assert moved[micro_batches][lane] <= moved[1][lane] + weights


# Activations


@pytest.mark.parametrize("place", ["device", "host", "disk"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_parked_activations_keep_their_bits(
    place: str, micro_batches: int, models: Path, device: str, opened: Opener
) -> None:
    setting = Setting("gemma2", micro_batches=micro_batches)
    folder = folder_of(setting, models)
    reference = resident(folder, device)
    theirs = adamw(reference, **HYPER)
    model = opened(folder, setting, activations=place)
    ours = adamw(model, **HYPER)
    for batch in ids(3, device):
        expected = resident_step(reference, batch, micro_batches)
        theirs.step()
        theirs.zero_grad()
        assert streamed_step(model, ours, batch) == expected
    assert unequal(model, reference) == []
    parked = model._runtime.parking.parked_bytes
    assert parked[ParkPlace(place)] > 0
    assert sum(parked.values()) == parked[ParkPlace(place)]


@pytest.mark.parametrize("place", ["host", "disk"])
def test_device_peak_does_not_grow_with_layers(
    place: str, models: Path, device: str, opened: Opener, tmp_path: Path
) -> None:
    """The device budget that is just enough for two layers is enough for twelve."""
    setting = Setting("llama", placement="host", micro_batches=1)
    shallow = small_llama(models / "layers2", num_hidden_layers=2)
    deep = small_llama(models / "layers12", num_hidden_layers=12)
    budgets = budgets_for(setting, shallow, device, tmp_path / "probe")
    peaks = []
    for folder in (shallow, deep):
        model = opened(folder, setting, budgets, activations=place)
        optimizer = adamw(model, **HYPER)
        for batch in ids(2, device):
            streamed_step(model, optimizer, batch)
        peaks.append(model._runtime.device_budget.statistics().peak_bytes)
    assert peaks[1] <= budgets[0]
    chunk = max(c.layout.nbytes for c in model._runtime.engine.chunks.values())
    assert peaks[1] <= peaks[0] + chunk
    # The comparison can fail: parked on the device, twelve layers do not fit.
    model = opened(deep, setting, budgets, activations="device")
    adamw(model, **HYPER)
    with pytest.raises(BudgetError, match="device_budget"):
        model(input_ids=ids(1, device)[0], labels=ids(1, device)[0])


# The head and the loss

WIDE_VOCABULARY = 2048


class LargestLogits(TorchDispatchMode):
    """Remembers the most elements of any tensor whose last axis is the vocabulary."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        weight = (32, WIDE_VOCABULARY)  # the head's, transposed
        found = isinstance(result, Tensor) and result.dim() and result.shape != weight
        if found and result.shape[-1] == WIDE_VOCABULARY:
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("tile_tokens", [5, 16])
def test_no_logits_sized_term(tile_tokens: int, models: Path, device: str, opened: Opener) -> None:
    folder = small_llama(models / "wide", vocab_size=WIDE_VOCABULARY)
    setting = Setting("llama", micro_batches=1)
    tile_bytes = tile_tokens * WIDE_VOCABULARY * LOGIT_BYTES
    model = opened(folder, setting, loss_tile=tile_bytes)
    adamw(model, **HYPER)
    batch = ids(1, device)[0]
    watch = LargestLogits()
    with watch:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
    assert 0 < watch.elements <= tile_tokens * WIDE_VOCABULARY
    layout = model._runtime.engine.chunks["lm_head"].layout
    hidden = batch.numel() * 32 * 4
    working = model._runtime.workspace.nbytes
    assert working == tile_bytes + layout.slots[0].nbytes + 4 * hidden
    # A plain resident step makes them all: the watch sees it.
    watch = LargestLogits()
    with watch:
        resident(folder, device)(input_ids=batch, labels=batch).loss.backward()
    assert watch.elements == batch.numel() * WIDE_VOCABULARY


def tiled_resident_step(model: Any, batch: Tensor, micro_batch: int, tile_tokens: int) -> float:
    """The resident step with the head and the loss in tiles of tokens."""
    labels = nn.functional.pad(batch, (0, 1), value=-100)[:, 1:]
    count = (labels != -100).sum()
    total: Tensor | None = None
    for start in range(0, batch.shape[0], micro_batch):
        part = batch[start : start + micro_batch]
        states = model.model(input_ids=part, use_cache=False).last_hidden_state
        hidden = states.detach().reshape(-1, states.shape[-1])
        gradient = torch.empty_like(hidden)
        targets = labels[start : start + micro_batch].reshape(-1)
        share: Tensor | None = None
        for first in range(0, hidden.shape[0], tile_tokens):
            tile = hidden[first : first + tile_tokens].detach().requires_grad_()
            loss = model.loss_function(
                logits=model.lm_head(tile),
                labels=None,
                vocab_size=model.config.vocab_size,
                shift_labels=targets[first : first + tile_tokens],
                num_items_in_batch=count,
            )
            loss.backward()
            assert tile.grad is not None
            gradient[first : first + tile_tokens] = tile.grad
            share = loss.detach() if share is None else share + loss.detach()
        states.backward(gradient.view_as(states))
        assert share is not None
        total = share if total is None else total + share
    assert total is not None
    return float(total)


@pytest.mark.parametrize("tile_tokens", [1, 7, 12, 30])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_loss_tiles_equal_a_resident_run_with_the_same_tiles(
    tile_tokens: int, micro_batches: int, models: Path, device: str, opened: Opener
) -> None:
    folder = small_llama(models / "untied")
    setting = Setting("llama", micro_batches=micro_batches)
    reference = resident(folder, device)
    theirs = adamw(reference, **HYPER)
    model = opened(folder, setting, loss_tile=tile_tokens * VOCABULARY * LOGIT_BYTES)
    ours = adamw(model, **HYPER)
    for batch in ids(3, device):
        micro_batch = {1: ROWS, 3: 3}[micro_batches]
        expected = tiled_resident_step(reference, batch, micro_batch, tile_tokens)
        theirs.step()
        theirs.zero_grad()
        assert streamed_step(model, ours, batch) == expected
    assert unequal(model, reference) == []


# Several backward passes


@pytest.mark.parametrize("placement", ["big", "host", "disk"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_two_backward_passes_add_up(
    placement: str, family: str, models: Path, device: str, opened: Opener, tmp_path: Path
) -> None:
    setting = Setting(family, placement=placement, micro_batches=1)
    folder = folder_of(setting, models)
    reference = resident(folder, device)
    theirs = adamw(reference, **HYPER)
    budgets = budgets_for(setting, folder, device, tmp_path / "probe")
    model = opened(folder, setting, budgets)
    ours = adamw(model, **HYPER)
    work = ids(6, device)
    for first, second in zip(work[::2], work[1::2], strict=True):
        for batch in (first, second):
            expected = resident_step(reference, batch, 1)
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            assert float(loss.detach()) == expected
        nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        model.clip_grad_norm_(0.5)
        for optimizer in (theirs, ours):
            optimizer.step()
            optimizer.zero_grad()
    assert unequal(model, reference) == []


def test_two_backward_passes_are_refused_by_update_backward(
    models: Path, device: str, opened: Opener
) -> None:
    setting = Setting("llama", update="backward")
    model = opened(folder_of(setting, models), setting)
    adamw(model, **HYPER)
    (batch,) = ids(1, device)
    model(input_ids=batch, labels=batch).loss.backward()
    with pytest.raises(HeadraceError, match=r"second gradient.*update='forward'"):
        model(input_ids=batch, labels=batch).loss.backward()


def test_dropped_gradients_stay_dropped(models: Path, device: str, opened: Opener) -> None:
    """zero_grad between backward passes, as users do after a bad batch."""
    setting = Setting("qwen2", micro_batches=1)
    folder = folder_of(setting, models)
    reference = resident(folder, device)
    theirs = adamw(reference, **HYPER)
    model = opened(folder, setting)
    ours = adamw(model, **HYPER)
    bad, *good = ids(4, device)
    for batch in good:
        model(input_ids=bad, labels=bad).loss.backward()
        ours.zero_grad()
        expected = resident_step(reference, batch, 1)
        theirs.step()
        theirs.zero_grad()
        assert streamed_step(model, ours, batch) == expected
    assert unequal(model, reference) == []


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_two_forward_passes_and_one_backward(
    family: str, micro_batches: int, models: Path, device: str, opened: Opener
) -> None:
    """As preference losses do: both passes' graphs are alive at once."""
    setting = Setting(family, micro_batches=micro_batches)
    folder = folder_of(setting, models)
    reference = resident(folder, device)
    model = opened(folder, setting)
    adamw(model, **HYPER)
    first, second = ids(2, device)
    second = second[:, :9]
    gradients: dict[str, Tensor] = {}
    arrived = model._runtime.updates.arrived

    def keep(gradient: Any) -> None:
        gradient.wait()
        gradients.update({n: t.clone() for n, t in gradient.views().items()})
        arrived(gradient)

    model._runtime.updates.arrived = keep
    for one in (reference, model):
        losses = [one(input_ids=b, labels=b, use_cache=False).loss for b in (first, second)]
        (losses[0] - 0.5 * losses[1]).backward()
    assert gradients
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad.cpu(), rtol=1e-4, atol=1e-6)


# Evaluation and generation between steps


@MODES
@pytest.mark.parametrize("placement", ["big", "disk"])
def test_evaluation_between_steps_changes_nothing(
    update: str, placement: str, models: Path, device: str, opened: Opener, tmp_path: Path
) -> None:
    setting = Setting("qwen3", update=update, placement=placement)
    folder = folder_of(setting, models)
    reference = resident(folder, device)
    theirs = adamw(reference, **HYPER)
    budgets = budgets_for(setting, folder, device, tmp_path / "probe")
    model = opened(folder, setting, budgets)
    ours = adamw(model, **HYPER)
    prompt = ids(1, device)[0][:2, :5]
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    for batch in ids(3, device):
        expected = resident_step(reference, batch, setting.micro_batches)
        theirs.step()
        theirs.zero_grad()
        assert streamed_step(model, ours, batch) == expected
        reference.eval()
        model.eval()
        with torch.no_grad():
            logits = model(input_ids=batch[:3], use_cache=False).logits
            assert torch.equal(logits, reference(input_ids=batch[:3], use_cache=False).logits)
        texts = [m.generate(prompt, **options) for m in (reference, model)]
        assert texts[0].shape[1] > prompt.shape[1]
        assert torch.equal(*texts)
        reference.train()
        model.train()
    assert unequal(model, reference) == []


# Dropout, unused parameters


@MODES
def test_dropout_of_one_micro_batch(update: str, models: Path, device: str, opened: Opener) -> None:
    folder = small_llama(models / "dropout", attention_dropout=0.3)
    setting = Setting("llama", update=update, micro_batches=1)
    reference = resident(folder, device)
    theirs = adamw(reference, **HYPER)
    model = opened(folder, setting)
    ours = adamw(model, **HYPER)
    model.train()
    seen = set()
    for step, batch in enumerate(ids(4, device)):
        torch.manual_seed(step)
        expected = resident_step(reference, batch, 1)
        theirs.step()
        theirs.zero_grad()
        torch.manual_seed(step)
        assert streamed_step(model, ours, batch) == expected
        seen.add(expected)
    assert unequal(model, reference) == []
    reference.eval()
    model.eval()
    with torch.no_grad():
        quiet = reference(input_ids=batch, labels=batch).loss
    assert float(quiet) not in seen


@MODES
@pytest.mark.parametrize("placement", ["big", "disk"])
def test_parameters_without_gradient_are_left_alone(
    update: str, placement: str, models: Path, device: str, opened: Opener, tmp_path: Path
) -> None:
    """A layer that is not run and an embedding that is bypassed: no decay, no step counted."""
    setting = Setting("llama", update=update, placement=placement)
    folder = folder_of(setting, models)
    reference = resident(folder, device)
    theirs = adamw(reference, **HYPER)
    budgets = budgets_for(setting, folder, device, tmp_path / "probe")
    model = opened(folder, setting, budgets)
    ours = adamw(model, **HYPER)
    before = {n: t.clone() for n, t in streamed_weights(model).items()}
    model.config.num_hidden_layers = reference.config.num_hidden_layers = 3
    generator = torch.Generator().manual_seed(1)
    for step, batch in enumerate(ids(4, device)):
        if step == 2:  # the embedding gets no gradient
            embeds = torch.randn(ROWS, TOKENS, 32, generator=generator).to(device)
            for one, optimizer in ((reference, theirs), (model, ours)):
                size = 3 if one is reference else ROWS
                count = torch.tensor(ROWS * (TOKENS - 1), device=device)
                for start in range(0, ROWS, size):
                    part = slice(start, start + size)
                    one(
                        inputs_embeds=embeds[part],
                        labels=batch[part],
                        num_items_in_batch=count,
                    ).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            continue
        expected = resident_step(reference, batch, 3)
        theirs.step()
        theirs.zero_grad()
        assert streamed_step(model, ours, batch) == expected
    assert unequal(model, reference) == []
    after = streamed_weights(model)
    unused = [n for n in after if n.startswith("model.layers.3.")]
    assert unused and all(torch.equal(after[n], before[n]) for n in unused)
    assert not torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


# Refusals


def test_budget_too_small_to_load_names_chunk_and_least(
    models: Path, device: str, opened: Opener
) -> None:
    folder = folder_of(Setting("llama"), models)
    for tier, budgets in (("host", (BIG_BYTES, 4096)), ("device", (4096, BIG_BYTES))):
        with pytest.raises(BudgetError) as caught:
            opened(folder, Setting("llama"), budgets)
        message = str(caught.value)
        assert "'model.layers.0'" in message and f"{tier}_budget" in message
        assert re.search(r"[\d,]{5,} bytes on " + tier.upper(), message)


@pytest.mark.parametrize("tier", ["host", "device"])
def test_budget_too_small_to_train_leaves_nothing_behind(
    tier: str, models: Path, device: str, opened: Opener, tmp_path: Path
) -> None:
    folder, setting, store = folder_of(Setting("llama"), models), Setting("llama"), tmp_path / "s"
    model = opened(folder, setting)
    layer = model._runtime.engine.chunks["model.layers.0"]
    model.close()
    small = max(layer.backing.host_nbytes, layer.layout.nbytes)
    budgets = (small, BIG_BYTES) if tier == "device" else (BIG_BYTES, small)
    model = opened(folder, setting, budgets, store=store)
    with pytest.raises(BudgetError, match=rf"bytes on {tier.upper()} \(chunk 'model\.layers\.\d'"):
        adamw(model, **HYPER)
    model.close()
    assert not store.exists() or list(store.iterdir()) == []
    model = opened(folder, setting, store=store)
    optimizer = adamw(model, **HYPER)
    streamed_step(model, optimizer, ids(1, device)[0])


def test_stated_least_device_budget_is_reached_step_by_step(
    models: Path, device: str, opened: Opener
) -> None:
    """Raising the budget to what each refusal says ends in a run."""
    folder, setting = folder_of(Setting("llama"), models), Setting("llama")
    budget, seen = 1, []
    for _ in range(12):
        try:
            model = opened(folder, setting, (budget, BIG_BYTES))
            optimizer = adamw(model, **HYPER)
            streamed_step(model, optimizer, ids(1, device)[0])
            break
        except BudgetError as error:
            figures = re.findall(r"at least ([\d,]+)|needs ([\d,]+) bytes on DEVICE", str(error))
            budget = max(int("".join(pair).replace(",", "")) for pair in figures)
            assert budget > max(seen, default=1), str(error)
            seen.append(budget)
    else:
        pytest.fail(f"no budget worked: {seen}")
    assert len(seen) >= 2


def test_modules_that_cannot_be_streamed_are_named() -> None:
    config = LlamaConfig(**small_llama_values())
    model = Llama(config)
    model.model.register_parameter("bias", nn.Parameter(torch.zeros(3)))
    with pytest.raises(UnsupportedModelError, match=r"'model' owns \['bias'\].*resident"):
        cut(model)
    model = Llama(config)
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(
        UnsupportedModelError, match=r"'model\.layers\.2.*'model\.layers\.0'.*Untie"
    ):
        cut(model)
    model = Llama(config)
    model.model.layers = nn.ModuleList()
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM has no repeated layers"):
        cut(model)


def test_sparse_embeddings_are_refused(models: Path, device: str, tmp_path: Path) -> None:
    class Sparse(AutoModelForCausalLM):
        @classmethod
        def from_config(cls, config: Any, **options: Any) -> Any:
            model = AutoModelForCausalLM.from_config(config, **options)
            model.model.embed_tokens.sparse = True
            return model

    with pytest.raises(UnsupportedModelError, match=r"'model\.embed_tokens\.weight'.*sparse=False"):
        headrace.load(
            folder_of(Setting("llama"), models),
            train="none",
            device=device,
            device_budget=BIG_BYTES,
            host_budget=BIG_BYTES,
            auto_class=Sparse,
        )


def sharded(folder: Path) -> Path:
    config = AutoConfig.for_model("llama", **small_llama_values())
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def small_llama_values() -> dict[str, Any]:
    from streaming_cases import FAMILIES

    return FAMILIES["llama"]


def test_missing_shard_is_named(device: str, tmp_path: Path, opened: Opener) -> None:
    folder = sharded(tmp_path / "model")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(SourceError, match=re.escape(shard.name)):
        opened(folder, Setting("llama"))


@pytest.mark.parametrize("left", [0, 6, 100, -1])
def test_truncated_shard_is_named(left: int, device: str, tmp_path: Path, opened: Opener) -> None:
    folder = sharded(tmp_path / "model")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:left])
    with pytest.raises(SourceError, match=re.escape(shard.name)):
        opened(folder, Setting("llama"))


def test_shards_of_another_model_are_refused(device: str, tmp_path: Path, opened: Opener) -> None:
    folder = sharded(tmp_path / "model")
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = 6
    config.save_pretrained(folder)
    with pytest.raises(SourceError, match=r"model\.layers\.4\."):
        opened(folder, Setting("llama"))


def test_second_run_on_a_store_is_refused(
    models: Path, device: str, opened: Opener, tmp_path: Path
) -> None:
    folder, store = folder_of(Setting("llama"), models), tmp_path / "shared"
    first = opened(folder, Setting("llama"), store=store)
    optimizer = adamw(first, **HYPER)
    second = opened(folder, Setting("llama"), store=store)
    with pytest.raises(StoreLockedError, match="in use"):
        adamw(second, **HYPER)
    second.close()
    streamed_step(first, optimizer, ids(1, device)[0])  # the first goes on


def test_moving_and_casting_are_refused(models: Path, device: str, opened: Opener) -> None:
    model = opened(folder_of(Setting("llama"), models), Setting("llama"))
    assert model.to(device) is model
    assert model.to(torch.float32) is model
    with pytest.raises(HeadraceError, match=r"dtype=torch\.bfloat16"):
        model.to(torch.bfloat16)
    elsewhere = "meta" if device == "cpu" else "cpu"
    with pytest.raises(HeadraceError, match=f"device='{elsewhere}'"):
        model.to(elsewhere)
    for cast in (model.half, model.bfloat16, model.double):
        with pytest.raises(HeadraceError, match="cast"):
            cast()
    assert model.float() is model


def test_backward_without_an_optimizer_says_so(models: Path, device: str, opened: Opener) -> None:
    for family in ("llama", "qwen2"):
        model = opened(folder_of(Setting(family), models), Setting(family))
        (batch,) = ids(1, device)
        with pytest.raises(ValueError, match="no optimizer is bound"):
            model(input_ids=batch, labels=batch).loss.backward()


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_a_model_closes_with_a_graph_alive(
    place: str, models: Path, device: str, opened: Opener
) -> None:
    model = opened(folder_of(Setting("llama"), models), Setting("llama"), activations=place)
    adamw(model, **HYPER)
    (batch,) = ids(1, device)
    loss = model(input_ids=batch, labels=batch).loss
    model.close()
    with pytest.raises(HeadraceError, match="closed"):
        loss.backward()


def test_a_forgotten_forward_pass_returns_its_memory(
    models: Path, device: str, opened: Opener
) -> None:
    model = opened(folder_of(Setting("llama"), models), Setting("llama"), activations="host")
    optimizer = adamw(model, **HYPER)
    (batch,) = ids(1, device)
    streamed_step(model, optimizer, batch)
    held = model._runtime.engine.host.statistics().by_borrower.get("parked activations", 0)
    assert held == 0
    for _ in range(3):
        model(input_ids=batch, labels=batch)  # the graph is dropped
    streamed_step(model, optimizer, batch)
    assert "parked activations" not in model._runtime.engine.host.statistics().by_borrower


def test_a_placeholder_is_never_a_stale_number(models: Path, device: str, opened: Opener) -> None:
    model = opened(folder_of(Setting("llama"), models), Setting("llama"))
    optimizer = adamw(model, **HYPER)
    streamed_step(model, optimizer, ids(1, device)[0])
    for name, parameter in model.named_parameters():
        assert parameter.isnan().all(), name
        assert parameter.untyped_storage().nbytes() == parameter.element_size()


def test_a_cache_with_gradients_is_refused(models: Path, device: str, opened: Opener) -> None:
    from transformers import DynamicCache

    model = opened(folder_of(Setting("llama"), models), Setting("llama"))
    (batch,) = ids(1, device)
    with pytest.raises(HeadraceError, match="past_key_values"):
        model(input_ids=batch, past_key_values=DynamicCache(config=model.config))
