"""``headrace.load``: a ``PreTrainedModel`` whose weights stay on disk until they are needed."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from headrace.offload.activation import Parking, ParkPlace
from headrace.offload.backing import Backing, SourceBacking
from headrace.offload.budget import Budget, Tier
from headrace.offload.chunk import ChunkLayout
from headrace.offload.device_memory import open_device_pool
from headrace.offload.embedding import StreamedEmbedding
from headrace.offload.engine import Chunk, Engine
from headrace.offload.errors import SourceError
from headrace.offload.io import DiskLanes
from headrace.offload.lanes import open_lanes, pin_host_memory, unpin_host_memory
from headrace.offload.layer import stream_module
from headrace.offload.loss import StreamedHead
from headrace.offload.pool import SlabPool
from headrace.offload.ranks import Ranks
from headrace.offload.runtime import BoundParameters, Runtime, placeholder
from headrace.offload.scratch import Scratch
from headrace.offload.source import ReadPlan
from headrace.offload.timeline import Timeline
from headrace.offload.workspace import Workspace
from headrace.quant.folder import INDEX_NAME, EncodedFolder
from headrace.quant.linear import EncodedModule, part_parameter_name
from headrace.quant.model import declare_encoded, decoding_bytes

from .budgets import default_budgets, parse_bytes
from .capture import open_tap
from .checkpoint import Checkpoint, ConvertedBacking
from .closing import ClosedAfter
from .compatibility import chosen_dtype, dtype_plan
from .copying import make_copyable
from .errors import InputError
from .native_checkpoint import AssembledBacking, plan_native, take_quantization_settings
from .rank_folders import find_ranks, rank_folder
from .selection import Selection, SlimFit, selection_of, train_only
from .streamed import StreamedModel
from .streamed_model import streamed_class
from .streamed_parameter import streamed_parameter
from .structure import ModuleChunk, Role, cut
from .training import Training, TrainingOptions

_TRAIN = ("adapters", "all", "none")
HANG_SECONDS = 120.0  # a disk request that takes longer is reported as stuck


def load(
    model: str | Path,
    *,
    train: str | Sequence[str] | Selection = "adapters",
    device: str | torch.device | None = None,
    device_budget: int | str | None = None,
    host_budget: int | str | None = None,
    store: str | Path | Sequence[str | Path] | Mapping[str | Path, float] | None = None,
    micro_batch: int | None = None,
    update: str | None = None,
    durability: str = "step",
    snapshot_every: int = 50,
    activations: str = "auto",
    loss_tile: int | str | None = None,
    dtype: torch.dtype | str | None = None,
    auto_class: type = AutoModelForCausalLM,
    resume: bool = False,
) -> PreTrainedModel:
    """Open a model for streaming: a ``PreTrainedModel`` with nothing big in memory yet.

    ``model`` is a folder or a hub id.  ``train``: ``"adapters"`` (frozen base, read in place and
    never written; put PEFT adapters on top), ``"all"`` (full fine-tuning; needs ``store``),
    ``"none"`` (evaluation, generation, zeroth order), or a choice of weights (needs ``store``):
    ``"spectrum:0.25"``, ``"slimfit:0.5"``, ``"regex:PATTERN"``, names, or a ``Selection``.

    Memory: ``device_budget`` and ``host_budget`` in bytes or text (``"12GB"``); default: what is
    free, less a stated margin.  On ``device="cpu"`` both are RAM.  ``store``: the folder, or a
    list or weighted mapping of folders on several drives, that holds what changes.

    ``micro_batch``: sequences that pass through a layer at a time (None: the whole batch).
    ``update``: when streamed parameters are updated, ``"forward"`` (default: exact clipping by
    the global norm) or ``"backward"`` (least memory, no clipping).  ``durability``: ``"step"``
    (every step survives a crash), ``"checkpoint"`` (every ``snapshot_every`` steps) or
    ``"none"``.  ``activations``: where chunk inputs are parked, ``"auto"``, ``"device"``,
    ``"host"`` or ``"disk"``.  ``loss_tile``: bytes of working memory for logits (None: a quarter
    of the device budget).  ``dtype``: of the weights (None: the checkpoint's).

    Raises ``InputError`` for options that cannot work, ``SourceError`` for shards that are
    missing or damaged, ``BudgetError`` naming the chunk that does not fit and what would, and
    ``UnsupportedModelError`` naming a module that cannot be streamed.

    >>> import headrace
    >>> import torch
    >>> from headrace.optim import adamw
    >>> model = headrace.load(
    ...     "model-folder", train="all", store="run1", device="cpu", host_budget="64MB"
    ... )
    >>> optimizer = adamw(model, lr=1e-3)
    >>> tokens = torch.tensor([[1, 2, 3, 4]])
    >>> model(input_ids=tokens, labels=tokens).loss.backward()
    >>> optimizer.step()
    >>> model.close()
    """
    selection = None if train in _TRAIN else selection_of(train)
    trains_weights = train == "all" or selection is not None
    if resume and isinstance(selection, SlimFit):
        raise InputError("train='slimfit' measures movements that a store does not hold: no resume")
    if update not in (None, "backward", "forward"):
        raise InputError(f"update is {update!r}; choose 'backward' or 'forward'")
    place = ParkPlace(activations)
    target = _device(device)
    folder = find_folder(model)
    ranks = None if train == "none" else find_ranks()
    paths = {rank_folder(path, ranks): weight for path, weight in _store_paths(store).items()}
    if trains_weights and not paths:
        raise InputError(f"train={train!r} keeps weights and states on disk: give store='FOLDER'")
    config = AutoConfig.from_pretrained(folder)
    native_settings = take_quantization_settings(config)
    kind = chosen_dtype(dtype, config)
    with init_empty_weights(include_buffers=False):
        skeleton = auto_class.from_config(config, dtype=kind)  # type: ignore[attr-defined]
    _apply_dtype_plan(skeleton, kind)
    encoded = (folder / INDEX_NAME).exists()
    native = None
    if (encoded or native_settings) and trains_weights:
        raise InputError(
            f"{folder} holds encoded weights, which cannot be trained themselves; load it with "
            f"train='adapters', or load the checkpoint that it was made of"
        )
    if encoded:
        declare_encoded(skeleton, EncodedFolder(folder).records)
    elif native_settings:
        native = plan_native(skeleton, folder, native_settings)
        native.declare(skeleton)
    skeleton.tie_weights()
    # Conversion works on a twin that stays on meta: the model itself is about to be streamed.
    checkpoint = Checkpoint(
        copy.deepcopy(skeleton), folder, kind, converted=not encoded, native=native
    )
    chunks = cut(skeleton)
    check_complete(skeleton, checkpoint, chunks, folder)
    budgets = default_budgets(str(target), device_budget=device_budget, host_budget=host_budget)
    if (folder / "generation_config.json").exists():
        skeleton.generation_config = GenerationConfig.from_pretrained(folder)
    options = None
    if trains_weights or (train == "adapters" and paths):
        options = TrainingOptions(
            paths=paths,
            update=update or "forward",
            durability=durability,
            snapshot_every=snapshot_every,
            fingerprint=_fingerprint(skeleton, chunks, ranks),
            meta={
                "model": str(folder.absolute()),
                "train": train if selection is None else str(selection),
                "dtype": str(kind).removeprefix("torch."),
                "update": update or "forward",
                "micro_batch": micro_batch,
            },
            resume=resume,
        )
    scratch_folder = next(iter(paths), None)
    with ExitStack() as opened:
        attach(
            skeleton,
            chunks,
            checkpoint,
            device=target,
            device_bytes=budgets.device_bytes,
            host_bytes=budgets.host_bytes,
            scratch_folder=None if scratch_folder is None else scratch_folder / "scratch",
            micro_batch=micro_batch,
            place=place,
            tile_bytes=(
                budgets.device_bytes // 4
                if loss_tile is None
                else parse_bytes(loss_tile, what="loss_tile")
            ),
            trainable=trains_weights,
            options=options,
            ranks=ranks,
            opened=opened,
        )
        if selection is not None:
            assert isinstance(skeleton, StreamedModel)
            train_only(skeleton, selection.choose(skeleton))
        opened.pop_all()
    return skeleton


def attach(
    model: PreTrainedModel,
    chunks: Sequence[ModuleChunk],
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    device_bytes: int,
    host_bytes: int,
    scratch_folder: Path | None,
    micro_batch: int | None,
    place: ParkPlace,
    tile_bytes: int,
    trainable: bool,
    options: TrainingOptions | None,
    ranks: Ranks | None,
    opened: ExitStack,
) -> None:
    """Put placeholders, chunks and lanes under a model whose parameters are on meta."""
    closing = ExitStack()
    opened.push(ClosedAfter(closing.close))
    timeline = Timeline()
    host_budget = Budget(Tier.HOST, limit_bytes=host_bytes)
    device_budget = Budget(Tier.DEVICE, limit_bytes=device_bytes)
    disk = closing.enter_context(DiskLanes(timeline=timeline, hang_timeout_seconds=HANG_SECONDS))
    closing.callback(checkpoint.index.close)
    cuda = device.type == "cuda"
    host = SlabPool(
        host_budget,
        pin=pin_host_memory if cuda else None,
        unpin=unpin_host_memory if cuda else None,
    )
    closing.callback(host.close)
    engine = Engine(
        lanes=open_lanes(device, timeline),
        host=host,
        device=open_device_pool(device_budget, device),
        host_budget=host_budget,
        timeline=timeline,
    )
    closing.callback(engine.close)
    scratch = None
    if scratch_folder is not None:
        scratch = Scratch(scratch_folder, disk)
        closing.callback(scratch.close)
    parameters = _materialize(model, chunks, device, trainable=trainable)
    bound: dict[str, BoundParameters] = {}
    decoding: dict[str, int] = {}
    for chunk in chunks:
        layout = ChunkLayout.pack(
            chunk.name, [(n, p.shape, p.dtype) for n, p in chunk.parameters.items()]
        )
        backing = _backing(checkpoint, layout, disk)
        gathered = chunk.role is Role.EMBEDDING
        engine.add(Chunk(layout, backing, gathered=gathered))
        bound[chunk.name] = BoundParameters({n: parameters[n] for n in chunk.parameters}, device)
        decoding[chunk.name] = max(decoding_bytes(module) for module in chunk.modules)
    engine.check_budgets()
    sizes = sorted((c.layout.nbytes for c in engine.chunks.values()), reverse=True)
    device_reserve = sum(sizes[:2]) + (sum(sizes[:2]) if trainable else 0)
    workspace = Workspace(engine, expected_bytes=tile_bytes + sizes[0])
    runtime = Runtime(
        engine=engine,
        host_budget=host_budget,
        device_budget=device_budget,
        timeline=timeline,
        parking=Parking(
            engine,
            scratch,
            place=place,
            device_reserve_bytes=device_reserve,
            host_reserve_bytes=min(host_bytes, sum(sizes[:3])),
            workspace=workspace,
        ),
        bound=bound,
        device=device,
        micro_batch=micro_batch,
        workspace=workspace,
        tap=open_tap(),
        decoding_bytes=decoding,
        closing=closing,
    )
    names = list(engine.chunks)
    gathered_names = frozenset(c.name for c in chunks if c.role is Role.EMBEDDING)
    runtime.training_schedule(names, frozenset(), "backward", gathered=gathered_names)
    head = _stream_modules(runtime, model, chunks, tile_bytes)
    make_copyable(runtime, chunks)
    model.__class__ = streamed_class(type(model))  # type: ignore[assignment]
    assert isinstance(model, StreamedModel)
    model._runtime = runtime
    model._head = head
    model._training_side = Training(runtime, disk, scratch, gathered_names, options, ranks)
    if ranks is not None:
        # Gradients are averaged chunk by chunk: DistributedDataParallel must not wrap it.
        model._is_accelerate_prepared = True
    closing.callback(runtime.workspace.close)
    closing.callback(runtime.parking.close)
    model.train(trainable)


def _stream_modules(
    runtime: Runtime, model: PreTrainedModel, chunks: Sequence[ModuleChunk], tile_bytes: int
) -> StreamedHead | None:
    embedding: StreamedEmbedding | None = None
    head: StreamedHead | None = None
    names = {id(m): n for n, m in model.named_modules()}
    for chunk in chunks:
        module = chunk.modules[0]
        if chunk.role in (Role.EMBEDDING, Role.TIED):
            assert isinstance(module, nn.Embedding)
            slot = f"{names[id(module)]}.weight"
            embedding = StreamedEmbedding(runtime, chunk.name, slot, module)
    for chunk in chunks:
        if chunk.role in (Role.HEAD, Role.TIED):
            module = chunk.modules[-1]
            assert isinstance(module, nn.Linear)
            head = StreamedHead(
                runtime,
                chunk.name,
                module,
                vocabulary=module.out_features,
                tile_bytes=tile_bytes,
                embedding=embedding if chunk.role is Role.TIED else None,
            )
        elif chunk.role in (Role.LAYER, Role.REST, Role.POSITIONS):
            stream_module(
                runtime,
                chunk.name,
                chunk.modules[0],
                position_table=chunk.role is Role.POSITIONS,
            )
    return head


def _backing(checkpoint: Checkpoint, layout: ChunkLayout, disk: DiskLanes) -> Backing:
    keys = checkpoint.in_place(layout)
    if keys is None:
        pieces = checkpoint.pieces(layout)
        if pieces:
            return AssembledBacking(
                checkpoint.index, layout, pieces, disk, convert=checkpoint.convert
            )
        return ConvertedBacking(checkpoint, layout)
    plan = ReadPlan(checkpoint.index, list(keys.values()), lanes=disk)
    return SourceBacking(plan, layout, keys)


def _materialize(
    model: PreTrainedModel,
    chunks: Sequence[ModuleChunk],
    device: torch.device,
    *,
    trainable: bool,
) -> dict[str, nn.Parameter]:
    """Replace meta parameters by placeholders on the device, ties kept; buffers move too."""
    made: dict[int, nn.Parameter] = {}
    by_name: dict[str, nn.Parameter] = {}
    parts = {
        id(module._parameters[part_parameter_name(weight_name, part)])
        for module in model.modules()
        if isinstance(module, EncodedModule)
        for weight_name, slot in module.encoded_slots.items()
        for part in slot.codec.spec(slot.shape)
    }
    for chunk in chunks:
        for name, parameter in chunk.parameters.items():
            # Parts of encoded weights stay plain: their codec may be asked to decode the NaN.
            make = nn.Parameter if id(parameter) in parts else streamed_parameter
            made[id(parameter)] = by_name[name] = make(
                placeholder(parameter, device), requires_grad=trainable
            )
    for module in model.modules():
        for leaf, old in module._parameters.items():
            if old is not None:
                module._parameters[leaf] = made[id(old)]
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[leaf] = buffer.to(device)
    return by_name


def _apply_dtype_plan(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the parameters that the model keeps in fp32 that dtype, as from_pretrained does."""
    plan = dtype_plan(model, dtype)
    if not plan:
        return
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        wanted = next((d for pattern, d in plan.items() if re.search(pattern, name)), None)
        if wanted is not None and wanted is not parameter.dtype:
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._parameters[leaf] = nn.Parameter(
                torch.empty(parameter.shape, dtype=wanted, device="meta")
            )


def check_complete(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    chunks: Sequence[ModuleChunk],
    folder: Path,
) -> None:
    missing = checkpoint.missing([n for c in chunks for n in c.parameters])
    if missing:
        raise SourceError(
            f"{folder}: {len(missing)} tensors that {type(model).__name__} needs are not in the "
            f"checkpoint, the first {missing[0]!r}. It is incomplete, or of another model."
        )


def _fingerprint(
    model: PreTrainedModel, chunks: Sequence[ModuleChunk], ranks: Ranks | None
) -> dict[str, Any]:
    """What a store belongs to: the class, every parameter's name, shape and dtype, the rank."""
    lines = [f"{n} {tuple(p.shape)} {p.dtype}" for c in chunks for n, p in c.parameters.items()]
    of_rank = {} if ranks is None else {"rank": f"{ranks.rank} of {ranks.count}"}
    return of_rank | {
        "class": type(model).__name__,
        "parameters": xxhash.xxh3_128_hexdigest("\n".join(lines).encode()),
    }


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device is {device!r}; give 'cuda', 'cuda:N' or 'cpu'") from error
    if target.type not in ("cpu", "cuda"):
        raise InputError(f"device is {device!r}; only 'cuda' and 'cpu' can stream")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device is {device!r}, but {torch.cuda.device_count()} CUDA devices are visible; "
            f"give 'cpu', or install a torch with CUDA"
        )
    return target


def find_folder(model: str | Path) -> Path:
    """The folder of a checkpoint: as given, or from the hub's cache (downloading if need be)."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists() or path.is_absolute() or str(model).count("/") > 1:
        raise InputError(f"{path}: there is no such model folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(model),
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
            )
        )
    except Exception as error:
        raise InputError(
            f"{model!r} is neither a folder nor a model that the hub gave: {error}"
        ) from error


def _store_paths(store: Any) -> dict[Path, float]:
    if store is None:
        return {}
    if isinstance(store, (str, Path)):
        return {Path(store): 1.0}
    if isinstance(store, Mapping):
        return {Path(p): float(w) for p, w in store.items()}
    return {Path(p): 1.0 for p in store}
