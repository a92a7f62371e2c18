"""Recipes in the Hugging Face Trainer, which hands an optimizer factory the model itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .torch_api import RuleOptimizer

Recipe = Callable[..., RuleOptimizer]


def for_trainer(recipe: Recipe, **settings: Any) -> tuple[Callable[[], Recipe], dict[str, Any]]:
    """Return what ``Trainer(optimizer_cls_and_kwargs=...)`` takes for a recipe and its settings.

    The Trainer then builds the optimizer itself, over the model with its names and roles, after
    it has placed the model.  ``Trainer(optimizers=(recipe(model, ...), None))`` does as well.

    >>> from headrace.optim import galore_adamw
    >>> factory, settings = for_trainer(galore_adamw, lr=1e-4, rank=64)
    >>> factory() is galore_adamw
    True
    """
    return (lambda: recipe), settings
