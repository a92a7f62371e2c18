"""Calibrated encoding through the stream: one decoder layer in memory, activations on disk.

For each layer in turn: its weights are read, the calibration batch runs through it and the moments
of every weight's inputs are counted; the weights are encoded by them, and the batch runs through
the *encoded* layer to become the next one's inputs, so that later layers make up for the errors
of earlier ones.  Between layers the batch lies in a file of the work folder, which is also what
an interrupted run goes on from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headrace.offload.chunk import ChunkLayout
from headrace.quant.calibrated import CalibratedWeight, InputTap, encode_calibrated
from headrace.quant.codec import Codec
from headrace.quant.shards import ShardFile, ShardWriter
from headrace.quant.spec import TensorSpec

from .checkpoint import Checkpoint
from .encoding_plan import PlannedWeight
from .errors import InputError
from .structure import ModuleChunk, Role

CORRECTIONS_NAME: Final = "corrections-{}.safetensors"


@final
@dataclass(frozen=True)
class CalibrationBatch:
    """Micro-batches of token ids, all of one shape (rows, tokens)."""

    batches: tuple[Tensor, ...]

    @property
    def digest(self) -> str:
        """What identifies the tokens."""
        state = hashlib.blake2b(digest_size=16)
        for batch in self.batches:
            state.update(str(tuple(batch.shape)).encode() + batch.contiguous().numpy().tobytes())
        return state.hexdigest()


def read_calibration(
    path: Path, model: Path, *, rows: int = 128, tokens: int = 512, micro_batch: int = 4
) -> CalibrationBatch:
    """Read a JSONL file as ``tune`` does and cut it into whole rows of ``tokens`` tokens.

    ``rows`` is the most that is used, ``micro_batch`` how many go through a layer at a time.

    >>> from pathlib import Path
    >>> import headrace
    >>> data = headrace.read_calibration(
    ...     Path("texts.jsonl"), Path("model-folder"), rows=8, tokens=32, micro_batch=4
    ... )
    >>> [tuple(batch.shape) for batch in data.batches]
    [(4, 32), (4, 32)]
    >>> _ = headrace.quantize("model-folder", "calibrated", format="gptq", calibration=data)
    """
    if min(rows, tokens, micro_batch) < 1:
        raise InputError(f"calibration with {rows} rows of {tokens} tokens: give 1 or more of each")
    from .data import read_jsonl, tokenize
    from .preparation import load_tokenizer

    found = tokenize(
        read_jsonl(path), load_tokenizer(str(model)), seq_len=tokens, packing="pack", path=path
    )
    whole = [found.row(i)[0] for i in range(len(found)) if len(found.row(i)[0]) == tokens][:rows]
    micro_batch = min(micro_batch, max(len(whole), 1))
    count = len(whole) // micro_batch * micro_batch
    if not count:
        raise InputError(
            f"{path} does not fill a row of {tokens} tokens; give more text, or shorter rows "
            f"(--calibration-tokens)"
        )
    ids = torch.stack([torch.from_numpy(row.astype("int64")) for row in whole[:count]])
    return CalibrationBatch(tuple(ids.split(micro_batch)))


class _StoppedError(Exception):
    """The entry pass has what it wants."""


@final
class Calibrator:
    """Encodes the layers of a model on ``meta``, in order, each when it is first asked for."""

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        chunks: Sequence[ModuleChunk],
        planned: Mapping[str, PlannedWeight],
        data: CalibrationBatch,
        *,
        work: Path,
        device: torch.device,
        eora_rank: int,
    ) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self._model, self._checkpoint, self._planned = model, checkpoint, planned
        self._layers = [chunk for chunk in chunks if chunk.role is Role.LAYER]
        self._entry = [c for c in chunks if c.role not in (Role.LAYER, Role.HEAD)]
        self._data, self._work, self._device = data, work, device
        self._eora_rank = eora_rank
        for module in model.modules():
            for leaf, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[leaf] = buffer.to(device)
        model.eval()
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._current: str | None = None
        self._encoded: dict[str, CalibratedWeight] = {}

    def encoder(
        self, chunk: ModuleChunk, name: str
    ) -> Callable[[Tensor, Codec], tuple[dict[str, Tensor], dict[str, float]]]:
        """Return what encodes one weight of a layer."""

        def encode(x: Tensor, codec: Codec) -> tuple[dict[str, Tensor], dict[str, float]]:
            if self._current != chunk.name:
                self._encoded = {}
                self._encode_layer(self._layers.index(chunk))
                self._current = chunk.name
            done = self._encoded[name]
            return {part: value.cpu() for part, value in done.parts.items()}, done.errors

        return encode

    def corrections(self) -> dict[str, Tensor]:
        """Return the factors of every corrected weight: ``NAME.A`` and ``NAME.B``."""
        found: dict[str, Tensor] = {}
        for chunk in self._layers:
            path = self._work / CORRECTIONS_NAME.format(chunk.name)
            if path.is_file():
                shard = ShardFile(path)
                found |= {name: shard.read(name) for name in shard.tensors}
        return found

    def _inputs(self, number: int) -> Path:
        return self._work / f"inputs-{number:05d}.safetensors"

    @torch.no_grad()
    def _encode_layer(self, number: int) -> None:
        chunk = self._layers[number]
        if not self._calls:
            self._record_calls(write_inputs=number == 0)
        if not self._inputs(number).is_file():
            raise InputError(
                f"{self._inputs(number)} is missing: the interrupted calibration cannot go on. "
                f"Remove {self._work.parent} and begin again."
            )
        module = chunk.modules[0]
        weights = self._load(chunk)
        chosen = {name: weights[name] for name in weights if name in self._planned}
        inputs = ShardFile(self._inputs(number))
        with InputTap(chosen) as tap:
            for place in range(len(self._data.batches)):
                self._run(module, number, inputs.read(f"h.{place}"))
                tap.next_batch()
        for name, weight in chosen.items():
            planned = self._planned[name]
            if tap.moments(name) is None:
                raise InputError(
                    f"no calibration input reached {name!r} (its module multiplies in a way that "
                    f"is not watched, or no token is routed to it); name it in keep=, or use a "
                    f"format without calibration"
                )
            # The codec sees the weight turned where the layout wants its outputs first.
            seen = weight.transpose(-2, -1).contiguous() if planned.transposed else weight
            inputs_first = tap.inputs_first(name) != planned.transposed
            done = encode_calibrated(
                seen,
                tap.moments(name),
                planned.codec,
                eora_rank=self._eora_rank,
                inputs_first=inputs_first,
            )
            self._encoded[name] = done
            decoded = planned.codec.decode(done.parts, tuple(seen.shape))
            if done.correction is not None:
                a, b = done.correction
                decoded += (b @ a).t() if inputs_first else b @ a
            weight.copy_(decoded.transpose(-2, -1) if planned.transposed else decoded)
        self._write_corrections(chunk)
        if number + 1 < len(self._layers):
            spec = TensorSpec(
                tuple(inputs.tensors["h.0"].spec.shape), inputs.tensors["h.0"].spec.dtype
            )
            self._write_inputs(
                number + 1,
                spec,
                lambda place: self._run(module, number, inputs.read(f"h.{place}")),
            )
        # The layer before is in its shard by now: nothing can ask for its inputs again.
        self._inputs(number - 1).unlink(missing_ok=True)
        self._unload(chunk)

    def _write_inputs(self, number: int, spec: TensorSpec, make: Callable[[int], Tensor]) -> None:
        names = {f"h.{place}": spec for place in range(len(self._data.batches))}
        with ShardWriter(self._inputs(number), names, {}) as writer:
            for place in range(len(self._data.batches)):
                writer.write(f"h.{place}", make(place).cpu())

    def _write_corrections(self, chunk: ModuleChunk) -> None:
        factors: dict[str, Tensor] = {}
        for name, done in self._encoded.items():
            if done.correction is not None:
                factors |= {f"{name}.A": done.correction[0], f"{name}.B": done.correction[1]}
        if factors:
            specs = {n: TensorSpec(tuple(f.shape), f.dtype) for n, f in factors.items()}
            path = self._work / CORRECTIONS_NAME.format(chunk.name)
            with ShardWriter(path, specs, {}) as writer:
                for name, factor in factors.items():
                    writer.write(name, factor.cpu())

    def _run(self, module: nn.Module, number: int, hidden: Tensor) -> Tensor:
        args, kwargs = self._calls[number]
        out = module(hidden.to(self._device), *args, **kwargs)
        if not isinstance(out, Tensor):
            raise InputError(
                f"a {type(module).__name__} returns a {type(out).__name__}, not its hidden states: "
                f"this model cannot be calibrated layer by layer; use a format without calibration"
            )
        return out

    @torch.no_grad()
    def _record_calls(self, *, write_inputs: bool) -> None:
        """Run the embedding; learn how the model calls each of its layers."""
        for chunk in self._entry:
            self._load(chunk)
        first: list[Tensor] = []
        modules = {id(chunk.modules[0]): place for place, chunk in enumerate(self._layers)}
        last = len(self._layers) - 1

        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            place = modules[id(module)]
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if place == 0:
                first.append(hidden)
            if len(self._calls) <= place:
                self._calls.append((args[1:], kwargs))
            if place == last:
                raise _StoppedError
            return hidden  # type: ignore[no-any-return]

        classes = {chunk.modules[0]: type(chunk.modules[0]) for chunk in self._layers}

        def embed(place: int) -> Tensor:
            first.clear()
            try:
                self._model(input_ids=self._data.batches[place].to(self._device), use_cache=False)
            except _StoppedError:
                return first[0]
            raise AssertionError("the last layer was not called")

        try:
            for module, kind in classes.items():
                module.__class__ = _watched(kind, watch)
            hidden = embed(0)
            if write_inputs:
                spec = TensorSpec(tuple(hidden.shape), hidden.dtype)
                self._write_inputs(0, spec, embed)
        finally:
            for module, kind in classes.items():
                module.__class__ = kind
        for chunk in self._entry:
            self._unload(chunk)

    def _load(self, chunk: ModuleChunk) -> dict[str, Tensor]:
        """Give a chunk's modules their weights; return them by full name."""
        layout = ChunkLayout.pack(
            chunk.name, [(n, p.shape, p.dtype) for n, p in chunk.parameters.items()]
        )
        loaded: dict[str, Tensor] = {}
        made: dict[int, nn.Parameter] = {}
        for name, tensor in self._checkpoint.convert(layout).items():
            # A storage of its own, so that products with it are told apart.
            parameter = nn.Parameter(tensor.to(self._device, copy=True), requires_grad=False)
            made[id(chunk.parameters[name])] = parameter
            loaded[name] = parameter.data
        self._exchange(chunk, made)
        return loaded

    def _unload(self, chunk: ModuleChunk) -> None:
        held = {n: p for m in chunk.modules for n, p in m.named_parameters(remove_duplicate=False)}
        made = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
            for p in held.values()
        }
        self._exchange(chunk, made)

    @staticmethod
    def _exchange(chunk: ModuleChunk, made: Mapping[int, nn.Parameter]) -> None:
        for module in (inner for outer in chunk.modules for inner in outer.modules()):
            for leaf, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in made:
                    module._parameters[leaf] = made[id(parameter)]
        for name, parameter in chunk.parameters.items():
            if id(parameter) in made:
                chunk.parameters[name] = made[id(parameter)]


def _watched(
    kind: type[nn.Module],
    watch: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Tensor],
) -> type[nn.Module]:
    """Return a subclass whose call is handed to ``watch`` in place of the forward pass."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return watch(self, args, kwargs)

    return type(kind.__name__, (kind,), {"__call__": call})
