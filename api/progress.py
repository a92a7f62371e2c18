"""Who watches a fine-tuning run: the ``Watcher`` interface, a console and nobody.

The loop tells a watcher what happens and never waits for it.  Nothing here touches the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .budgets import format_bytes


@dataclass(frozen=True, slots=True)
class StepEvent:
    """One finished step: ``step`` counts from 1; bytes and seconds are those of this step."""

    step: int
    steps: int
    loss: float
    lr: float
    num_tokens: int
    seconds: float
    busy_lane: str
    read_bytes: int
    write_bytes: int


class Watcher(ABC):
    """What a run reports while it goes on."""

    @abstractmethod
    def say(self, text: str) -> None:
        """Take one line (or paragraph) of news."""

    @abstractmethod
    def begin(self, steps: int) -> None:
        """Learn that training begins and how many steps it has."""

    @abstractmethod
    def step(self, event: StepEvent) -> None:
        """Learn that a step has ended."""

    @abstractmethod
    def end(self) -> None:
        """Learn that training has ended, well or badly."""


@final
class Silent(Watcher):
    """Watches nothing."""

    def say(self, text: str) -> None:
        """Ignore the news."""

    def begin(self, steps: int) -> None:
        """Ignore the beginning."""

    def step(self, event: StepEvent) -> None:
        """Ignore the step."""

    def end(self) -> None:
        """Ignore the end."""


@final
class ConsoleWatcher(Watcher):
    """A progress bar on a terminal; elsewhere one line for every twentieth part of the run."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None

    def say(self, text: str) -> None:
        """Show the text as it is, above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, steps: int) -> None:
        """Start the bar on a terminal."""
        if not self._console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._bar.add_task("", total=steps)
        self._bar.start()

    def step(self, event: StepEvent) -> None:
        """Move the bar, or write a line when one is due."""
        text = (
            f"loss {event.loss:.3f}  {event.num_tokens / event.seconds:,.0f} tokens/s  "
            f"busy: {event.busy_lane}  read {format_bytes(event.read_bytes)}  "
            f"written {format_bytes(event.write_bytes)}"
        )
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=event.step, description=text)
        elif event.step in (1, event.steps) or event.step % max(1, event.steps // 20) == 0:
            self.say(f"step {event.step}/{event.steps}  {text}")

    def end(self) -> None:
        """Stop the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
