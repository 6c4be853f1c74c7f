from __future__ import annotations

import re
from html.parser import HTMLParser
from io import StringIO

import numpy as np
import pytest
from rich.console import Console
from test_bench_results import bench

from batchpilot.env.bench.figures import PAPER, render, tail, timeline_figure
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
