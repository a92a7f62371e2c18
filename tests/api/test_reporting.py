"""Reports: figures, text, page, and the round trip through JSON."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from headrace.errors import InputError
from headrace.offload.budget import BudgetStatistics, Tier
from headrace.offload.timeline import LaneName, LaneStatistics
from headrace.reporting import SUMMARY_NAME, Report, read_report


def make_report(
    *, step_seconds: float | None = 2.0, tokens_per_step: int | None = 1000, reason: str = "read"
) -> Report:
    busy = {LaneName.DISK_READ: (1.5, 3 * 10**9), LaneName.COMPUTE: (0.5, 0)}
    return Report.from_statistics(
        steps=7,
        skipped_steps=1,
        step_seconds=step_seconds,
        tokens_per_step=tokens_per_step,
        budgets=[
            BudgetStatistics(Tier.DEVICE, 4 * 10**8, 0, 3 * 10**8, {}),
            BudgetStatistics(Tier.HOST, 0, 0, 0, {}),
        ],
        lanes=[LaneStatistics(lane, *figures, 3) for lane, figures in busy.items()],
        stall_seconds={reason: 0.25},
    )


class Tags(HTMLParser):
    """Checks that tags nest, and keeps the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        assert not {"src", "href"} & {name for name, _ in attrs}, "the page loads something"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_busiest_lane_is_the_bottleneck() -> None:
    report = make_report()
    assert report.busiest is not None and report.busiest.lane == "disk_read"
    assert report.busiest_fraction == 0.75
    # Reading takes 3x as long as computing 1000 tokens: 3000 tokens would hide it.
    assert report.break_even_tokens(report.busiest) == 3000


def test_the_text_shows_every_figure() -> None:
    text = str(make_report())
    for part in ("steps: 7", "300 MB", "400 MB", "75%", "3 GB", "2 GB/s", "3,000", "0.25"):
        assert part in text
    assert "disk read was the bottleneck: busy 75% of the step" in text


def test_before_the_first_step_there_is_a_report_too() -> None:
    report = make_report(step_seconds=None, tokens_per_step=None)
    assert report.busiest_fraction is None
    assert "No step has run yet." in str(report)
    empty = Report(0, 0, None, None, (), (), {})
    assert empty.busiest is None and "steps: 0" in str(empty) and "steps: 0" in empty.to_html()


def test_the_page_is_well_formed_escaped_and_loads_nothing(tmp_path: Path) -> None:
    report = make_report(reason="<script>alert('BODY')</script>")
    path = tmp_path / "report.html"
    report.save_html(path)
    tags = Tags()
    tags.feed(path.read_text(encoding="utf-8"))
    assert tags.open == []
    assert "<script>alert('BODY')</script>" in "".join(tags.text)
    assert report._repr_html_() == path.read_text(encoding="utf-8")


def test_json_round_trip(tmp_path: Path) -> None:
    report = make_report()
    (tmp_path / SUMMARY_NAME).write_text(json.dumps({"report": report.to_json()}))
    assert read_report(tmp_path) == report


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"report": {}}', '{"report": {"steps": "many"}}', "{bad"]
)
def test_a_file_that_is_no_report_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / SUMMARY_NAME).write_text(content)
    with pytest.raises(InputError, match=SUMMARY_NAME):
        read_report(tmp_path)


def test_a_folder_without_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give the --out folder of a tune run"):
        read_report(tmp_path / "none")
