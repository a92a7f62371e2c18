"""``headrace zo replay``: a base model and a replay log become an ordinary model folder.

Weights stream through memory, one chunk at a time: read, brought up to date on all cores, written.
The base is compared with the log's fingerprint before anything is written, and the folder appears
whole or not at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from torch import Tensor

from .closing import ClosedAfter
from .errors import InputError
from .exporting import write_model
from .preparation import load_tokenizer
from .progress import Watcher
from .saving import check_new_folder, written_whole
from .streamed import StreamedModel
from .zo_run import check_plain

if TYPE_CHECKING:
    from headrace.zo.replay import Replayer


@final
@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What was rebuilt."""

    out: Path
    steps: int
    skipped_steps: int
    trained_tensors: int
    trained_parameters: int

    def to_json(self) -> dict[str, Any]:
        """Return a dict that ``json.dumps`` takes."""
        return {**asdict(self), "out": str(self.out)}


def replay_run(
    base: str, log: Path, out: Path, *, watcher: Watcher, threads: int | None = None
) -> ReplayResult:
    """Rebuild the model that a zeroth-order run trained, from its base and its log.

    ``base`` is the folder or hub id that the run began with; ``threads`` None uses every core.
    Reads the base twice (once to compare it with the log).  Memory: the largest chunk about four
    times.  Raises ``InputError`` where a file is missing and ``StoreFormatError`` where the log is
    damaged or belongs to another base.
    """
    from headrace.zo.log import read_log
    from headrace.zo.replay import Replayer

    check_new_folder(out)
    if not log.is_file():
        raise InputError(f"{log}: no such file; give the replay log of a zeroth-order run")
    header, records = read_log(log)
    # The tokenizer is read first: a folder without one is refused in one line.
    tokenizer = load_tokenizer(base)
    with Replayer(header, records, threads=threads or os.cpu_count() or 1) as replayer:
        model = _opened(base)
        with ClosedAfter(model.close):
            check_plain(
                model,
                base,
                "give the checkpoint that they were made of if the run began with that one; a "
                "run over encoded weights is taken up from Python (ZOStep.resume)",
            )
            _check_base(model, replayer, header.base, f"{log} and {base}")
            watcher.say(f"{len(records)} steps on {len(replayer.trained)} tensors")
            with written_whole(out) as folder:
                write_model(model, folder, change=_shown(replayer, watcher))
                replayer.check_complete()
                tokenizer.save_pretrained(folder)
                shutil.copyfile(log, folder / "replay.zolog")
        return ReplayResult(
            out=out,
            steps=len(records),
            skipped_steps=sum(record.skipped for record in records),
            trained_tensors=len(replayer.trained),
            trained_parameters=sum(_numel(shape) for shape in replayer.trained.values()),
        )


def _opened(base: str) -> StreamedModel:
    from .loading import load

    path = Path(base).expanduser()
    model: Any = load(path.absolute() if path.is_dir() else base, train="none", device="cpu")
    assert isinstance(model, StreamedModel)
    return model


def _check_base(model: StreamedModel, replayer: Replayer, wanted: str, what: str) -> None:
    from headrace.offload.errors import StoreFormatError
    from headrace.zo.replay import fingerprint

    def trained() -> Iterator[tuple[str, Tensor]]:
        for _, stored in model.chunk_tensors():
            for name in stored.keys() & replayer.trained.keys():
                yield name, stored[name]

    found = fingerprint(trained())
    if found != wanted:
        raise StoreFormatError(
            f"{what} do not belong together: the log begins with weights of fingerprint {wanted}, "
            f"the base has {found}; give the model that the run began with"
        )


def _shown(replayer: Replayer, watcher: Watcher) -> Any:
    done = 0

    def change(chunk: str, tensors: dict[str, Tensor]) -> None:
        nonlocal done
        replayer.apply(tensors)
        done += len(tensors.keys() & replayer.trained.keys())
        watcher.say(f"{chunk}: {done} of {len(replayer.trained)} tensors rebuilt")

    return change


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
