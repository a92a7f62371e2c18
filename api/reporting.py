"""What a run did: lanes, peaks against budgets, stalls, as text, as a page and as JSON.

A ``Report`` is a frozen copy of the engine's statistics: it holds no model and no tensor, and it
survives a round trip through JSON.  The figures of the lanes are those of the last step; peaks
and stalls are those of the whole run.  The page is one HTML file that loads nothing.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from .budgets import format_bytes
from .errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from headrace.offload.budget import BudgetStatistics
    from headrace.offload.runtime import EngineStatistics
    from headrace.offload.timeline import LaneStatistics


@dataclass(frozen=True, slots=True)
class TierReport:
    """Peak bytes of one tier against its budget."""

    tier: str
    limit_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class LaneReport:
    """What one lane did in the last step."""

    lane: str
    busy_seconds: float
    nbytes: int
    count: int


@final
@dataclass(frozen=True, slots=True)
class Report:
    """A run's statistics, ready to be shown: ``str(report)``, ``report.to_html()``, a notebook.

    ``tokens_per_step`` is what the caller trained on in a step, or None if unknown.

    >>> from pathlib import Path
    >>> import headrace
    >>> model = headrace.load(
    ...     "model-folder", train="none", device="cpu", device_budget="1GB", host_budget="2GB"
    ... )
    >>> report = headrace.report(model)
    >>> print(report)
    steps: 0
    steps skipped (inf or NaN): 0
    <BLANKLINE>
    Peak bytes
      tier    peak  budget  used
      device   0 B    1 GB    0%
      host     0 B    2 GB    0%
    <BLANKLINE>
    No step has run yet.
    >>> headrace.Report.from_json(report.to_json(), path=Path("report.json")) == report
    True
    >>> model.close()
    """

    steps: int
    skipped_steps: int
    step_seconds: float | None
    tokens_per_step: int | None
    tiers: tuple[TierReport, ...]
    lanes: tuple[LaneReport, ...]
    stall_seconds: dict[str, float]

    @classmethod
    def from_statistics(
        cls,
        *,
        steps: int,
        skipped_steps: int,
        step_seconds: float | None,
        tokens_per_step: int | None,
        budgets: Sequence[BudgetStatistics],
        lanes: Sequence[LaneStatistics],
        stall_seconds: Mapping[str, float],
    ) -> Report:
        """Copy the engine's statistics."""
        return cls(
            steps=steps,
            skipped_steps=skipped_steps,
            step_seconds=step_seconds,
            tokens_per_step=tokens_per_step,
            tiers=tuple(TierReport(b.tier.value, b.limit_bytes, b.peak_bytes) for b in budgets),
            lanes=tuple(LaneReport(s.lane.value, s.busy_seconds, s.nbytes, s.count) for s in lanes),
            stall_seconds=dict(stall_seconds),
        )

    @classmethod
    def from_json(cls, record: Mapping[str, Any], *, path: Path) -> Report:
        """Read what ``to_json`` wrote; ``path`` names the file in the error."""
        try:
            return cls(
                steps=int(record["steps"]),
                skipped_steps=int(record["skipped_steps"]),
                step_seconds=None
                if record["step_seconds"] is None
                else float(record["step_seconds"]),
                tokens_per_step=None
                if record["tokens_per_step"] is None
                else int(record["tokens_per_step"]),
                tiers=tuple(TierReport(**tier) for tier in record["tiers"]),
                lanes=tuple(LaneReport(**lane) for lane in record["lanes"]),
                stall_seconds={str(k): float(v) for k, v in record["stall_seconds"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: is not a report of a run ({error})") from error

    def to_json(self) -> dict[str, Any]:
        """Return a dict that ``json.dumps`` takes."""
        return asdict(self)

    @property
    def busiest(self) -> LaneReport | None:
        """The lane that was busy longest in the last step, or None before the first."""
        return max(self.lanes, key=lambda lane: lane.busy_seconds, default=None)

    @property
    def busiest_fraction(self) -> float | None:
        """Busy share of the busiest lane in the last step: 1.0 is the roofline of this machine."""
        if self.busiest is None or not self.step_seconds:
            return None
        return self.busiest.busy_seconds / self.step_seconds

    def break_even_tokens(self, lane: LaneReport) -> float | None:
        """Tokens a step at which this lane would be as busy as the compute lane (T*).

        With more tokens a step the lane hides behind compute.  None if tokens are unknown.
        """
        compute = next((s for s in self.lanes if s.lane == "compute"), None)
        if self.tokens_per_step is None or compute is None or not compute.busy_seconds:
            return None
        return self.tokens_per_step * lane.busy_seconds / compute.busy_seconds

    def _verdict(self) -> str:
        if self.busiest is None or self.busiest_fraction is None:
            return "No step has run yet."
        return (
            f"{_words(self.busiest.lane)} was the bottleneck: busy "
            f"{self.busiest_fraction:.0%} of the step."
        )

    def _facts(self) -> list[tuple[str, str]]:
        facts = [
            ("steps", f"{self.steps:,}"),
            ("steps skipped (inf or NaN)", f"{self.skipped_steps:,}"),
        ]
        if self.step_seconds is not None:
            facts.append(("seconds of the last step", f"{self.step_seconds:.2f}"))
        if self.tokens_per_step is not None:
            facts.append(("tokens a step (T)", f"{self.tokens_per_step:,}"))
        return facts

    def _tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        tiers = [
            [
                tier.tier,
                format_bytes(tier.peak_bytes),
                format_bytes(tier.limit_bytes),
                f"{tier.peak_bytes / tier.limit_bytes:.0%}" if tier.limit_bytes else "-",
            ]
            for tier in self.tiers
        ]
        lanes = []
        for lane in self.lanes:
            tokens = self.break_even_tokens(lane)
            lanes.append(
                [
                    _words(lane.lane),
                    f"{lane.busy_seconds:.2f}",
                    f"{lane.busy_seconds / self.step_seconds:.0%}" if self.step_seconds else "-",
                    format_bytes(lane.nbytes),
                    f"{format_bytes(lane.nbytes / lane.busy_seconds)}/s"
                    if lane.nbytes and lane.busy_seconds
                    else "-",
                    "-" if tokens is None or lane.lane == "compute" else f"{tokens:,.0f}",
                ]
            )
        waits = sorted(self.stall_seconds.items(), key=lambda item: -item[1])[:_STALLS_SHOWN]
        stalls = [[reason, f"{seconds:.2f}"] for reason, seconds in waits if seconds >= 0.005]
        tables = [
            ("Peak bytes", ["tier", "peak", "budget", "used"], tiers),
            (
                "Lanes in the last step",
                ["lane", "busy s", "busy", "bytes", "rate", "T* tokens"],
                lanes,
            ),
            ("Compute waited for", ["reason", "seconds"], stalls),
        ]
        return [table for table in tables if table[2]]

    def __str__(self) -> str:
        blocks = ["\n".join(f"{name}: {value}" for name, value in self._facts())]
        blocks += [_text_table(*table) for table in self._tables()]
        return "\n\n".join([*blocks, self._verdict()])

    def to_html(self) -> str:
        """Return the page: one self-contained HTML document."""
        body = [f"<p><b>{html.escape(self._verdict())}</b></p>", "<ul>"]
        body += [f"<li>{html.escape(n)}: {html.escape(v)}</li>" for n, v in self._facts()]
        body.append("</ul>")
        for title, header, rows in self._tables():
            body.append(f"<h2>{html.escape(title)}</h2><table><tr>")
            body += [f"<th>{html.escape(cell)}</th>" for cell in header]
            body.append("</tr>")
            body += ["<tr>" + "".join(_html_cell(cell) for cell in row) + "</tr>" for row in rows]
            body.append("</table>")
        return _PAGE.replace("BODY", "\n".join(body))

    def _repr_html_(self) -> str:
        return self.to_html()

    def save_html(self, path: Path) -> None:
        """Write the page to a file."""
        path.write_text(self.to_html(), encoding="utf-8")


_STALLS_SHOWN = 8

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Headrace report</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1f24; background: #fff; }
table { border-collapse: collapse; }
th, td { text-align: right; padding: .25rem .8rem; border-bottom: 1px solid #d8dee4; }
th:first-child, td:first-child { text-align: left; }
.share { background: linear-gradient(90deg, #9ec5fe var(--share), transparent var(--share)); }
</style></head><body><h1>Headrace report</h1>
BODY
</body></html>
"""


def _html_cell(cell: str) -> str:
    if cell.endswith("%"):
        return f'<td class="share" style="--share: {html.escape(cell)}">{html.escape(cell)}</td>'
    return f"<td>{html.escape(cell)}</td>"


def _words(lane: str) -> str:
    return lane.replace("_", " ")


def _text_table(title: str, header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [title]
    for row in [header, *rows]:
        first, *others = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def statistics(model: nn.Module) -> EngineStatistics:
    """Return a snapshot of a streamed model's run; adapters wrapped around it are seen through.

    Example: ``headrace.statistics(model).budgets[Tier.HOST].peak_bytes``.

    >>> import headrace
    >>> from headrace.offload.budget import Tier
    >>> model = headrace.load("model-folder", train="none", device="cpu", host_budget="64MB")
    >>> headrace.statistics(model).budgets[Tier.HOST].limit_bytes
    64000000
    >>> model.close()
    """
    from .streamed import runtime_of

    return runtime_of(model).statistics()


def report(model: nn.Module, *, tokens_per_step: int | None = None) -> Report:
    """Return what a streamed model did so far; see ``Report``.

    ``print(headrace.report(model))`` shows text; a notebook shows the page.

    >>> import headrace
    >>> model = headrace.load("model-folder", train="none", device="cpu")
    >>> headrace.report(model, tokens_per_step=4096).tokens_per_step
    4096
    >>> model.close()
    """
    found = statistics(model)
    last = found.last_step
    return Report.from_statistics(
        steps=found.steps,
        skipped_steps=found.skipped_steps,
        step_seconds=None if last is None else last.seconds,
        tokens_per_step=tokens_per_step,
        budgets=list(found.budgets.values()),
        lanes=[] if last is None else list(last.lanes.values()),
        stall_seconds=found.stalls,
    )


def read_report(folder: Path) -> Report:
    """Return the report that ``headrace tune`` left in its output folder."""
    path = folder / SUMMARY_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give the --out folder of a tune run"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("report"), dict):
        raise InputError(f"{path}: holds no report; give the --out folder of a tune run")
    return Report.from_json(record["report"], path=path)


SUMMARY_NAME = "headrace.json"
