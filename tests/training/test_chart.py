"""The chart: valid SVG, points where the numbers say, round ticks."""

import re
import xml.etree.ElementTree as xml

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditloom.training.chart import Chart, short, smoothed, thinned, ticks


def test_points_lie_where_the_numbers_say():
    lines = {"loss": ([0, 50, 100], [1.0, 0.5, 0.0])}
    chart = Chart(title="a < b", lines=lines, width=200, height=120, margin=(10,) * 4)
    root = xml.fromstring(chart.svg())
    points = next(node for node in root if node.tag.endswith("polyline")).get("points")
    pairs = [tuple(map(float, point.split(","))) for point in points.split()]
    assert [x for x, _ in pairs] == [10, 100, 190]
    assert pairs[0][1] < pairs[1][1] < pairs[2][1] and pairs[1][1] == 60.0
    assert root[0].text == "a < b"


@pytest.mark.parametrize("lines", [{}, {"a": ([], [])}, {"a": ([5], [2.0])}, {"a": ([1, 2], [3.0, 3.0])}])
def test_little_data_is_still_a_chart(lines):
    xml.fromstring(Chart(title="", lines=lines).svg())


def test_a_few_huge_losses_do_not_flatten_the_rest():
    ys = [1e6] + [0.5 + 0.1 * (i % 2) for i in range(200)]
    points = re.search(r'points="([^"]*)"', Chart(title="", lines={"a": (range(201), ys)}).svg())[1]
    rows = [float(row) for row in re.findall(r",([\d.]+)", points)]
    assert max(rows[1:]) - min(rows[1:]) > 100


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_inside_and_few(low, span):
    found = ticks(low, low + span)
    assert 1 <= len(found) <= 7 and all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in found)


def test_numbers_are_short():
    assert [short(v) for v in (0.25, 1500, 250_000, 1_200_000)] == ["0.25", "1,500", "250k", "1.2M"]


def test_thinning_and_smoothing_keep_means():
    xs, ys = list(range(5000)), [float(i % 10) for i in range(5000)]
    thin = thinned(xs, ys)
    assert len(thin) <= 600 and sum(y for _, y in thin) / len(thin) == pytest.approx(4.5, abs=0.1)
    assert smoothed([3.0] * 50) == [3.0] * 50
    assert smoothed(ys)[2500] == pytest.approx(4.5, abs=0.1)
