"""Lets transformers record what happens inside streamed layers (router logits, attentions).

transformers collects such outputs with forward hooks that append to a context variable.  Inside a
streamed layer the hooks fire without a graph, once per micro-batch, and again when the layer is
recomputed.  ``CollectorTap`` gives each run of a layer a collector of its own and hands what it
caught on as further outputs of the layer, so that gradients (a router's auxiliary loss) flow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

from transformers.utils import output_capturing

# Hooks on the layer itself record these from outside, where the streamed output passes anyhow.
_OUTSIDE = frozenset({"hidden_states", "_hidden_states_layers"})


@final
class CollectorTap:
    """The ``Tap`` of ``headrace.offload.layer`` for transformers' output capturing."""

    def keys(self) -> tuple[str, ...]:
        """What the model asked to have recorded inside its layers."""
        outer = output_capturing._active_collector.get()
        return tuple(k for k in outer or () if k not in _OUTSIDE)

    @contextmanager
    def inside(self, keys: tuple[str, ...]) -> Iterator[dict[str, list[Any]]]:
        """Record into lists of one's own while a layer runs."""
        found: dict[str, list[Any]] = {key: [] for key in keys}
        token = output_capturing._active_collector.set(found)
        try:
            yield found
        finally:
            output_capturing._active_collector.reset(token)

    def deliver(self, found: dict[str, list[Any]]) -> None:
        """Hand a layer's recordings to the model."""
        outer = output_capturing._active_collector.get()
        assert outer is not None
        for key, values in found.items():
            outer[key].extend(values)
