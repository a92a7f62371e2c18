"""Text and chats from JSONL files, tokenised into rows of at most one sequence length.

A line is ``{"text": "..."}`` or ``{"messages": [{"role": "user", "content": "..."}, ...]}``; a
file holds one kind.  Every line is read and checked before anything is trained, and a bad one is
refused by file and line number.  Tokens are kept in host memory outside the budgets: 5 bytes a
token (int32 id, bool label).

Labels.  Every token of a text is a label.  Of a chat, by default (``labels="assistant"``), only
what the assistant says is one, its end-of-turn tokens included: those are the tokens that the
model writes in use.  ``labels="all"`` makes every token of the chat a label.

Rows.  ``packing="pack"`` (the default for texts) joins documents, each closed by the
end-of-text token, and cuts the stream every ``seq_len`` tokens; a last piece that is shorter is
dropped unless it is the only one.  ``packing="pad"`` (the default for chats) makes each document
a row of its own, cut at ``seq_len`` and padded on the right within its batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from .errors import DataError, InputError
from .options import Labels, Packing

IGNORED_LABEL = -100


@dataclass(frozen=True, slots=True)
class Document:
    """One line of a data file: a text, or the messages of a chat."""

    line: int
    text: str | None
    messages: tuple[dict[str, Any], ...] | None


def read_jsonl(path: Path) -> list[Document]:
    """Read every document of a JSONL file; blank lines are allowed, everything else is checked.

    Raises ``DataError`` with the file, the line and the reason.
    """
    try:
        raw_lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(path, None, f"cannot be read: {error.strerror or error}") from error
    documents: list[Document] = []
    for line, raw in enumerate(raw_lines, start=1):
        if not raw.strip():
            continue
        document = _parse_line(path, line, raw)
        if documents and (documents[0].text is None) != (document.text is None):
            first = "text" if documents[0].text is not None else "messages"
            raise DataError(path, line, f"the lines before have {first!r}; a file holds one kind")
        documents.append(document)
    if not documents:
        raise DataError(
            path, None, "holds no line of data; give JSON lines with 'text' or 'messages'"
        )
    return documents


def _parse_line(path: Path, line: int, raw: bytes) -> Document:
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(path, line, f"is not UTF-8 at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise DataError(path, line, f"is not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise DataError(path, line, "is not usable JSON: nested too deeply") from error
    if not isinstance(record, dict):
        raise DataError(path, line, f"is {_kind(record)}; give an object with 'text' or 'messages'")
    if ("text" in record) == ("messages" in record):
        have = "both" if "text" in record else "neither"
        raise DataError(path, line, f"has {have} of 'text' and 'messages'; give one of them")
    if "text" in record:
        text = record["text"]
        if not isinstance(text, str):
            raise DataError(path, line, f"'text' is {_kind(text)}; give a string")
        if not text.strip():
            raise DataError(path, line, "'text' is empty; remove the line")
        return Document(line, text, None)
    return Document(line, None, _parse_messages(path, line, record["messages"]))


def _parse_messages(path: Path, line: int, messages: object) -> tuple[dict[str, Any], ...]:
    if not isinstance(messages, list) or not messages:
        raise DataError(path, line, f"'messages' is {_kind(messages)}; give a list of messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DataError(path, line, f"message {index} is {_kind(message)}; give an object")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = _kind(message[key]) if key in message else "missing"
                raise DataError(path, line, f"message {index}: {key!r} is {found}; give a string")
    return tuple(messages)


def _kind(value: object) -> str:
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    names = {dict: "an object", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


@final
class Rows:
    """Rows of token ids with a mark on each token that is a label; immutable.

    ``ids`` (int32) and ``is_label`` (bool) are flat; row ``i`` is ``starts[i]:starts[i + 1]``.
    """

    __slots__ = ("ids", "is_label", "starts")

    def __init__(
        self, ids: NDArray[np.int32], is_label: NDArray[np.bool_], starts: NDArray[np.int64]
    ) -> None:
        self.ids = ids
        self.is_label = is_label
        self.starts = starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return the token ids and label marks of one row."""
        cut = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return self.ids[cut], self.is_label[cut]

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, without padding."""
        return int(self.starts[-1])

    def digest(self) -> str:
        """Return a digest of all rows, to tell that a run goes on with the same ones."""
        digest = xxhash.xxh3_128()
        for array in (self.ids, self.is_label, self.starts):
            digest.update(array.data.cast("B"))
        return digest.hexdigest()

    def batch(self, indices: Sequence[int], *, pad_id: int) -> dict[str, torch.Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels``, (rows, longest row), int64.

        Rows shorter than the longest are padded on the right; padding is masked and no label.
        """
        rows = [self.row(index) for index in indices]
        width = max(len(ids) for ids, _ in rows)
        input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.int64)
        labels = torch.full((len(rows), width), IGNORED_LABEL, dtype=torch.int64)
        for place, (ids, is_label) in enumerate(rows):
            values = torch.from_numpy(ids.astype(np.int64))
            input_ids[place, : len(ids)] = values
            attention_mask[place, : len(ids)] = 1
            labels[place, : len(ids)] = values.masked_fill(
                ~torch.from_numpy(is_label.copy()), IGNORED_LABEL
            )
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def split_held_out(
    documents: Sequence[Document], *, fraction: float, seed: int, path: Path
) -> tuple[list[Document], list[Document]]:
    """Split documents into (training, held out); which are held out depends on the seed only.

    At least one document is held out when ``fraction`` is above 0, and at least one is left.
    """
    if fraction == 0:
        return list(documents), []
    if len(documents) < 2:
        raise DataError(
            path,
            None,
            "has one document, so none can be held out; give --eval-data FILE, or --held-out 0",
        )
    count = min(max(1, round(len(documents) * fraction)), len(documents) - 1)
    held = {int(i) for i in permutation(len(documents), seed=seed, stream=1)[:count]}
    train = [document for i, document in enumerate(documents) if i not in held]
    return train, [documents[i] for i in sorted(held)]


def tokenize(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    labels: Labels = "assistant",
    packing: Packing | None = None,
    path: Path,
) -> Rows:
    """Turn documents into rows of at most ``seq_len`` tokens, as this module's first lines say.

    ``path`` names the file in errors.  Rows without any label after the cut are left out; if
    none is left, a ``DataError`` says so.
    """
    if seq_len < 2:
        raise InputError(f"the sequence length is {seq_len}; give 2 or more tokens")
    is_chat = documents[0].messages is not None
    if is_chat and not tokenizer.chat_template:
        raise DataError(
            path,
            documents[0].line,
            "has 'messages', but the model's tokenizer has no chat template; give 'text' lines, "
            "or the instruction-tuned model of this family",
        )
    encode = _encode_chat if is_chat else _encode_text
    encoded = (encode(document, tokenizer, labels, path) for document in documents)
    if (packing or ("pad" if is_chat else "pack")) == "pack":
        rows = list(_pack(encoded, seq_len))
    else:
        rows = [(ids[:seq_len], marks[:seq_len]) for ids, marks in encoded]
    # The first token of a row is predicted from nothing: a label there is never learnt.
    rows = [(ids, marks) for ids, marks in rows if marks[1:].any()]
    if not rows:
        raise DataError(path, None, f"leaves no row with a token to learn within {seq_len} tokens")
    starts = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(ids) for ids, _ in rows], out=starts[1:])
    return Rows(
        np.concatenate([ids for ids, _ in rows]),
        np.concatenate([marks for _, marks in rows]),
        starts,
    )


Encoded = tuple[NDArray[np.int32], NDArray[np.bool_]]


def _encode_text(
    document: Document, tokenizer: PreTrainedTokenizerBase, labels: Labels, path: Path
) -> Encoded:
    assert document.text is not None
    ids = list(tokenizer(document.text, verbose=False)["input_ids"])
    if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
        ids.append(tokenizer.eos_token_id)
    return np.asarray(ids, dtype=np.int32), np.ones(len(ids), dtype=np.bool_)


def _encode_chat(
    document: Document, tokenizer: PreTrainedTokenizerBase, labels: Labels, path: Path
) -> Encoded:
    assert document.messages is not None
    messages = list(document.messages)
    text = _render(messages, tokenizer, document.line, path)
    if labels == "all":
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray(ids, dtype=np.int32), np.ones(len(ids), dtype=np.bool_)
    if not tokenizer.is_fast:
        raise DataError(
            path,
            document.line,
            "the tokenizer gives no character offsets, so the assistant's tokens cannot be told "
            "apart; use --labels all",
        )
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:index], tokenizer, document.line, path, prompt=True)
        until = _render(messages[: index + 1], tokenizer, document.line, path)
        if not (until.startswith(before) and text.startswith(until)):
            raise DataError(
                path,
                document.line,
                f"the chat template rewrites earlier messages, so the tokens of message {index} "
                "cannot be told apart; use --labels all",
            )
        spans.append((len(before), len(until)))
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.asarray(encoding["input_ids"], dtype=np.int32)
    offsets = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    marks = np.zeros(len(ids), dtype=np.bool_)
    for start, end in spans:
        marks |= (offsets[:, 0] >= start) & (offsets[:, 0] < end)
    return ids, marks


def _render(
    messages: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    line: int,
    path: Path,
    *,
    prompt: bool = False,
) -> str:
    """The chat as text; with ``prompt``, up to where the assistant's next words begin."""
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(path, line, f"the tokenizer's chat template refuses it: {error}") from error
    assert isinstance(text, str)
    return text


def _pack(encoded: Iterator[Encoded], seq_len: int) -> Iterator[Encoded]:
    pending: list[Encoded] = []
    held, count = 0, 0
    for document in encoded:
        pending.append(document)
        held += len(document[0])
        if held < seq_len:
            continue
        ids = np.concatenate([ids for ids, _ in pending])
        marks = np.concatenate([marks for _, marks in pending])
        whole = held - held % seq_len
        for start in range(0, whole, seq_len):
            yield ids[start : start + seq_len], marks[start : start + seq_len]
            count += 1
        pending, held = [(ids[whole:], marks[whole:])], held - whole
    if not count and held:
        yield (
            np.concatenate([ids for ids, _ in pending]),
            np.concatenate([marks for _, marks in pending]),
        )


def permutation(count: int, *, seed: int, stream: int) -> NDArray[np.int64]:
    """Return a shuffle of ``range(count)`` that is the same on every machine and numpy.

    It sorts the raw words of a Philox bit generator, whose stream numpy keeps unchanged (its
    ``permutation`` may change between releases); ``stream`` tells uses of one seed apart.
    """
    key = np.array([seed % 2**64, stream], dtype=np.uint64)
    words = np.random.Philox(key=key).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64)


@final
class BatchOrder:
    """Which rows each step takes: epochs of fresh shuffles, joined, cut into full batches.

    The rows of a step are a pure function of (number of rows, batch size, seed, step), so the
    step counter is the whole position: a resumed run goes on exactly where it stopped.

    >>> order = BatchOrder(num_rows=3, batch_size=2, seed=0)
    >>> sorted(order.rows(0) + order.rows(1)[:1])
    [0, 1, 2]
    >>> order.rows(7) == BatchOrder(num_rows=3, batch_size=2, seed=0).rows(7)
    True
    """

    def __init__(self, *, num_rows: int, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise InputError(f"the batch size is {batch_size}; give 1 or more rows")
        if num_rows < batch_size:
            raise InputError(
                f"the data makes {num_rows} rows, fewer than the batch size {batch_size}; "
                f"lower --batch-size or --seq-len, or give more data"
            )
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self._epoch = -1
        self._shuffle: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def rows(self, step: int) -> list[int]:
        """Return the row numbers of a step; steps count from 0."""
        first = step * self.batch_size
        return [self._row(place) for place in range(first, first + self.batch_size)]

    def num_steps(self, epochs: float) -> int:
        """Return the steps after which every row was seen ``epochs`` times."""
        return max(1, -(-round(self.num_rows * epochs) // self.batch_size))

    def _row(self, place: int) -> int:
        epoch, index = divmod(place, self.num_rows)
        if epoch != self._epoch:
            # Streams 0 and 1 belong to other uses of the seed.
            self._shuffle = permutation(self.num_rows, seed=self.seed, stream=epoch + 2)
            self._epoch = epoch
        return int(self._shuffle[index])
