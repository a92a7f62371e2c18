"""Reading JSONL, labels, rows, held-out split and the order of batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from headrace.data import (
    BatchOrder,
    Document,
    Rows,
    permutation,
    read_jsonl,
    split_held_out,
    tokenize,
)
from headrace.errors import DataError, InputError

# Like templates that drop earlier reasoning: what a message renders to depends on later ones.
REWRITING_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}{% if loop.last %} (last){% endif %}\n"
    "{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
PATH = Path("data.jsonl")
MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


def texts(*items: str) -> list[Document]:
    return [Document(line, text, None) for line, text in enumerate(items, start=1)]


def chat(*turns: tuple[str, str]) -> Document:
    return Document(1, None, tuple({"role": role, "content": said} for role, said in turns))


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


# Reading


def test_texts_and_chats_are_read_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "caf\xc3\xa9", "id": 3}\r\n\n  \n{"text": "two"}')
    assert [(d.line, d.text) for d in read_jsonl(path)] == [(1, "café"), (4, "two")]
    messages = [{"role": "user", "content": "hi", "name": "x"}]
    assert read_jsonl(write(path, {"messages": messages}))[0].messages == tuple(messages)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"text": "a"', "is not JSON"),
        (b"{'text': 'a'}", "is not JSON"),
        (b'{"text": "\xff"}', "is not UTF-8 at byte 11"),
        (b'["text"]', "is a list; give an object"),
        (b"7", "is a number"),
        (b"{}", "neither of 'text' and 'messages'"),
        (b'{"text": "a", "messages": []}', "both of 'text' and 'messages'"),
        (b'{"text": 5}', "'text' is a number"),
        (b'{"text": null}', "'text' is null"),
        (b'{"text": "  "}', "'text' is empty"),
        (b'{"messages": []}', "'messages' is an empty list"),
        (b'{"messages": "hi"}', "'messages' is a string"),
        (b'{"messages": [1]}', "message 0 is a number"),
        (b'{"messages": [{"role": "user"}]}', "message 0: 'content' is missing"),
        (b'{"messages": [{"role": 1, "content": "a"}]}', "message 0: 'role' is a number"),
        (b'{"messages": [{"role": "user", "content": ["a"]}]}', "'content' is a list"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "a file holds one kind"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, raw: bytes, reason: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + raw + b"\n")
    with pytest.raises(DataError) as caught:
        read_jsonl(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ") and reason in message and "\n" not in message


def test_a_file_that_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="Is a directory"):
        read_jsonl(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no line of data"):
        read_jsonl(tmp_path / "empty.jsonl")


# Labels and rows


def test_texts_are_packed_without_losing_or_moving_a_token(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    rows = tokenize(texts("abc", "defgh", "ij"), tokenizer, seq_len=4, path=PATH)
    stream = [token for i in range(len(rows)) for token in rows.row(i)[0]]
    assert tokenizer.decode(stream) == "abc</s>defgh</s>ij"
    assert len(rows) == 3 and rows.num_tokens == 12 and rows.is_label.all()


def test_one_short_text_makes_one_short_row(make_tokenizer: MakeTokenizer) -> None:
    rows = tokenize(texts("abc"), make_tokenizer(), seq_len=64, path=PATH)
    assert (len(rows), rows.num_tokens) == (1, 4)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), seq_len=st.integers(2, 30))
def test_packing_keeps_the_stream(
    lengths: list[int], seq_len: int, make_tokenizer: MakeTokenizer
) -> None:
    tokenizer = make_tokenizer()
    items = [chr(97 + i) * length for i, length in enumerate(lengths)]
    stream = [t for item in items for t in [*tokenizer(item)["input_ids"], 1]]
    rows = tokenize(texts(*items), tokenizer, seq_len=seq_len, path=PATH)
    whole = max(len(stream) // seq_len * seq_len, min(len(stream), seq_len))
    assert rows.ids.tolist() == stream[:whole]


def test_padded_texts_keep_one_row_each_and_are_cut(make_tokenizer: MakeTokenizer) -> None:
    rows = tokenize(texts("abcdefgh", "ij"), make_tokenizer(), seq_len=5, packing="pad", path=PATH)
    batch = rows.batch([0, 1], pad_id=99)
    assert batch["input_ids"].shape == (2, 5)
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch["input_ids"][1, 3:].tolist() == [99, 99]
    assert batch["labels"][1, 3:].tolist() == [-100, -100]
    assert torch.equal(batch["labels"][0], batch["input_ids"][0])


def test_only_the_assistant_is_learnt_and_its_end_of_turn(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    talk = chat(
        ("system", "be kind"),
        ("user", "hi"),
        ("assistant", "hello é"),
        ("user", "bye"),
        ("assistant", "ciao"),
    )
    rows = tokenize([talk], tokenizer, seq_len=500, path=PATH)
    ids, is_label = rows.row(0)
    assert tokenizer.decode(ids[is_label]) == "hello é</s>\nciao</s>\n"
    prompt_and_answer = tokenizer.apply_chat_template(
        list(talk.messages or ()), tokenize=True, return_dict=False
    )
    assert ids.tolist() == prompt_and_answer
    everything = tokenize([talk], tokenizer, seq_len=500, labels="all", path=PATH)
    assert everything.is_label.all() and everything.ids.tolist() == ids.tolist()


def test_a_chat_whose_answer_is_cut_off_leaves_no_row(make_tokenizer: MakeTokenizer) -> None:
    talk = chat(("user", "a long question"), ("assistant", "no"))
    with pytest.raises(DataError, match="no row with a token to learn within 8 tokens"):
        tokenize([talk], make_tokenizer(), seq_len=8, path=PATH)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "no chat template"),
        (REWRITING_TEMPLATE, "message 1 cannot be told apart; use --labels all"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ],
)
def test_a_template_that_cannot_serve_is_refused(
    template: str | None, reason: str, make_tokenizer: MakeTokenizer
) -> None:
    talk = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    with pytest.raises(DataError, match=reason) as caught:
        tokenize([talk], make_tokenizer(template), seq_len=100, path=PATH)
    assert str(caught.value).startswith("data.jsonl:1: ")


def test_all_tokens_of_a_rewriting_template_can_be_learnt(make_tokenizer: MakeTokenizer) -> None:
    talk = chat(("user", "a"), ("assistant", "b"))
    rows = tokenize(
        [talk], make_tokenizer(REWRITING_TEMPLATE), seq_len=100, labels="all", path=PATH
    )
    assert rows.is_label.all()


def test_a_sequence_length_of_one_is_refused(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(InputError, match="sequence length is 1"):
        tokenize(texts("abc"), make_tokenizer(), seq_len=1, path=PATH)


# Held-out split and order


def test_the_split_is_a_partition_that_depends_on_the_seed_only() -> None:
    documents = texts(*(f"text {i}" for i in range(40)))
    train, held = split_held_out(documents, fraction=0.1, seed=3, path=PATH)
    assert (train, held) == split_held_out(documents, fraction=0.1, seed=3, path=PATH)
    assert len(held) == 4
    assert sorted(train + held, key=lambda d: d.line) == documents
    assert held != split_held_out(documents, fraction=0.1, seed=4, path=PATH)[1]


def test_the_split_leaves_one_on_each_side() -> None:
    assert [len(s) for s in split_held_out(texts("a", "b"), fraction=0.01, seed=0, path=PATH)] == [
        1,
        1,
    ]
    assert [len(s) for s in split_held_out(texts("a", "b"), fraction=0.99, seed=0, path=PATH)] == [
        1,
        1,
    ]
    assert split_held_out(texts("a"), fraction=0, seed=0, path=PATH) == (texts("a"), [])
    with pytest.raises(DataError, match="--held-out 0"):
        split_held_out(texts("a"), fraction=0.5, seed=0, path=PATH)


def test_the_shuffle_never_changes() -> None:
    assert permutation(8, seed=0, stream=2).tolist() == [6, 7, 2, 1, 3, 5, 0, 4]
    assert (
        permutation(5, seed=-1, stream=0).tolist()
        == permutation(5, seed=2**64 - 1, stream=0).tolist()
    )


@given(
    num_rows=st.integers(1, 30),
    batch_size=st.integers(1, 30),
    seed=st.integers(0, 2**64 - 1),
    epochs=st.integers(1, 3),
)
def test_every_epoch_sees_every_row_once(
    num_rows: int, batch_size: int, seed: int, epochs: int
) -> None:
    if num_rows < batch_size:
        with pytest.raises(InputError, match="fewer than the batch size"):
            BatchOrder(num_rows=num_rows, batch_size=batch_size, seed=seed)
        return
    order = BatchOrder(num_rows=num_rows, batch_size=batch_size, seed=seed)
    steps = order.num_steps(epochs)
    taken = [row for step in range(steps) for row in order.rows(step)]
    for epoch in range(epochs):
        assert sorted(taken[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))
    assert len(taken) - epochs * num_rows < batch_size


@given(seed=st.integers(0, 1000), step=st.integers(0, 200))
def test_any_step_can_be_the_first_asked_for(seed: int, step: int) -> None:
    walked = BatchOrder(num_rows=7, batch_size=3, seed=seed)
    for earlier in range(step):
        walked.rows(earlier)
    fresh = BatchOrder(num_rows=7, batch_size=3, seed=seed)
    assert walked.rows(step) == fresh.rows(step)


def test_rows_hold_five_bytes_a_token(make_tokenizer: MakeTokenizer) -> None:
    rows = tokenize(texts("a" * 999), make_tokenizer(), seq_len=100, path=PATH)
    assert isinstance(rows, Rows)
    assert rows.ids.dtype == np.int32 and rows.is_label.dtype == np.bool_
    assert rows.ids.nbytes + rows.is_label.nbytes == 5 * rows.num_tokens
