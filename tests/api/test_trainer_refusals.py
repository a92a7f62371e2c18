"""What people do to a model: the streamed one does the right thing, or refuses with the reason."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import headrace
from headrace.offload.errors import HeadraceError
from headrace.optim import adamw
from headrace.optimizer_states import SavedStates


@pytest.fixture
def frozen(harness: Any) -> Any:
    return harness.streamed("none", harness.folder())


@pytest.fixture
def trained(harness: Any) -> Any:
    return harness.streamed("full", harness.folder())


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    ids = torch.arange(16).view(2, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_to_the_same_place_is_fine_and_elsewhere_is_refused(frozen: Any) -> None:
    assert frozen.to("cpu") is frozen
    assert frozen.cpu() is frozen
    assert frozen.float() is frozen
    with pytest.raises(HeadraceError, match="lives on cpu and cannot be moved to cuda"):
        frozen.to("cuda:0")
    with pytest.raises(HeadraceError, match="cannot be moved to cuda"):
        frozen.cuda()
    with pytest.raises(HeadraceError, match="cannot be moved to meta"):
        frozen.to("meta")


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casts_are_refused_through_wrappers_too(harness: Any, cast: str) -> None:
    model = harness.streamed("lora", harness.folder())
    with pytest.raises(HeadraceError, match="cannot be cast"):
        getattr(model, cast)()
    with pytest.raises(HeadraceError, match="cannot be cast"):
        getattr(model.get_base_model(), cast)()
    with pytest.raises(HeadraceError, match="cannot be moved to meta"):
        nn.Sequential(model).to("meta")


def test_resizing_the_vocabulary_is_refused_unless_it_stays(frozen: Any) -> None:
    assert frozen.resize_token_embeddings(258) is frozen.get_input_embeddings()
    with pytest.raises(HeadraceError, match="from 258 to 300 rows"):
        frozen.resize_token_embeddings(300)


def test_a_deep_copy_is_refused(frozen: Any) -> None:
    with pytest.raises(HeadraceError, match=r"call headrace\.load again"):
        copy.deepcopy(frozen)


def test_a_copied_module_is_in_memory_and_has_the_weights(frozen: Any, harness: Any) -> None:
    resident = harness.resident("none", harness.folder())
    hidden = torch.randn(2, 5, 32)
    for name in ("lm_head", "model.norm"):
        copied = copy.deepcopy(frozen.get_submodule(name))
        assert torch.equal(copied(hidden), resident.get_submodule(name)(hidden))
        assert "forward" not in vars(copied)


def test_modules_to_save_are_trained_as_on_the_resident_model(harness: Any) -> None:
    folder = harness.folder()
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    ids = torch.arange(24).view(2, 12)
    found = []
    for model in (harness.resident("none", folder), harness.streamed("none", folder)):
        torch.manual_seed(3)
        adapted = get_peft_model(model, config)
        optimizer = adamw(adapted, lr=1e-2)
        losses = []
        for _ in range(3):
            loss = adapted(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        found.append(losses)
    assert found[0] == found[1]
    assert found[0][2] < found[0][0]


@pytest.mark.parametrize("compiler", [torch.compile, lambda m: m.compile() or m])
def test_compilation_is_refused(frozen: Any, compiler: Any) -> None:
    ids = torch.arange(8).view(1, 8)
    with pytest.raises(HeadraceError, match="cannot be compiled"):
        compiler(frozen)(input_ids=ids)


def test_data_parallel_is_refused(frozen: Any) -> None:
    with pytest.raises(HeadraceError, match="torchrun"):
        frozen._replicate_for_data_parallel()


def test_a_loss_that_reads_the_head_behind_our_back_is_refused(frozen: Any) -> None:
    def fused(input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        hidden = frozen.model(input_ids=input_ids).last_hidden_state
        logits = hidden @ frozen.lm_head.weight.T
        output = frozen.config.__class__()
        output.loss = logits.mean()
        return output

    frozen.forward = fused
    ids = torch.arange(8).view(1, 8)
    with pytest.raises(HeadraceError, match="it read a placeholder"):
        frozen(input_ids=ids, labels=ids)


def test_state_dict_reads_only_what_is_taken(frozen: Any, harness: Any, tmp_path: Path) -> None:
    reads: list[str] = []
    engine = frozen._runtime.engine
    plain = engine.use_host
    engine.use_host = lambda name, phase: reads.append(name) or plain(name, phase)
    state = frozen.state_dict()
    expected = harness.resident("none", harness.folder()).state_dict()
    assert not reads
    assert {n: (t.shape, t.dtype) for n, t in state.items()} == {
        n: (t.shape, t.dtype) for n, t in expected.items()
    }
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(state[name] + 0, expected[name])
    assert reads == ["model.layers.1"]
    # The ordinary ways to write a state dict meet ordinary tensors.
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(torch.equal(loaded[n], expected[n]) for n in expected)
    save_file(dict(state), tmp_path / "state.safetensors")
    loaded = load_file(tmp_path / "state.safetensors")
    assert all(torch.equal(loaded[n], expected[n]) for n in expected)
    other = harness.resident("none", harness.folder())
    nn.init.zeros_(other.model.norm.weight)
    other.load_state_dict(state)
    assert torch.equal(other.model.norm.weight, expected["model.norm.weight"])


def test_adapters_are_saved_without_reading_the_base(harness: Any, tmp_path: Path) -> None:
    model = harness.streamed("lora", harness.folder())
    engine = model.get_base_model()._runtime.engine
    engine.use_host = None  # reading would fail
    model.save_pretrained(tmp_path / "adapters")
    names = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    assert names and all("lora_" in name for name in names)


def test_load_state_dict_before_and_after_the_optimizer(harness: Any) -> None:
    folder = harness.folder()
    source = harness.resident("none", folder)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(1.5)
    state = source.state_dict()
    early = harness.streamed("full", folder)
    result = early.load_state_dict(state)
    assert not result.missing_keys and not result.unexpected_keys
    adamw(early, lr=1e-2)
    late = harness.streamed("full", folder)
    step(late, adamw(late, lr=1e-2))
    late.load_state_dict(state)
    ids = torch.arange(16).view(2, 8)
    source.eval(), early.eval(), late.eval()
    with torch.no_grad():
        expected = source(input_ids=ids).logits
        assert torch.equal(early(input_ids=ids).logits, expected)
        assert torch.equal(late(input_ids=ids).logits, expected)


def test_load_state_dict_says_what_is_wrong(trained: Any, frozen: Any, harness: Any) -> None:
    state = dict(harness.resident("none", harness.folder()).state_dict())
    assert not frozen.load_state_dict(state).missing_keys  # the weights that it has already
    state["model.norm.weight"] = state["model.norm.weight"] + 1
    with pytest.raises(HeadraceError, match="A frozen base is read in place"):
        frozen.load_state_dict(state)
    state["model.norm.weight"] = torch.ones(33)
    with pytest.raises(RuntimeError, match=r"size mismatch for model\.norm\.weight"):
        trained.load_state_dict(state)
    del state["model.norm.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*model\.norm\.weight"):
        trained.load_state_dict(state)
    assert trained.load_state_dict(state, strict=False).missing_keys == ["model.norm.weight"]


def test_an_optimizer_state_that_was_left_behind_is_refused(trained: Any, tmp_path: Path) -> None:
    optimizer = adamw(trained, lr=1e-2)
    step(trained, optimizer)
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)  # nothing has changed since
    step(trained, optimizer)
    with pytest.raises(HeadraceError, match="have changed since"):
        optimizer.load_state_dict(state)
    trained.save_pretrained(tmp_path / "checkpoint-2")
    state = optimizer.state_dict()
    step(trained, optimizer)
    (tmp_path / "checkpoint-2").rename(tmp_path / "moved")
    with pytest.raises(HeadraceError, match="Put the checkpoint back"):
        optimizer.load_state_dict(state)


def test_a_checkpoint_moves_with_its_project(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    monkeypatch.chdir(old)
    optimizer = adamw(trained, lr=1e-2)
    step(trained, optimizer)
    trained.save_pretrained("out/checkpoint-1")
    state = optimizer.state_dict()
    step(trained, optimizer)
    old.rename(new)
    monkeypatch.chdir(new)
    optimizer.load_state_dict(state)
    assert headrace.statistics(trained).steps == 1
    step(trained, optimizer)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HeadraceError, match="Put the checkpoint back"):
        optimizer.load_state_dict(state)


def test_a_checkpoint_of_one_rank_of_several_says_what_it_lacks(
    trained: Any, tmp_path: Path
) -> None:
    optimizer = adamw(trained, lr=1e-2)
    step(trained, optimizer)
    saved = SavedStates(headrace.runtime_of(trained), rank_count=2)
    saved.model_was_saved(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.warns(UserWarning, match="divided among 2 ranks"):
        state = saved.state_dict()
    assert not any((tmp_path / "checkpoint-1").iterdir())
    assert not saved.load_state_dict(state)  # nothing has changed since
    step(trained, optimizer)
    with pytest.raises(HeadraceError, match="divided among 2 ranks"):
        saved.load_state_dict(state)


def test_states_return_to_what_a_checkpoint_had(trained: Any, tmp_path: Path) -> None:
    optimizer = adamw(trained, lr=1e-2)
    trained.save_pretrained(tmp_path / "checkpoint-0")
    before = optimizer.state_dict()
    weights = {n: t.clone() for n, t in trained.state_dict().items()}

    def two_steps() -> dict[str, torch.Tensor]:
        step(trained, optimizer)
        step(trained, optimizer)
        return {n: t.clone() for n, t in trained.state_dict().items()}

    first = two_steps()
    trained.load_state_dict(weights)
    optimizer.load_state_dict(before)
    second = two_steps()
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_save_pretrained_streams_into_a_used_folder(trained: Any, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    (folder / "notes.txt").write_text("mine")
    trained.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "notes.txt",
    ]
    opened = AutoModelForCausalLM.from_pretrained(folder)
    state = trained.state_dict()
    assert all(torch.equal(state[n] + 0, t) for n, t in opened.state_dict().items())
    again = headrace.load(folder, train="none", device="cpu", host_budget="6MB")
    again.close()


def test_push_to_hub_uploads_real_weights(
    trained: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pushed: list[set[str]] = []
    kind = type(trained)

    def upload(self: Any, working_dir: str, *args: Any, **kwargs: Any) -> None:
        tensors = load_file(Path(working_dir) / "model.safetensors")
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
        pushed.append(set(tensors))

    class Hub:
        repo_id = "me/model"

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: self

    monkeypatch.setattr(kind, "_upload_modified_files", upload)
    import transformers.utils.hub as hub

    for name in ("create_repo", "hf_api", "create_branch"):
        if name in vars(hub):
            monkeypatch.setattr(hub, name, lambda *args, **kwargs: Hub())
    card = type("Card", (), {"save": lambda self, path: None})
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: card())
    trained.push_to_hub("me/model")
    assert pushed and pushed[0] == set(trained.state_dict())
