"""The models of ``formats.py``: a real one, one trained here, and their encodings.

Text, the counting of inputs, GPTQ and EoRA, adapters.  What takes long (calibrated codes and
their corrections) is kept in a folder if there is one.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from headrace.demo import demo_data, demo_model
from headrace.progress import Silent
from headrace.quant import Codec, codec_for_format
from headrace.quant.blocks import BlockCodec
from headrace.quant.calibrated import WORDS_WITHOUT_DATA, calibrated_codec, encode_calibrated
from headrace.quant.eora import eora
from headrace.quant.gptq import InputMoments, gptq, output_error
from headrace.quant.linear import EncodedLinear
from headrace.quant.nf4 import Nf4Codec

EORA_RANK = 64  # of the corrections that are fine-tuned, and of all LoRA adapters
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BASELINE = "bf16"
CALIBRATED = "gptq nf4"
#: The layers of a block that share their input with a layer listed here are not counted again.
INPUT_OF = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


class Subject:
    """A model, and its encodings as they are asked for; the last two are kept."""

    def __init__(
        self, model: nn.Module, held_out: Tensor, calibration: Tensor, work: Path | None = None
    ) -> None:
        self.model, self.held_out = model, held_out
        self._calibration, self._work = calibration, work
        self._moments: dict[str, Tensor] = {}
        self._made: dict[str, nn.Module] = {}

    def forget(self, word: str) -> None:
        """Drop an encoding: its adapters have been trained, or memory is short."""
        self._made.pop(word, None)

    def moments(self) -> Mapping[str, Tensor]:
        """Second moments of every layer's inputs, counted once."""
        if not self._moments:
            self._moments = count_inputs(self.model, self._calibration)
        return self._moments

    def encoded(self, word: str) -> nn.Module:
        """The model in a format; a corrected one has adapters and decoded weights."""
        if word == BASELINE:
            return self.model
        if word not in self._made:
            self._made[word] = self._make(word)
            for old in list(self._made)[:-2]:
                del self._made[old]
        return self._made[word]

    def _make(self, word: str) -> nn.Module:
        plain, corrected, rank = word.partition(" + eora ")
        if corrected:
            factors = self._kept("eora.pt", self._corrections)
            return corrected_model(decoded(self.encoded(plain)), factors, int(rank))
        codec = codec_of(word)
        assert codec is not None
        if word in WORDS_WITHOUT_DATA:
            return replace_linears(
                self.model,
                lambda name, linear: encoded(
                    linear, codec, encode_calibrated(linear.weight, None, codec).parts
                ),
            )
        if word != CALIBRATED:
            return replace_linears(
                self.model, lambda name, linear: EncodedLinear.from_linear(linear, codec)
            )
        parts = self._kept("gptq.pt", lambda: self._calibrated(codec))
        return replace_linears(self.model, lambda name, linear: encoded(linear, codec, parts[name]))

    def _kept(
        self, name: str, make: Callable[[], dict[str, dict[str, Tensor]]]
    ) -> dict[str, dict[str, Tensor]]:
        """Make what takes long, or take it from the work folder."""
        if self._work is None:
            return make()
        path = self._work / name
        if not path.is_file():
            torch.save(make(), path)
        loaded: dict[str, dict[str, Tensor]] = torch.load(path)
        return loaded

    def _calibrated(self, codec: BlockCodec) -> dict[str, dict[str, Tensor]]:
        moments = self.moments()
        return {
            name: gptq(linear.weight, moments[name], codec).parts
            for name, linear in decoder_linears(self.model).items()
        }

    def _corrections(self) -> dict[str, dict[str, Tensor]]:
        """EoRA's factors of every layer, the most important directions first."""
        moments, base = self.moments(), self.encoded(CALIBRATED)
        made = {}
        for name, linear in decoder_linears(self.model).items():
            weight = base.get_submodule(name).weight.decode()
            a, b = eora(linear.weight, weight, moments[name], rank=EORA_RANK)
            before = output_error(linear.weight, weight, moments[name])
            after = output_error(linear.weight, weight + b @ a, moments[name])
            assert after <= before * 1.001, f"{name}: the correction must not hurt"
            made[name] = {"A": a, "B": b}
        return made


def tokens(length: int, *counts: int) -> list[Tensor]:
    """Return disjoint (count, length) pieces of the text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model(Silent()))
    lines = demo_data().read_text(encoding="utf-8").splitlines()
    text = "\n\n".join(json.loads(line)["text"] for line in lines)
    ids = torch.tensor(tokenizer(text).input_ids)
    needed = sum(counts) * length
    if ids.numel() < needed:
        raise SystemExit(f"the text has {ids.numel()} tokens; {needed} are needed")
    # Spread the pieces over the whole text, so that all parts are alike.
    pieces = ids[: ids.numel() // length * length].view(-1, length)
    order = torch.randperm(pieces.shape[0], generator=torch.Generator().manual_seed(1))
    return list(pieces[order[: sum(counts)]].split(list(counts)))


def load_model() -> nn.Module:
    """Return the demo model in fp32."""
    from transformers import AutoModelForCausalLM

    folder = demo_model(Silent())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers inside the decoder layers, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }


def replace_linears(model: nn.Module, make: Callable[[str, nn.Linear], nn.Module]) -> nn.Module:
    """Return a model with every decoder linear replaced; other parameters are shared."""
    shared = {id(p): p for p in model.parameters()}
    made = copy.deepcopy(model, dict(shared))
    for name, linear in decoder_linears(model).items():
        parent, _, leaf = name.rpartition(".")
        setattr(made.get_submodule(parent), leaf, make(name, linear))
    return made.requires_grad_(False)


@torch.no_grad()
def mean_loss(model: nn.Module, pieces: Tensor) -> float:
    """Return the mean next-token loss in nats."""
    total = 0.0
    for batch in pieces.split(4):
        logits = model(input_ids=batch).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1), reduction="sum"
        )
        total += loss.double().item()
    return total / (pieces.shape[0] * (pieces.shape[1] - 1))


@torch.no_grad()
def count_inputs(model: nn.Module, pieces: Tensor) -> dict[str, Tensor]:
    """Return E[x xᵀ] of each decoder linear's inputs, shared where layers share them."""
    linears = decoder_linears(model)
    counters = {
        name: InputMoments(linear.in_features)
        for name, linear in linears.items()
        if name.rpartition(".")[2] not in INPUT_OF
    }

    def listen(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: counters[name].add(inputs[0])

    hooks = [linears[name].register_forward_pre_hook(listen(name)) for name in counters]
    body = model.base_model  # the head's logits are not needed
    for batch in pieces.split(4):
        with torch.autocast("cpu", torch.bfloat16):
            body(input_ids=batch)
    for hook in hooks:
        hook.remove()
    matrices = {name: counter.matrix() for name, counter in counters.items()}
    return {name: matrices[source_of(name)] for name in linears}


def source_of(name: str) -> str:
    """Return the name of the layer whose counted inputs a layer shares."""
    parent, _, leaf = name.rpartition(".")
    return f"{parent}.{INPUT_OF.get(leaf, leaf)}"


def decoded(model: nn.Module) -> nn.Module:
    """Return the model with its encoded layers as ordinary ones of the same values."""

    def dense(name: str, linear: nn.Linear) -> nn.Module:
        if not isinstance(linear, EncodedLinear):
            return linear
        made = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        made.weight = nn.Parameter(linear.weight.decode(), requires_grad=False)
        made.bias = linear.bias
        return made

    return replace_linears(model, dense)


def encoded(linear: nn.Linear, codec: Codec, parts: dict[str, Tensor]) -> EncodedLinear:
    """Return a layer over given parts."""
    return EncodedLinear(
        linear.in_features,
        linear.out_features,
        codec=codec,
        parts=parts,
        dtype=linear.weight.dtype,
        bias=linear.bias,
    )


def codec_of(word: str) -> Codec | None:
    """Return the codec of a line of the table; None for the exact weights."""
    if word == BASELINE:
        return None
    if word == "nf4, block 32":
        return Nf4Codec(block_size=32)
    plain = word.partition(" + ")[0]
    if plain == CALIBRATED:
        return Nf4Codec()
    if plain in WORDS_WITHOUT_DATA:
        return calibrated_codec(plain, (64, 64))  # 64 divides the inputs of every layer here
    return codec_for_format(plain)


def bits(model: nn.Module, codec: Codec | None) -> float:
    """Return the bits a weight costs in the decoder's linear layers."""
    if codec is None:
        return 16.0
    shapes = [tuple(linear.weight.shape) for linear in decoder_linears(model).values()]
    return 8 * sum(map(codec.nbytes, shapes)) / sum(math.prod(shape) for shape in shapes)


def with_adapters(base: nn.Module, rank: int) -> nn.Module:
    """Return the model with fresh LoRA adapters on every decoder linear."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS)
    frozen = {id(p): p for p in base.parameters()}
    return get_peft_model(copy.deepcopy(base, dict(frozen)), config)


@torch.no_grad()
def corrected_model(
    base: nn.Module, factors: Mapping[str, Mapping[str, Tensor]], rank: int
) -> nn.Module:
    """Return the model with adapters that begin as its EoRA correction, cut to a rank."""
    made = with_adapters(base, rank)
    for name, pair in factors.items():
        layer = made.get_submodule(f"base_model.model.{name}")
        layer.lora_A["default"].weight.copy_(pair["A"][:rank])
        layer.lora_B["default"].weight.copy_(pair["B"][:, :rank])
    return made


def hold_in_bf16(model: nn.Module) -> None:
    """Round the frozen weights under adapters to what autocast would round them to each time."""
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            exact = layer.base_layer
            rounded = nn.Linear(exact.in_features, exact.out_features, bias=False, device="meta")
            rounded.weight = nn.Parameter(exact.weight.to(torch.bfloat16), requires_grad=False)
            rounded.bias = exact.bias
            layer.base_layer = rounded


def scratch_subject(steps: int) -> Subject:
    """Train a small byte-level Llama; return it with its held-out and calibration texts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    length, rows = 128, 16
    lines = demo_data().read_text(encoding="utf-8").splitlines()
    text = "\n\n".join(json.loads(line)["text"] for line in lines).encode("utf-8", "ignore")
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    pieces = ids[: ids.numel() // length * length].view(-1, length)
    generator = torch.Generator().manual_seed(3)
    pieces = pieces[torch.randperm(pieces.shape[0], generator=generator)]
    held_out, calibration, train = pieces[:96], pieces[96:192], pieces[192:]
    torch.manual_seed(4)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        batch = train[torch.randint(0, train.shape[0], (rows,), generator=generator)]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return Subject(model.eval().requires_grad_(False), held_out, calibration)
