from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from itertools import pairwise

import numpy as np
import pytest
from rich.console import Console
from test_bench_results import bench

from batchpilot.agents.limits import BatchLimits
from batchpilot.env.bench.figures import (
    PAPER,
    bars_figure,
    latency_figure,
    render,
    tail,
    timeline_figure,
    wrapped,
)
from batchpilot.env.bench.measure import Slo
from batchpilot.env.bench.report import inline_svg, render_report
from batchpilot.env.bench.summary import summarise
from batchpilot.env.bench.table import print_tables


@pytest.fixture(scope="module")
def page():
    return render_report(bench(slo=Slo(itl_slo_ms=15.0, ttft_slo_ms=150.0)))


class Links(HTMLParser):
    """Collects whatever a browser would load or run."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        if tag in ("script", "link", "img", "iframe", "object"):
            self.found.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#"):
                self.found.append(value)


def test_the_report_needs_nothing_from_elsewhere(page):
    links = Links()
    links.feed(page)
    assert links.found == []
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", page))
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_the_report_shows_every_figure_number_and_word(page):
    assert page.count("<svg") == 3
    for text in (
        "goodput, requests/s",
        "static:",
        "batchpilot bench --engine live",
        "target 15 ms",
        "TPOT",
    ):
        assert text in page
    assert "100.0%" in page
    assert "50.0%" in page


def test_the_report_is_small_and_follows_the_theme(page):
    assert len(page) < 3_000_000
    assert "prefers-color-scheme: dark" in page
    assert "var(--series-1)" in page
    assert not re.search(r"#0[12]0[12]0[0-9]", page)


def test_a_report_without_targets_or_results_still_stands():
    page = render_report(bench(refuse=[f"r{i}" for i in range(8)], rounds=1))
    assert "32 requests failed" not in page
    assert "16 requests failed" in page


def test_names_are_escaped():
    results = bench("static")
    assert "<b>" not in render_report(results.__class__(**{**vars(results), "model": "<b>"}))


def labelled(*labels):
    """A bench of policies that are called so."""
    asked = ",".join(f"static:max_num_seqs={index + 1}" for index in range(len(labels)))
    found = bench(asked, slo=Slo(itl_slo_ms=15.0, ttft_slo_ms=150.0), rounds=1)
    names = dict(zip(found.policies, labels, strict=True))
    return replace(found, runs=tuple(replace(run, policy=names[run.policy]) for run in found.runs))


FOLDERS = "learned:/home/somebody/projects/batchpilot/runs"
LONG = [f"{FOLDERS}/{name}/policy:itl_slo_ms=40.0:ttft_slo_ms=2000.0" for name in "abcd"]


def test_a_label_that_looks_like_a_formula_is_shown_as_it_is():
    page = render_report(labelled(r"learned:/a$\frac$", "static"))
    for picture in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert r"learned:/a$\frac$" in picture


@pytest.mark.parametrize(
    ("label", "lines"),
    [
        ("static", ["static"]),
        ("x" * 40, ["x" * 40]),
        ("x" * 41, ["x" * 40, "x"]),
        (
            "static:max_num_seqs=128:max_num_batched_tokens=512",
            ["static:max_num_seqs=128:", "max_num_batched_tokens=512"],
        ),
        (
            LONG[0],
            [
                "learned:/home/somebody/projects/",
                "batchpilot/runs/a/policy:",
                "itl_slo_ms=40.0:ttft_slo_ms=2000.0",
            ],
        ),
    ],
)
def test_a_long_label_takes_several_lines(label, lines):
    assert wrapped(label).split("\n") == lines


@pytest.mark.filterwarnings("error")
def test_long_labels_leave_room_for_what_they_name():
    found = labelled(*LONG)
    bars, timeline = bars_figure(found, PAPER), timeline_figure(found, PAPER)
    latency = latency_figure(found, PAPER, 15.0, 150.0)
    for figure in (bars, timeline, latency):
        figure.draw_without_rendering()
    assert min(axis.get_position().width for axis in bars.axes) > 0.1
    titles = [axis._left_title.get_window_extent() for axis in timeline.axes[::2]]
    assert max(title.x1 for title in titles) < timeline.axes[1].get_window_extent().x0
    key = timeline.axes[0].texts[0].get_window_extent()
    assert not key.overlaps(titles[0])
    assert latency.legends[0].get_window_extent().x1 < latency.bbox.x1
    assert min(axis.get_position().height for axis in latency.axes) > 0.4


@pytest.mark.parametrize(("kind", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_the_timeline_stands_alone(kind, start):
    results = bench()
    assert render(lambda: timeline_figure(results, PAPER), PAPER, kind).startswith(start)


def test_a_figure_is_the_same_every_time():
    results = bench()

    def draw():
        return render(lambda: timeline_figure(results, PAPER), PAPER)

    assert draw() == draw()


def test_an_inlined_figure_is_its_element_alone():
    svg = "<?xml?><!DOCTYPE x><svg a='#010101'><metadata>http://x</metadata><g/></svg>"
    assert inline_svg(svg) == "<svg a='var(--ink)'><g/></svg>"


@pytest.mark.parametrize(
    ("limits", "shadows", "notes"),
    [
        ((3, 3), (None, None), []),
        ((64, 64), (None, None), ["limit 64, above the scale"]),
        ((3, 3), (48, 64), ["the shadow's limit 48-64, above the scale"]),
        ((3, 3), (4, 64), []),
        (
            (64, 64),
            (None, 48),
            ["limit 64, above the scale", "the shadow's limit 48, above the scale"],
        ),
    ],
)
def test_a_limit_above_the_scale_is_told(limits, shadows, notes):
    found = bench("static:max_num_seqs=4", rounds=1)
    (run,) = found.runs
    steps = [
        replaced(run.measurement.timeline[0], limit, shadow)
        for limit, shadow in zip(limits, shadows, strict=True)
    ]
    drawn = replace(run, measurement=replace(run.measurement, timeline=tuple(steps)))
    figure = timeline_figure(replace(found, runs=(drawn,)), PAPER)
    figure.draw_without_rendering()
    texts = [text for text in figure.axes[0].texts if "above the scale" in text.get_text()]
    assert [text.get_text() for text in texts] == notes
    boxes = [text.get_window_extent() for text in texts]
    assert not any(one.overlaps(other) for one, other in pairwise(boxes))


def replaced(sample, limit, shadow):
    """The sample under other limits."""
    beside = BatchLimits(shadow, 64) if shadow else None
    return sample._replace(limits=BatchLimits(limit, 64), shadow=beside)


def test_a_tail_by_hand():
    values, share = tail(np.array([4.0, 1.0, 3.0, 2.0]))
    assert values.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert share.tolist() == [1.0, 0.75, 0.5, 0.25]


def test_a_long_tail_is_thinned_and_keeps_its_end():
    values, share = tail(np.arange(1.0, 100_001.0))
    assert len(values) <= 400
    assert values[-1] == 100_000.0
    assert share[-1] == 1e-5
    assert np.all(np.diff(values) > 0)
    assert np.all(np.diff(share) < 0)


@pytest.mark.parametrize("width", [80, 100])
def test_the_tables_show_every_number_whole(width):
    out = StringIO()
    print_tables(summarise(bench(slo=Slo(ttft_slo_ms=150.0))), Console(file=out, width=width))
    text = out.getvalue()
    assert "…" not in text
    for shown in ("200", "400", "2.00", "50.0%", "100.0%", "16", "TTFT", "160", "310"):
        assert shown in text
