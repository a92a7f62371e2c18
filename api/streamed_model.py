"""The streamed model: still the ``PreTrainedModel`` the user knows, with its weights elsewhere.

``streamed_class`` derives, from a transformers class, a class of the same name whose forward
pass runs inside the stream and whose ``state_dict``, ``to`` and saving deal in real weights.
"""

from __future__ import annotations

import functools
import inspect
import os
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headrace.offload.errors import HeadraceError, UnsupportedModelError
from headrace.offload.head_weight import gathered_head
from headrace.offload.loss import LazyLogits, StreamedHead

from .adapting import check_filled, fill_from_base
from .capture import check_recording
from .pretrained import converted, load_weights, mismatches, places, save_weights, stored_tensors
from .rank_folders import check_mixed_precision
from .streamed import StreamedModel
from .training import Training

if TYPE_CHECKING:
    from headrace.optim.torch_api import RuleOptimizer


_NO_COMPILATION = (
    "a streamed model cannot be compiled: a compiled graph would keep the weights of the visit "
    "that it saw. Leave torch.compile (torch_compile=True) out."
)


@torch.compiler.disable  # what a trace meets, it would otherwise try to work around
def _refuse_compilation() -> None:
    raise HeadraceError(_NO_COMPILATION)


class StreamedFace(StreamedModel):
    """What a streamed model offers to Hugging Face code, mixed into the model's own class."""

    _replaced: bool = False  # whether a forward that replaced the model's own is running

    def __setattr__(self, name: str, value: Any) -> None:
        # Autocast, fused losses and kernels replace a model's forward on the instance.
        if name == "forward" and "_runtime" in self.__dict__:
            value = _replacement(self, value)
        super().__setattr__(name, value)

    def get_output_embeddings(self) -> Any:
        """The head; to a replaced forward, which reads its weight, with the real weight."""
        head = super().get_output_embeddings()  # type: ignore[misc]
        if self._replaced and self._head is not None and head is self._head.module:
            return gathered_head(self._head)
        return head

    # Optimizers find the streamed parameters by this method (headrace.optim.ParameterHost).
    def bind_optimizer(self, optimizer: RuleOptimizer) -> Training:
        """Let ``optimizer``'s rules update the streamed parameters; opens the store."""
        check_filled(self)
        self._training_side.bind(optimizer)
        return self._training_side

    # PEFT sets this when its adapters are in place, and asks for it with hasattr before.
    @property
    def peft_config(self) -> Any:
        """PEFT's configurations by adapter, as in any model with adapters."""
        try:
            return self.__dict__["_peft_config"]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no adapters") from None

    @peft_config.setter
    def peft_config(self, value: Any) -> None:
        self.__dict__["_peft_config"] = value
        fill_from_base(self)

    @peft_config.deleter
    def peft_config(self) -> None:
        del self.__dict__["_peft_config"]

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip by the global norm at the next ``optimizer.step()``; returns the norm."""
        return self._training_side.clip_grad_norm_(max_norm)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Takes what is for streamed parameters; torch goes on with the rest.
        known = places(self)
        own = {prefix + name for name in self._own_names(known)}
        strangers = {key: state_dict[key] for key in state_dict if key not in own}
        if strangers and any(prefix + name not in state_dict for name in known):
            names = {slot: name for name, (_, slot) in known.items()}
            for slot, tensor in converted(
                self, {key.removeprefix(prefix): t for key, t in strangers.items()}
            ).items():
                if slot in names and prefix + names[slot] not in state_dict:
                    state_dict[prefix + names[slot]] = tensor
        found = {n: p for n, p in known.items() if prefix + n in state_dict}
        tensors = {name: state_dict.pop(prefix + name) for name in found}
        wrong = mismatches(self, tensors.items())
        error_msgs += wrong
        if tensors and not wrong:
            given: dict[str, dict[str, Tensor]] = {}
            for name, (chunk, slot) in found.items():
                given.setdefault(chunk, {})[slot] = tensors[name]
            load_weights(self, given, trained=self._training_side.trains_everything)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        loaded = {prefix + name for name in found}

        def not_missing(module: nn.Module, incompatible: Any) -> None:
            handle.remove()
            missing_keys[:] = [key for key in missing_keys if key not in loaded]

        handle = self.register_load_state_dict_post_hook(not_missing)

    def _own_names(self, streamed: Mapping[str, Any]) -> set[str]:
        buffers = (name for name, _ in self.named_buffers())
        parameters = (name for name, _ in self.named_parameters(remove_duplicate=False))
        return {*streamed, *buffers, *parameters}

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Moving is the stream's business: the same device is fine, another is refused."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        self._check_move(device, dtype)
        return self

    def _check_move(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        here = self._runtime.device
        if dtype is not None and dtype != getattr(self, "dtype", dtype):
            raise HeadraceError(
                f"a streamed model cannot be cast to {dtype} in place; load it again with "
                f"headrace.load(..., dtype={dtype})"
            )
        if device is not None and device.type != here.type:
            raise HeadraceError(
                f"a streamed model lives on {here} and cannot be moved to {device}; load it again "
                f"with headrace.load(..., device={str(device)!r})"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # How torch moves and casts modules, and how wrappers around this one reach it.
        kind: Any = self.dtype
        probe = fn(torch.empty(0, dtype=kind, device=self._runtime.device))
        self._check_move(probe.device, probe.dtype)
        return super()._apply(fn, recurse)

    def half(self) -> Any:
        """As ``to(torch.float16)``."""
        return self.to(torch.float16)

    def bfloat16(self) -> Any:
        """As ``to(torch.bfloat16)``."""
        return self.to(torch.bfloat16)

    def float(self) -> Any:
        """As ``to(torch.float32)``."""
        return self.to(torch.float32)

    def double(self) -> Any:
        """As ``to(torch.float64)``."""
        return self.to(torch.float64)

    def cuda(self, device: int | torch.device | None = None) -> Any:
        """As ``to("cuda")``."""
        return self.to(torch.device("cuda") if device is None else torch.device(device))

    def cpu(self) -> Any:
        """As ``to("cpu")``."""
        return self.to(torch.device("cpu"))

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Refused, unless the size stays: a streamed table has its place on disk."""
        table = self.get_input_embeddings()  # type: ignore[operator]
        if new_num_tokens in (None, table.num_embeddings):
            return table
        raise HeadraceError(
            f"the embedding table of a streamed model cannot be resized from "
            f"{table.num_embeddings:,} to {new_num_tokens:,} rows: it has its place on disk. "
            f"Resize it once with transformers (from_pretrained, resize_token_embeddings, "
            f"save_pretrained) and open that folder with headrace.load."
        )

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a compiled graph would keep the weights of the visit that it saw."""
        raise HeadraceError(_NO_COMPILATION)

    def _replicate_for_data_parallel(self) -> Any:
        raise HeadraceError(
            "torch.nn.DataParallel copies a model to every GPU, which a streamed model is too "
            "large for. Start one process per GPU with torchrun or accelerate launch instead."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise HeadraceError(
            "a streamed model cannot be copied: its weights are on disk, its lanes and budgets "
            "are its own. For a second model (a reference, a teacher) call headrace.load again, "
            "with budgets of its own; train='none' if it is only evaluated."
        )

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: streamed layers recompute their activations by themselves."""

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: streamed layers recompute their activations by themselves."""


def _streamed_forward(kind: type[nn.Module]) -> Callable[..., Any]:
    original = kind.forward
    parameters = inspect.signature(original).parameters
    takes_cache = "use_cache" in parameters

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            _refuse_compilation()
        bound = inspect.signature(original).bind_partial(self, *args, **kwargs).arguments
        batch = _batch_of(bound)
        grad = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if grad:
            check_recording(self.config, kwargs)
            if self._training_side.ranks is not None:
                check_mixed_precision()
        if grad and takes_cache:
            # A cache would be filled twice, by the forward visit and by its recomputation.
            if bound.get("past_key_values") is not None:
                raise HeadraceError(
                    "past_key_values was given while gradients are recorded; use torch.no_grad() "
                    "for generation, or train without a cache"
                )
            kwargs["use_cache"] = False
        labels = kwargs.get("labels", bound.get("labels"))
        with self._runtime.forward_pass(batch, training=grad), _expecting(self._head, labels):
            return original(self, *args, **kwargs)

    return forward


def _replacement(model: StreamedFace, value: Any) -> Any:
    """A forward put on the instance, made to run inside the stream."""
    inner = value.__func__ if isinstance(value, types.MethodType) else value

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if model._replaced:
            return inner(*args, **kwargs)
        grad = torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
        if grad:
            check_recording(model.config, kwargs)
        positional = {str(i): value for i, value in enumerate(args)}
        head = model._head
        uses = 0 if head is None else head.uses
        with model._runtime.forward_pass(_batch_of({**positional, **kwargs}), training=grad):
            model._replaced = True
            try:
                output = inner(*args, **kwargs)
            finally:
                model._replaced = False
        asked = head is None or head.uses > uses or model.get_output_embeddings() is not head.module
        if head is not None and not asked and getattr(output, "loss", None) is not None:
            name = getattr(inner, "__qualname__", str(inner))
            raise UnsupportedModelError(
                f"{name}, which replaced this model's forward, made a loss without calling the "
                f"head {head.chunk!r} or get_output_embeddings(); it read a placeholder, and the "
                f"loss is NaN. Switch that fused loss off (use_liger_kernel=False)."
            )
        return output

    return types.MethodType(forward, value.__self__) if inner is not value else forward


def _batch_of(arguments: Mapping[str, Any]) -> int:
    for name in ("input_ids", "inputs_embeds", "pixel_values"):
        value = arguments.get(name)
        if isinstance(value, Tensor):
            return value.shape[0]
    for value in arguments.values():
        if isinstance(value, Tensor) and value.dim() >= 2:
            return value.shape[0]
    raise HeadraceError("the batch size cannot be seen: pass input_ids= or inputs_embeds=")


@contextmanager
def _expecting(head: StreamedHead | None, labels: Any) -> Iterator[None]:
    if head is None or labels is None:
        yield
        return
    head.loss_expected = True
    try:
        yield
    finally:
        head.loss_expected = False


def _loss_function(kind: type[nn.Module]) -> property:
    plain: Any = inspect.getattr_static(kind, "loss_function")

    def loss_function(self: Any) -> Callable[..., Tensor]:
        function = plain.fget(self)

        def tiled(logits: LazyLogits, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args:
                kwargs["vocab_size"] = args[0]
            kwargs.pop("vocab_size", None)
            head, *_ = logits.parts()
            return head.loss(logits, labels, function, kwargs)

        @functools.wraps(function)
        def loss(*args: Any, **kwargs: Any) -> Tensor:
            logits = args[0] if args else kwargs.get("logits")
            # Other losses (classification, regression) take arguments of their own, in their order.
            return (tiled if isinstance(logits, LazyLogits) else function)(*args, **kwargs)

        return loss

    return property(loss_function, plain.fset)


def _state_dict(kind: type[nn.Module]) -> Callable[..., Any]:
    def state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Entries of streamed weights are read when they are used; see ``StoredTensor``."""
        state = kind.state_dict(self, *args, **kwargs)
        prefix = kwargs.get("prefix", "")
        stored = stored_tensors(self)
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if id(parameter) in stored and prefix + name in state:
                state[prefix + name] = stored[id(parameter)]
        return state

    return state_dict


def _save_pretrained(kind: type[nn.Module]) -> Callable[..., Any]:
    base: Any = kind
    original = base.save_pretrained

    @functools.wraps(original)
    def save_pretrained(
        self: Any,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        if state_dict is not None or getattr(self, "_hf_peft_config_loaded", False):
            # Weights that the caller holds, or adapters that transformers itself put in.
            original(self, save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
            return
        if kwargs.get("variant") is not None or not kwargs.get("save_original_format", True):
            raise HeadraceError(
                "a streamed model is saved in the checkpoint's own layout, without a variant; "
                "leave variant= and save_original_format= out"
            )
        if not is_main_process:
            return
        folder = Path(save_directory)
        save_weights(self, folder)
        self._training_side.saved.model_was_saved(folder)
        if push_to_hub:
            repo = kwargs.pop("repo_id", folder.name)
            taken = ("commit_message", "private", "token", "revision", "create_pr")
            self.push_to_hub(repo, **{k: v for k, v in kwargs.items() if k in taken})

    return save_pretrained


def streamed_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of the same name that is both ``kind`` and a ``StreamedFace``."""
    body: dict[str, Any] = {
        "forward": _streamed_forward(kind),
        "state_dict": _state_dict(kind),
        "save_pretrained": _save_pretrained(kind),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    if isinstance(inspect.getattr_static(kind, "loss_function", None), property):
        body["loss_function"] = _loss_function(kind)
    return type(kind.__name__, (StreamedFace, kind), body)
