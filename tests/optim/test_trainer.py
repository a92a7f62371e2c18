"""Every recipe in the stock Trainer and SFTTrainer: accumulation, clipping, a scheduler, resuming.

The model is plain and resident: what is proved is that recipes are drop-in optimizers.
"""

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from headrace import optim

SETTINGS = {
    "adamw": {},
    "adamw_8bit": {},
    "adamw_4bit": {},
    "adamw_fp8": {},
    "stable_adamw": {},
    "adam_mini": {},
    "lion": {},
    "lion_8bit": {},
    "adafactor": {},
    "sgd": {"lr": 0.5, "momentum": 0.9},
    "sign_sgd": {},
    "galore_adamw": {"rank": 8, "update_proj_gap": 2},
    "galore_adamw_8bit": {"rank": 8, "update_proj_gap": 2},
    "q_galore": {"rank": 8, "update_proj_gap": 2},
    "natural_galore": {"rank": 8, "update_proj_gap": 3, "natural_history": 2},
    "apollo": {"rank": 8, "update_proj_gap": 2},
    "apollo_mini": {"update_proj_gap": 2},
    "grass": {"rank": 8, "update_proj_gap": 2},
    "frugal": {"update_gap": 3},
    "fira": {"rank": 8, "update_proj_gap": 2},
}


class Tokens(Dataset):
    """Sixteen fixed sequences."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randint(0, 97, (16, 12), generator=generator)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=80, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).bfloat16()


COMMON = {
    "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "lr_scheduler_type": "cosine",
    "logging_steps": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 1,
}  # fmt: skip


def plain_trainer(model, folder, **kwargs):
    arguments = TrainingArguments(output_dir=str(folder), **COMMON)
    return Trainer(model=model, args=arguments, train_dataset=Tokens(), **kwargs)


def sft_trainer(model, folder, **kwargs):
    words = {f"w{i}": i for i in range(95)} | {"<pad>": 95, "<eos>": 96}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    texts = [" ".join(f"w{int(i) % 95}" for i in row) for row in Tokens().rows]
    arguments = SFTConfig(output_dir=str(folder), bf16=False, max_length=16, **COMMON)
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
        ),
        **kwargs,
    )


def test_the_table_has_every_recipe():
    helpers = {"memory", "for_trainer", "attach_loqt", "detach_loqt", "lora_pairs"}
    helpers |= {"attach_int8", "detach_int8"}
    recipes = {name for name in optim.__all__ if name[0].islower()} - helpers
    assert recipes == set(SETTINGS)


@pytest.mark.parametrize("trainer_of", [plain_trainer, sft_trainer])
@pytest.mark.parametrize("name", SETTINGS)
def test_recipe_trains_and_resumes(name, trainer_of, tmp_path):
    recipe, settings = getattr(optim, name), {"lr": 2e-3, "weight_decay": 0.01, **SETTINGS[name]}
    model = tiny_llama()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = recipe(model, **settings)
    trainer = trainer_of(model, tmp_path, optimizers=(optimizer, None))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(logs) == 4
    assert all(entry["grad_norm"] > 0 for entry in logs)
    assert logs[-1]["learning_rate"] < logs[0]["learning_rate"]
    assert {int(optimizer.state[p]["step"]) for p in model.parameters()} == {4}
    assert all(not torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))

    again = tiny_llama()
    resumed = trainer_of(
        again, tmp_path, optimizer_cls_and_kwargs=optim.for_trainer(recipe, **settings)
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (key, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), key


def test_weight_decay_betas_and_eps_reach_projected_matrices():
    """The Trainer's own GaLore ignores all three."""
    for change in ({"weight_decay": 0.5}, {"betas": (0.5, 0.5)}, {"eps": 1.0}):
        kept = []
        for settings in ({}, change):
            model = tiny_llama()
            optimizer = optim.galore_adamw(model, lr=1e-2, rank=8, **settings)
            for step in range(2):
                generator = torch.Generator().manual_seed(step)
                for p in model.parameters():
                    p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
                optimizer.step()
            kept.append(model.model.layers[0].mlp.up_proj.weight)
        assert not torch.equal(*kept), change


def q_galore_int8(model, **settings):
    optim.attach_int8(model, optim.Int8Settings(rank=8, update_proj_gap=2, weight_group_size=32))
    optimizer = optim.adamw_8bit(model, **settings)
    optim.Int8Updates(model, optimizer)
    return optimizer


def test_int8_weights_train_and_resume(tmp_path):
    """Accumulation, clipping, a schedule, saving; the resumed run rebuilds model and optimizer."""
    model = tiny_llama()
    optimizer = q_galore_int8(model, lr=2e-3, weight_decay=0.01)
    layer = model.model.layers[0].mlp.up_proj
    start = layer.whole_weight()
    trainer = plain_trainer(model, tmp_path, optimizers=(optimizer, None))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(logs) == 4 and all(entry["grad_norm"] > 0 for entry in logs)
    assert int(layer.steps) == 4 and not torch.equal(layer.whole_weight(), start)
    again = tiny_llama()
    optimizer = q_galore_int8(again, lr=2e-3, weight_decay=0.01)
    resumed = plain_trainer(again, tmp_path, optimizers=(optimizer, None))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (key, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    optim.detach_int8(again)
    kinds = {type(m) for m in again.modules()}
    assert torch.nn.Linear in kinds and type(layer) not in kinds


def test_the_trainer_builds_the_optimizer_of_int8_weights(tmp_path):
    model, made = tiny_llama(), optim.for_trainer(q_galore_int8, lr=2e-3)
    plain_trainer(model, tmp_path, optimizer_cls_and_kwargs=made).train()
    assert int(model.model.layers[0].mlp.up_proj.steps) == 4
