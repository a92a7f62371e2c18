"""A tiny tokenizer and a tiny model folder for the tests of the package's face."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import headrace
from headrace.optim import adamw

CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def byte_tokenizer(template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: one token a byte, and two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Makes the tokenizer, with the chat template given (None for none)."""
    return byte_tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four layers in bf16, in three shards, with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="150KB")
    byte_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


class TrainerHarness:
    """Runs one trainer on a resident and on a streamed model, and compares all it logged.

    Five steps: accumulation 2, clipping 0.5, cosine schedule, one evaluation, a checkpoint after
    the third step from which a fresh model resumes.
    """

    def __init__(self, root: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.root, self.tokenizer = root, tokenizer
        self.closing = ExitStack()
        self._count = 0

    def folder(self, *, rewards: bool = False, tied: bool = False) -> Path:
        """A tiny Llama in fp32: a causal LM, or a sequence classifier with one label."""
        target = self.root / f"model-{rewards}-{tied}"
        if not target.exists():
            torch.manual_seed(7)
            config = LlamaConfig(
                vocab_size=258,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
                num_labels=1,
                tie_word_embeddings=tied,
            )
            kind = AutoModelForSequenceClassification if rewards else AutoModelForCausalLM
            kind.from_config(config).save_pretrained(target)
            self.tokenizer.save_pretrained(target)
        return target

    def resident(self, method: str, folder: Path, *, rewards: bool = False) -> Any:
        """The model in memory."""
        kind = AutoModelForSequenceClassification if rewards else AutoModelForCausalLM
        return self.adapted(kind.from_pretrained(folder), method)

    def streamed(self, method: str, folder: Path, *, rewards: bool = False, **options: Any) -> Any:
        """The model streamed, with a fresh store."""
        self._count += 1
        settings: dict[str, Any] = {
            "train": "all" if method == "full" else "adapters",
            "device": "cpu",
            "device_budget": "2MB",
            "host_budget": "6MB",
            "store": self.root / f"store-{self._count}",
            "auto_class": AutoModelForSequenceClassification if rewards else AutoModelForCausalLM,
            **options,
        }
        model = headrace.load(folder, **settings)
        self.closing.callback(model.close)
        return self.adapted(model, method)

    def adapted(self, model: Any, method: str) -> Any:
        """LoRA adapters with reproducible initial values on top, for method "lora"."""
        if method != "lora":
            return model
        torch.manual_seed(3)
        kind = "SEQ_CLS" if type(model).__name__.endswith("SequenceClassification") else "CAUSAL_LM"
        return get_peft_model(
            model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=kind)
        )

    def options(self, **changes: Any) -> dict[str, Any]:
        """What every TrainingArguments of the comparison has."""
        self._count += 1
        return {
            "output_dir": str(self.root / f"out-{self._count}"),
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 5,
            "lr_scheduler_type": "cosine",
            "learning_rate": 1e-2,
            "max_grad_norm": 0.5,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "seed": 1,
            **changes,
        }

    def texts(self, count: int = 24) -> list[str]:
        """Short lines of different lengths."""
        return [f"line {i} says {'lo' * (i % 7)}ng words about {i * i}" for i in range(count)]

    def compare(
        self,
        make: Callable[..., Any],
        method: str,
        *,
        folder: Path | None = None,
        rewards: bool = False,
    ) -> tuple[Any, Any]:
        """Assert that ``make(model, optimizer, **options)`` trains alike; (resident, resumed)."""
        source = folder or self.folder(rewards=rewards)

        def run(model: Any, resume: str | None = None, **changes: Any) -> Any:
            torch.manual_seed(11)
            trainer = make(model, adamw(model, lr=1e-2), **self.options(**changes))
            trainer.train(resume_from_checkpoint=resume)
            return trainer

        resident = run(self.resident(method, source, rewards=rewards))
        saving = {"save_strategy": "steps", "save_steps": 3}
        streamed = run(self.streamed(method, source, rewards=rewards), **saving)
        assert history(streamed) == history(resident)
        assert any("eval_loss" in entry for entry in history(streamed))
        checkpoint = str(Path(streamed.args.output_dir) / "checkpoint-3")
        resumed = run(self.streamed(method, source, rewards=rewards), resume=checkpoint, **saving)
        # TRL counts tokens from the resume on, with any model.
        assert history(resumed, "num_tokens") == history(resident, "num_tokens")
        expected, found = weights(resident.model), weights(resumed.model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        return resident, resumed


def history(trainer: Any, *without: str) -> list[dict[str, Any]]:
    """All that was logged, but for what a clock says (and ``without``)."""
    timed = ("runtime", "per_second", "step_time", "train_loss", *without)
    return [
        {k: v for k, v in entry.items() if not any(word in k for word in timed)}
        for entry in trainer.state.log_history
    ]


def weights(model: Any) -> dict[str, Tensor]:
    """Every weight, as an ordinary tensor."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def harness(tmp_path: Path, device: str) -> Iterator[TrainerHarness]:
    """Compares trainers on the CPU."""
    if device != "cpu":
        pytest.skip("the comparison is made on the CPU")
    made = TrainerHarness(tmp_path, byte_tokenizer())
    with made.closing:
        yield made
