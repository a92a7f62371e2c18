"""Memory-efficient optimizers: bricks, recipes, and the torch.optim face."""

from .adamw import AdamW
from .recipes import adamw
from .spec import TensorSpec
from .streamed import ParameterHost, StreamedUpdates, UpdateRule
from .torch_api import RuleOptimizer, memory

__all__ = [
    "AdamW",
    "ParameterHost",
    "RuleOptimizer",
    "StreamedUpdates",
    "TensorSpec",
    "UpdateRule",
    "adamw",
    "memory",
]
