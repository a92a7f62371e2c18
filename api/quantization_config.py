"""``HeadraceConfig``: encoding as a ``quantization_config`` of transformers' ``from_pretrained``.

Importing this module registers the method ``"headrace"`` with transformers' public registry
(``register_quantization_config``, ``register_quantizer``); nothing else does, and nothing is
patched.  ``headrace.HeadraceConfig`` is fetched on first use, so ``import headrace`` alone
registers nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import (
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from headrace.quant.calibrated import WORDS_WITHOUT_DATA, encode_calibrated
from headrace.quant.codec import Codec
from headrace.quant.foreign_layouts import foreign_settings, foreign_tensors
from headrace.quant.linear import EncodedModule, part_parameter_name
from headrace.quant.model import declare_weight, replace_weight
from headrace.quant.shards import checksum

from .encoding_plan import LAYOUTS, PlannedWeight, kept_linears, plan_encoding
from .encoding_record import (
    METHOD,
    parts_digest,
    recorded_weights,
    settings_record,
    weight_groups,
)
from .errors import InputError

if TYPE_CHECKING:
    from .quantized_stream import StreamOptions


@register_quantization_config(METHOD)
@final
class HeadraceConfig(QuantizationConfigMixin):  # type: ignore[no-untyped-call]
    """Encode a model's linear layers, layer by layer, while ``from_pretrained`` loads it.

    ``format``: a word (``"nf4"``, ``"int8"``, ``"fp8"``, ...), a codec, or a codec's parameters.
    ``modules_to_not_convert``: modules to leave as they are, by their names or the ends of them.

    Memory: the encoded model, and one raw weight at a time.  Fused experts are encoded too.

    ``layout`` decides what ``save_pretrained`` writes:

    * ``"headrace"``: this library's parts and checksums.  The folder opens again with plain
      ``from_pretrained`` in a process that has imported ``headrace.HeadraceConfig`` (without it,
      transformers says that it does not know the method and starts those weights at random), and
      with ``headrace.load``.
    * ``"transformers"``: the layout that transformers itself reads, with this library not even
      installed: NF4, FP4 and INT8 as bitsandbytes', FP8 in square blocks, the MXFP4 of gpt-oss.
      A weight that the layout has no place for (fused experts) is refused by name.

    With ``store`` (a folder) the model is not held but streamed: it is encoded into the store one
    layer at a time, and what ``from_pretrained`` returns reads it from there within
    ``device_budget`` and ``host_budget``, exactly as ``headrace.load`` of that folder would.

    >>> import headrace
    >>> from transformers import AutoModelForCausalLM
    >>> config = headrace.HeadraceConfig("nf4")
    >>> model = AutoModelForCausalLM.from_pretrained("model-folder", quantization_config=config)
    >>> model.save_pretrained("encoded-folder")
    >>> type(model.model.layers[0].mlp.up_proj).__name__
    'EncodedLinear'
    """

    def __init__(
        self,
        format: str | Codec | Mapping[str, Any] = "nf4",
        *,
        modules_to_not_convert: Sequence[str] | None = None,
        layout: str = "headrace",
        store: str | Path | None = None,
        device_budget: int | str | None = None,
        host_budget: int | str | None = None,
        micro_batch: int | None = None,
        weights: Sequence[Mapping[str, Any]] | None = None,
        quant_method: str = METHOD,
    ) -> None:
        if quant_method != METHOD:
            raise InputError(f"quant_method is {quant_method!r}; this configuration is {METHOD!r}")
        if layout not in LAYOUTS:
            raise InputError(f"layout is {layout!r}; choose one of {', '.join(LAYOUTS)}")
        if format == "gptq" and not weights:
            raise InputError(
                "GPTQ's codes are chosen by calibration data, which from_pretrained does not see: "
                "headrace quantize --calibration writes a folder that it opens; or use format 'hqq'"
            )
        if store is None and (device_budget, host_budget, micro_batch) != (None, None, None):
            raise InputError("budgets and micro_batch are of a streamed model: give store='FOLDER'")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format = format.parameters() if isinstance(format, Codec) else format
        self.modules_to_not_convert = list(modules_to_not_convert or ())
        self.layout = layout
        self.store = None if store is None else str(store)
        self.device_budget = device_budget
        self.host_budget = host_budget
        self.micro_batch = micro_batch
        self.weights = [dict(group) for group in weights or ()]
        self._foreign: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds: the saved layout's own description."""
        if self._foreign is not None:
            return dict(self._foreign)
        return settings_record(self.format, self.modules_to_not_convert, self.weights)


@final
class _EncodeOnLoad(ConversionOps):  # type: ignore[no-untyped-call]
    """Called by transformers for each finished weight; leaves its parts in the model."""

    def __init__(self, quantizer: HeadraceQuantizer) -> None:
        self._quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, list[Tensor]]:
        """Take the weights; nothing is left for transformers to set."""
        missing_keys = kwargs.get("missing_keys")
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            self._quantizer.take(kwargs["model"], name, weight)
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}


@register_quantizer(METHOD)
@final
class HeadraceQuantizer(HfQuantizer):  # type: ignore[no-untyped-call]
    """What transformers calls while it loads and saves a model of this method."""

    quantization_config: HeadraceConfig

    def __init__(self, quantization_config: HeadraceConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._planned: dict[str, PlannedWeight] = {}
        self._digests: dict[str, str] = {}
        self._stream: StreamOptions | None = None
        self._refused: list[str] = []
        self._files: list[str] = []
        self._place = "cpu"
        self._dtype: torch.dtype | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse placements that another library would move weights by."""
        device_map = kwargs.get("device_map")
        places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if "disk" in places or len(places) > 1:
            raise InputError(
                f"device_map={device_map!r} spreads an encoded model over several places; give "
                f"one device, or store='FOLDER' to stream"
            )
        if self.quantization_config.store is not None and self.pre_quantized:
            raise InputError(
                "this folder is encoded already: headrace.load(folder, ...) streams it in place"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        config = self.quantization_config
        self._dtype = model.dtype
        if self.pre_quantized:
            where = str(getattr(model.config, "name_or_path", "") or "config.json")
            for name, (planned, digest) in recorded_weights(config.to_dict(), where).items():
                _declare(model, name, planned, where)
                self._planned[name], self._digests[name] = planned, digest
            for module in model.modules():
                if isinstance(module, EncodedModule):
                    _mark_initialised(module)  # parts that are missing fail their digest
            return model
        self._planned = plan_encoding(
            model, config.format, layout=config.layout, keep=config.modules_to_not_convert
        )
        if config.layout == "transformers":
            codec = next(iter(self._planned.values())).codec
            kept = kept_linears(model, self._planned)
            config._foreign = foreign_settings(codec, kept, model.dtype)
        if config.store is not None:
            self._files, self._place = list(kwargs["checkpoint_files"]), _one_place(kwargs)
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        """Whether a weight goes through ``take``; all of them where the model is streamed."""
        streamed = self.quantization_config.store is not None
        return not self.pre_quantized and (streamed or param_name in self._planned)

    def get_quantize_ops(self) -> ConversionOps:
        """Return what transformers calls with each such weight."""
        if self.quantization_config.store is not None and self._stream is None:
            from .quantized_stream import encode_into_store

            # Only here: while transformers builds a model it suspends the tying of weights.
            config, options = self.quantization_config, self._stream_options()
            encode_into_store(
                Path(self._files[0]).parent,
                options,
                format=config.format,
                keep=config.modules_to_not_convert,
            )
            self._stream = options
        return _EncodeOnLoad(self)

    def _stream_options(self) -> StreamOptions:
        from .quantized_stream import StreamOptions

        config = self.quantization_config
        if config.layout != "headrace":
            raise InputError(
                f"layout={config.layout!r} is for models that save_pretrained writes; a streamed "
                f"one has layout='headrace' (headrace quantize --layout writes others)"
            )
        assert config.store is not None and self._dtype is not None
        return StreamOptions(
            folder=Path(config.store) / "encoded",
            dtype=self._dtype,
            device=self._place,
            device_budget=config.device_budget,
            host_budget=config.host_budget,
            micro_batch=config.micro_batch,
        )

    def take(self, model: PreTrainedModel, name: str, value: Tensor) -> None:
        """Encode one weight into the model (a streamed one has it on disk already)."""
        if self._stream is not None:
            return
        planned = self._planned[name]
        if not bool(torch.isfinite(value).all()):
            # transformers swallows what is raised here: it is raised when loading has ended.
            count = int((~torch.isfinite(value)).sum())
            self._refused.append(f"{name!r} holds {count} values that are NaN or infinite")
            return
        exact = value.transpose(-2, -1) if planned.transposed else value
        if self.quantization_config.format in WORDS_WITHOUT_DATA:
            parts = encode_calibrated(exact.contiguous(), None, planned.codec).parts
        else:
            parts = planned.codec.encode(exact.contiguous())
        self._digests[name] = parts_digest(
            {part: checksum(value.cpu()) for part, value in parts.items()}
        )
        replace_weight(
            model, name, planned.codec, parts, planned.shape, transposed=planned.transposed
        )
        _mark_initialised(model.get_submodule(name.rpartition(".")[0]))

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        if self._refused:
            raise InputError(
                f"{model.name_or_path}: {self._refused[0]} and cannot be encoded; repair the "
                f"checkpoint or name it in modules_to_not_convert"
            )
        if self._stream is not None:
            from .quantized_stream import attach_stream

            # From here on it is what headrace.load gives, which saves the weights decoded.
            self.remove_quantization_config(model)
            attach_stream(model, self._stream)
            return model
        if self.pre_quantized:
            self._check_and_freeze(model)
        config = self.quantization_config
        config.weights = weight_groups(
            {
                name: (planned, self._digests.get(name, ""))
                for name, planned in self._planned.items()
            }
        )
        if config.layout == "headrace":
            # Parts have the model's own names; there is nothing to turn back when it is saved.
            model._weight_conversions = []  # type: ignore[assignment]
        return model

    def _check_and_freeze(self, model: PreTrainedModel) -> None:
        for name, digest in self._digests.items():
            module = model.get_submodule(name.rpartition(".")[0])
            assert isinstance(module, EncodedModule)
            leaf = name.rpartition(".")[2]
            parts = module.encoded_parts(leaf)
            for part in parts:
                module.get_parameter(part_parameter_name(leaf, part)).requires_grad_(False)
            try:
                module.encoded_slots[leaf].codec.check_parts(
                    parts, module.encoded_slots[leaf].shape
                )
            except ValueError as error:
                raise InputError(f"{model.name_or_path}: {name!r}: {error}") from error
            if _digest(parts) != digest:
                raise InputError(
                    f"{model.name_or_path}: the bytes of {name!r} are not those that were saved: "
                    f"the file is damaged"
                )

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Return what ``save_pretrained`` writes in the chosen layout."""
        if self.quantization_config.layout == "headrace":
            return None, {}
        state = model.state_dict()
        for name, planned in self._planned.items():
            slots = {
                part: part_parameter_name(name, part) for part in planned.codec.spec(planned.shape)
            }
            parts = {part: state.pop(slot) for part, slot in slots.items()}
            state |= foreign_tensors(name, planned.codec, parts, planned.shape, model.dtype)
        return state, {}

    def is_serializable(self) -> bool:
        """The model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top can be trained."""
        return True


def _one_place(kwargs: Mapping[str, Any]) -> str:
    """Return the device that ``device_map`` names (None: the CPU, as transformers has it)."""
    device_map = kwargs.get("device_map")
    place = next(iter(device_map.values()), "cpu") if isinstance(device_map, dict) else device_map
    return str(torch.device("cpu" if place in (None, "auto") else place))


def _digest(parts: Mapping[str, Tensor]) -> str:
    return parts_digest({part: checksum(value.cpu()) for part, value in parts.items()})


def _declare(model: PreTrainedModel, name: str, planned: PlannedWeight, where: str) -> None:
    try:
        declare_weight(model, name, planned.codec, planned.shape, transposed=planned.transposed)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def _mark_initialised(module: nn.Module) -> None:
    """Tell transformers, in its own way, that these parameters have their values."""
    module._is_hf_initialized = True  # type: ignore[assignment]
    for parameter in module.parameters(recurse=False):
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
