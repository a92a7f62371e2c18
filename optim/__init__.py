"""Memory-efficient optimizers: bricks, recipes, and the torch.optim face."""

from .adamw import AdamW
from .factors import Refactorization, lora_pairs
from .in_backward import StepInBackward
from .int8_updates import Int8Updates
from .int8_weights import Int8Settings, attach_int8, detach_int8
from .loqt import LoqtMerges, attach_loqt, detach_loqt
from .projected_recipes import (
    apollo,
    apollo_mini,
    fira,
    frugal,
    galore_adamw,
    galore_adamw_8bit,
    grass,
    natural_galore,
    q_galore,
)
from .recipes import (
    adafactor,
    adam_mini,
    adamw,
    adamw_4bit,
    adamw_8bit,
    adamw_fp8,
    lion,
    lion_8bit,
    sgd,
    sign_sgd,
    stable_adamw,
)
from .spec import TensorSpec
from .streamed import ParameterHost, StreamedUpdates, UpdateRule
from .torch_api import RuleOptimizer, memory
from .trainer import for_trainer

__all__ = [
    "AdamW",
    "Int8Settings",
    "Int8Updates",
    "LoqtMerges",
    "ParameterHost",
    "Refactorization",
    "RuleOptimizer",
    "StepInBackward",
    "StreamedUpdates",
    "TensorSpec",
    "UpdateRule",
    "adafactor",
    "adam_mini",
    "adamw",
    "adamw_4bit",
    "adamw_8bit",
    "adamw_fp8",
    "apollo",
    "apollo_mini",
    "attach_int8",
    "attach_loqt",
    "detach_int8",
    "detach_loqt",
    "fira",
    "for_trainer",
    "frugal",
    "galore_adamw",
    "galore_adamw_8bit",
    "grass",
    "lion",
    "lion_8bit",
    "lora_pairs",
    "memory",
    "natural_galore",
    "q_galore",
    "sgd",
    "sign_sgd",
    "stable_adamw",
]
