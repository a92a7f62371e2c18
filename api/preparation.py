"""What a fine-tuning run reads before it opens the model: data, tokenizer, order of the rows.

Everything here is checked and refused in one line; nothing is written, and no weights are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch

from .data import BatchOrder, Document, Rows, read_jsonl, split_held_out, tokenize
from .errors import InputError
from .options import TuneOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@final
@dataclass(frozen=True, slots=True)
class Material:
    """Everything read and checked before the model is opened."""

    tokenizer: PreTrainedTokenizerBase
    train: Rows
    held_out: Rows | None
    prompt: str
    prompt_is_rendered: bool  # a chat template has already put the special tokens in
    order: BatchOrder
    steps: int

    @property
    def pad_id(self) -> int:
        """The id that fills short rows: masked everywhere, so that any valid id serves."""
        for candidate in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if isinstance(candidate, int):
                return candidate
        return 0

    def batch(self, rows: Rows, chosen: list[int], device: torch.device) -> dict[str, torch.Tensor]:
        """Return the arguments of the model's call for these rows, on its device."""
        tensors = rows.batch(chosen, pad_id=self.pad_id)
        return {name: tensor.to(device) for name, tensor in tensors.items()}


def prepare(options: TuneOptions) -> Material:
    """Read and check the data and the tokenizer of a run."""
    _check_device(options.device)
    documents = read_jsonl(options.data)
    if options.eval_data is None:
        train_documents, held_documents = split_held_out(
            documents, fraction=options.held_out, seed=options.seed, path=options.data
        )
    else:
        train_documents, held_documents = documents, read_jsonl(options.eval_data)
    tokenizer = load_tokenizer(options.model)

    def rows(chosen: list[Document], path: Path) -> Rows:
        return tokenize(
            chosen,
            tokenizer,
            seq_len=options.seq_len,
            labels=options.labels,
            packing=options.packing,
            path=path,
        )

    train = rows(train_documents, options.data)
    held_out = rows(held_documents, options.eval_data or options.data) if held_documents else None
    order = BatchOrder(num_rows=len(train), batch_size=options.batch_size, seed=options.seed)
    steps = options.steps or order.num_steps(1.0 if options.epochs is None else options.epochs)
    shown = (held_documents or train_documents)[0]
    rendered = options.prompt is None and shown.messages is not None
    prompt = options.prompt or _prompt_of(shown, tokenizer)
    return Material(tokenizer, train, held_out, prompt, rendered, order, steps)


def _check_device(device: str | None) -> None:
    if device is None or device == "cpu":
        return
    index = torch.device(device).index or 0
    count = torch.cuda.device_count()
    if index >= count:
        raise InputError(f"--device is {device}, but torch finds {count} CUDA devices here")


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or hub id; what is wrong with it is said in one line."""
    from transformers import AutoTokenizer

    from .loading import find_folder

    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    path = Path(model).expanduser()
    if looks_local and not path.is_dir():
        raise InputError(f"--model {model}: no such folder")
    folder = find_folder(model)
    is_adapter = (folder / "adapter_config.json").is_file()
    if not is_adapter and not (folder / "config.json").is_file():
        raise InputError(f"--model {model}: {folder / 'config.json'} is missing")
    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, ImportError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise InputError(
            f"--model {model}: its tokenizer cannot be loaded: {first_line}"
        ) from error


def _prompt_of(document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    """The opening words of a text, or a chat up to the assistant's first answer."""
    if document.text is not None:
        words = document.text.split()[:12]
        return " ".join(words)
    assert document.messages is not None
    asked = []
    for message in document.messages:
        if message["role"] == "assistant":
            break
        asked.append(message)
    rendered = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert isinstance(rendered, str)
    return rendered
