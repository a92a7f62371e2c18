"""Lets transformers record what happens inside streamed layers (router logits, attentions).

transformers collects such outputs with forward hooks that append to a context variable.  Inside a
streamed layer the hooks fire without a graph, once per micro-batch, and again when the layer is
recomputed.  ``CollectorTap`` gives each run of a layer a collector of its own and hands what it
caught on as further outputs of the layer, so that gradients (a router's auxiliary loss) flow.

Before transformers 5.2 it replaced the forward of what it recorded instead, for the duration of
one call.  Layers and evaluation work with that; a router's loss would have no gradient, and
``check_recording`` refuses it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

from headrace.offload.errors import UnsupportedModelError

_MODULE = "transformers.utils.output_capturing"  # since transformers 5.2
_AVAILABLE = importlib.util.find_spec(_MODULE) is not None

# Hooks on the layer itself record these from outside, where the streamed output passes anyhow.
_OUTSIDE = frozenset({"hidden_states", "_hidden_states_layers"})


@final
class CollectorTap:
    """The ``Tap`` of ``headrace.offload.layer`` for transformers' output capturing."""

    def __init__(self) -> None:
        self._active = importlib.import_module(_MODULE)._active_collector

    def keys(self) -> tuple[str, ...]:
        """What the model asked to have recorded inside its layers."""
        outer = self._active.get()
        return tuple(k for k in outer or () if k not in _OUTSIDE)

    @contextmanager
    def inside(self, keys: tuple[str, ...]) -> Iterator[dict[str, list[Any]]]:
        """Record into lists of one's own while a layer runs."""
        found: dict[str, list[Any]] = {key: [] for key in keys}
        token = self._active.set(found)
        try:
            yield found
        finally:
            self._active.reset(token)

    def deliver(self, found: dict[str, list[Any]]) -> None:
        """Hand a layer's recordings to the model."""
        outer = self._active.get()
        assert outer is not None
        for key, values in found.items():
            outer[key].extend(values)


def open_tap() -> CollectorTap | None:
    """The tap for this version of transformers; None where it records from outside."""
    return CollectorTap() if _AVAILABLE else None


def check_recording(config: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse to train with a router's auxiliary loss where it would have no gradient."""
    asked = arguments.get("output_router_logits")
    if asked is None:
        asked = getattr(config, "output_router_logits", False)
    if asked and not _AVAILABLE:
        raise UnsupportedModelError(
            "output_router_logits=True asks for a router loss inside streamed layers, which has "
            "its gradient only with transformers 5.2 or later. Upgrade transformers, or set "
            "model.config.output_router_logits = False."
        )
