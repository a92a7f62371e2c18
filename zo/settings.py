"""A zeroth-order method as a value, and its JSON form in a log's header.

Every brick is a frozen dataclass; its JSON form is its class's name and its fields.  Reading takes
known names only and lets constructors check values, so that a hostile header is an error, not an
import.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from ..offload.errors import StoreFormatError
from .aim import ActivationSubspace
from .basis import Basis
from .common_right import CommonRight
from .control import Clip, Control, RmsScale, Standardize
from .dense import Dense
from .directions import Directions
from .estimate import Estimator, all_finite, check_eps
from .log import StepRecord
from .lowrank import LowRank
from .noise import Kind, check_seed
from .one_sided import OneSided
from .per_example import PerExample
from .perturb import Rounding, StepUpdate
from .random_subspace import CoreAdam, RandomSubspace
from .two_point import TwoPoint


@final
@dataclass(frozen=True, slots=True)
class ZOSettings:
    """What a zeroth-order run does: probe scale, directions, estimator, controls.

    ``lr`` is the default of every step (schedulers give their own).  ``fp32_residual``: members of
    a 16-bit model are evaluated with fp32 activations (``residual.Fp32Residual``).  The defaults
    are MeZO's step: two dense Gaussian probes, plain descent.

    >>> ZOSettings(lr=1e-3, estimator=OneSided(15), directions=LowRank(15)).estimator.directions
    15
    """

    lr: float = 1e-6
    eps: float = 1e-3
    seed: int = 0
    estimator: Estimator = TwoPoint()  # noqa: RUF009 (frozen, no state)
    directions: Directions = Dense()  # noqa: RUF009
    controls: tuple[Control, ...] = ()
    weight_decay: float = 0.0
    fp32_residual: bool = False

    def __post_init__(self) -> None:
        check_eps(self.eps)
        check_lr(self.lr)
        check_seed(self.seed)
        self.directions.check(directions=self.estimator.directions, weight_decay=self.weight_decay)

    def update_of(self, record: StepRecord, name: str) -> StepUpdate | None:
        """What a logged step does to a parameter; None if the step was skipped.

        As in MeZO, names that contain "bias", "layer_norm" or "layernorm" have no weight decay;
        nor have names that contain "norm".
        """
        if record.skipped:
            return None
        decay = 1.0 - record.lr * self.weight_decay if self.decays(name) else 1.0
        return StepUpdate(record.seed, record.lr, record.grads, decay, record.step)

    def decays(self, name: str) -> bool:
        """Whether a parameter has weight decay; all that a step's update depends on its name by."""
        plain = any(word in name.lower() for word in ("bias", "norm"))
        return bool(self.weight_decay) and not plain

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return _encode(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ZOSettings:
        """The settings of a header; refuses what it does not know."""
        made = _decode(dict(value))
        if not isinstance(made, cls):
            raise StoreFormatError(f"the log's settings are of {type(made).__name__}")
        return made


def recommended(
    *,
    lr: float = 4e-2,
    eps: float = 4e-3,
    seed: int = 0,
    copies: int = 4,
    examples: int = 16,
    window_steps: int = 25,
    basis: Basis | None = None,
) -> ZOSettings:
    """The method to begin with: every example has one-sided low-rank probes of its own.

    ``basis``, of ``measure_basis(model, batches)``, is worth its few forwards: probes then lie
    where the inputs of each layer live, and with them the gradients' right sides.  Without it
    right factors are random.  ``eps``: in a bf16 model, losses at probes of 1e-3 differ by little
    more than their rounding (``benchmarks/zo_probe.py``).

    A step is ``copies`` forwards of a batch, made as one; every one of ``examples`` equal parts of
    the batch (rows, if there are as many) meets ``copies`` directions that no other part meets.
    One weight load and one base matmul serve them all, nothing is written between merges, and
    updates collect in fp32 factors, so that none is lost to the rounding of 16-bit weights.  The
    running root mean square takes the scale of the loss out of ``lr``: it is the typical step of a
    weight times the square root of the number of directions, ``copies * examples``.

    ``window_steps``: steps between merges; windows of 8 and of 25 ended alike (300 forwards, three
    seeds).  Over encoded weights every window leaves factors behind (``adapter.Adapter``): give
    long ones there.

    Noise is derived from integers: the same bits on every device.

    ``examples=1`` is for objectives that are one number for the whole batch (``ZOStep.step``).

    >>> recommended().estimator
    PerExample(copies=4, examples=16)
    >>> recommended(copies=15, examples=1).estimator
    OneSided(count=15, baseline='leave_one_out')
    """
    alone = examples == 1
    estimator = OneSided(copies) if alone else PerExample(copies, examples)
    return ZOSettings(
        lr=lr,
        eps=eps,
        seed=seed,
        estimator=estimator,
        directions=CommonRight(
            estimator.directions,
            rank=2 if basis is None else basis.rank,
            steps=window_steps,
            kind=Kind.IRWIN_HALL,
            basis=basis,
        ),
        controls=(RmsScale(),),
    )


def check_lr(lr: float) -> None:
    """Refuse a learning rate that is negative, inf or NaN."""
    if not (math.isfinite(lr) and lr >= 0):
        raise ValueError(f"lr must be finite and at least 0, got {lr}")


def check_record(record: StepRecord, where: str) -> None:
    """Refuse a logged step that no run of ours can have written."""
    finite = all_finite((record.lr, record.eps, *record.grads))
    if not finite or record.lr < 0 or record.eps <= 0:
        raise StoreFormatError(
            f"{where}: step {record.step} has lr {record.lr}, eps {record.eps} and projected grads "
            f"{record.grads}, which no run writes"
        )


def _bricks() -> dict[str, type]:
    known = (
        ZOSettings,
        TwoPoint,
        OneSided,
        PerExample,
        Dense,
        LowRank,
        CommonRight,
        RandomSubspace,
        CoreAdam,
        ActivationSubspace,
        Basis,
        Clip,
        Standardize,
        RmsScale,
    )
    return {kind.__name__: kind for kind in known}


def _encode(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
        return {"brick": type(value).__name__, **fields}
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item) for item in value)
    if not isinstance(value, dict):
        return value
    name = value.get("brick")
    kind = _bricks().get(name) if isinstance(name, str) else None
    if not isinstance(name, str) or kind is None:
        raise StoreFormatError(
            f"the log's settings name {name!r}, which this version does not know"
        )
    names = {field.name for field in dataclasses.fields(kind)}
    if set(value) - {"brick"} != names:
        raise StoreFormatError(
            f"the log's settings give {name} the fields {sorted(set(value) - {'brick'})}, "
            f"expected {sorted(names)}"
        )
    fields = {field: _decode(item) for field, item in value.items() if field != "brick"}
    enums: dict[str, type[enum.Enum]] = {"kind": Kind, "rounding": Rounding}
    try:
        for field in fields.keys() & enums.keys():
            fields[field] = enums[field](fields[field])
        _check_types(name, kind, fields)
        return kind(**fields)
    except (ValueError, TypeError) as error:
        raise StoreFormatError(f"the log's settings of {name} are refused: {error}") from error


_SIMPLE = {
    "int": (int,),
    "float": (int, float),
    "Baseline": (str,),
    "float | None": (int, float, type(None)),
}
_ABSTRACT = {
    "Estimator": Estimator,
    "Directions": Directions,
    "Basis": Basis,
    "Basis | None": (Basis, type(None)),
    "tuple[tuple[str, ...], ...]": tuple,
    "tuple[str, ...]": tuple,
    "tuple[tuple[float, ...], ...]": tuple,
    "CoreAdam | None": (CoreAdam, type(None)),
}


def _check_types(name: str, kind: type, fields: Mapping[str, Any]) -> None:
    for field in dataclasses.fields(kind):
        wanted: Any = _SIMPLE.get(str(field.type), _ABSTRACT.get(str(field.type), object))
        value = fields[field.name]
        wrong = isinstance(value, bool) != (field.type == "bool")
        if wrong or not isinstance(value, wanted):
            raise TypeError(f"{name}.{field.name} cannot be {value!r}")
        if field.name == "controls" and not (
            isinstance(value, tuple) and all(isinstance(item, Control) for item in value)
        ):
            raise TypeError(f"{name}.controls must be a list of controls")
