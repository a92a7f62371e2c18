"""Zeroth-order fine-tuning: forwards only, exact replay, weights that may stay on disk.

``headrace.zo.trainer``, ``.streamed``, ``.distributed`` and ``.quantised`` hold what needs more
than a resident model.
"""

from .aim import ActivationSubspace
from .basis import Basis, measure_basis
from .common_right import CommonRight
from .control import Clip, RmsScale, Standardize
from .dense import Dense
from .log import ReplayLog, StepRecord, read_log
from .lowrank import LowRank
from .noise import Kind
from .objective import causal_lm_losses, label_word_losses
from .one_sided import OneSided
from .per_example import PerExample
from .perturb import Rounding
from .random_subspace import CoreAdam, RandomSubspace
from .replay import fingerprint, replay
from .settings import ZOSettings, recommended
from .step import StepResult, ZOStep
from .two_point import TwoPoint

__all__ = [
    "ActivationSubspace",
    "Basis",
    "Clip",
    "CommonRight",
    "CoreAdam",
    "Dense",
    "Kind",
    "LowRank",
    "OneSided",
    "PerExample",
    "RandomSubspace",
    "ReplayLog",
    "RmsScale",
    "Rounding",
    "Standardize",
    "StepRecord",
    "StepResult",
    "TwoPoint",
    "ZOSettings",
    "ZOStep",
    "causal_lm_losses",
    "fingerprint",
    "label_word_losses",
    "measure_basis",
    "read_log",
    "recommended",
    "replay",
]
