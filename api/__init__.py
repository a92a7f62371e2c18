"""Headrace: fine-tune models as large as your disk on one consumer GPU.

Importing this package imports no torch and touches no device; each public name is fetched from
its module on first use.  A module never bears the name of a public function (``load`` lives in
``loading``, ``tune`` in ``tuning``): importing a submodule binds its name on the package, and
would replace the function of the same name by the module.
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapting import correct_adapters
    from .budgets import default_budgets, parse_bytes
    from .calibrating import read_calibration
    from .callback import HeadraceCallback
    from .errors import DataError, InputError
    from .exporting import export
    from .foreign_quantizing import quantize_for_transformers
    from .hand_over import export_distributed, import_distributed
    from .loading import load
    from .loram import prune, recover
    from .merging import merge_and_unload
    from .options import TuneOptions
    from .quantization_config import HeadraceConfig
    from .quantizing import quantize
    from .reporting import Report, report, statistics
    from .resuming import resume
    from .state_folder import export_states, import_states
    from .streamed import runtime_of
    from .tracing import Trace, trace
    from .tune_result import TuneResult
    from .tuning import tune

_HOMES = MappingProxyType(
    {
        "DataError": "errors",
        "HeadraceCallback": "callback",
        "HeadraceConfig": "quantization_config",
        "InputError": "errors",
        "Report": "reporting",
        "Trace": "tracing",
        "TuneOptions": "options",
        "TuneResult": "tune_result",
        "correct_adapters": "adapting",
        "default_budgets": "budgets",
        "export": "exporting",
        "export_distributed": "hand_over",
        "export_states": "state_folder",
        "import_distributed": "hand_over",
        "import_states": "state_folder",
        "load": "loading",
        "merge_and_unload": "merging",
        "resume": "resuming",
        "parse_bytes": "budgets",
        "prune": "loram",
        "quantize": "quantizing",
        "quantize_for_transformers": "foreign_quantizing",
        "read_calibration": "calibrating",
        "recover": "loram",
        "report": "reporting",
        "runtime_of": "streamed",
        "statistics": "reporting",
        "trace": "tracing",
        "tune": "tuning",
    }
)

__all__ = [
    "DataError",
    "HeadraceCallback",
    "HeadraceConfig",
    "InputError",
    "Report",
    "Trace",
    "TuneOptions",
    "TuneResult",
    "correct_adapters",
    "default_budgets",
    "export",
    "export_distributed",
    "export_states",
    "import_distributed",
    "import_states",
    "load",
    "merge_and_unload",
    "parse_bytes",
    "prune",
    "quantize",
    "quantize_for_transformers",
    "read_calibration",
    "recover",
    "report",
    "resume",
    "runtime_of",
    "statistics",
    "trace",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
