"""``StreamedModel``: what makes a model a streamed one, and how to find it under wrappers.

Everything that reads or changes a streamed model's weights starts from its runtime; what the
model itself offers to Hugging Face code (saving, loading, casting) is built on those parts in
``streamed_model``.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from headrace.offload.loss import StreamedHead
from headrace.offload.runtime import Runtime
from headrace.offload.schedule import Phase

from .errors import InputError
from .training import Training


class StreamedModel(nn.Module):
    """A model with a runtime that brings its weights; made by ``headrace.load``, never by hand."""

    # transformers evaluates the annotations of every model class, so these stay importable.
    _runtime: Runtime
    _head: StreamedHead | None
    _training_side: Training
    _is_accelerate_prepared: bool  # keeps accelerate from wrapping it in DistributedDataParallel

    def close(self) -> None:
        """Flush updates, stop the lanes, free memory; the model cannot be used afterwards."""
        self._runtime.close()

    def chunk_tensors(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Every chunk's real weights in host memory, one chunk at a time (copies)."""
        runtime = self._runtime
        runtime.flush()
        runtime.engine.begin("forward")
        for name in list(runtime.engine.chunks):
            with runtime.engine.use_host(name, Phase.FORWARD) as views:
                yield name, {n: v.clone() for n, v in views.items()}


def streamed_model_of(model: nn.Module) -> StreamedModel:
    """Return the streamed model, wrappers (PEFT's and others) seen through."""
    for module in model.modules():
        if isinstance(module, StreamedModel):
            return module
    raise InputError(f"{type(model).__name__} is not streamed; open it with headrace.load")


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a streamed model's weights as they stream: what a folder of them takes, nearly."""
    chunks = streamed_model_of(model)._runtime.engine.chunks
    return sum(chunk.layout.nbytes for chunk in chunks.values())


def runtime_of(model: nn.Module) -> Runtime:
    """The runtime that streams ``model``: its engine, budgets, lanes and statistics.

    What takes a streamed model's weights apart from its forward pass starts here, such as
    ``headrace.zo.streamed.StreamedWeights(model, runtime_of(model), directions)``.

    >>> import headrace
    >>> model = headrace.load("model-folder", train="none", device="cpu")
    >>> headrace.runtime_of(model).device
    device(type='cpu')
    >>> model.close()
    """
    return streamed_model_of(model)._runtime
