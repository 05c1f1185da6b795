"""Where tokens are: one place computes offsets, and its answers agree with each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditloom.contracts.layout import Layout, Span

STREAMS = ("image", "text", "third")
SPANS = st.lists(
    st.tuples(st.integers(1, 9), st.sampled_from(STREAMS), st.sampled_from(["t", "zero", "own"])),
    min_size=1,
    max_size=7,
)


def layout_of(spans: list[tuple[int, str, str]]) -> Layout:
    made = (Span(f"s{i}", n, stream, kind) for i, (n, stream, kind) in enumerate(spans))  # type: ignore[arg-type]
    return Layout(tuple(made))


@given(SPANS)
def test_slices_tile_every_stream_and_the_whole(spans: list[tuple[int, str, str]]) -> None:
    layout = layout_of(spans)
    for stream in layout.streams:
        covered = [i for span in layout.of(stream) for i in range(*layout.slice(span.name).indices(10**6))]
        assert covered == list(range(layout.length(stream)))
        assert sum(layout.groups(stream)) == layout.length(stream)
    joint = [i for s in layout.streams for i in range(*layout.stream_slice(s).indices(10**6))]
    assert joint == list(range(layout.length()))
    for span in layout.spans:
        inside, base = layout.slice(span.name), layout.stream_slice(span.stream)
        assert layout.joint_slice(span.name) == slice(base.start + inside.start, base.start + inside.stop)


@given(SPANS)
def test_adding_a_span_moves_none_of_its_stream(spans: list[tuple[int, str, str]]) -> None:
    layout = layout_of(spans)
    more = layout.with_spans(Span("more", 3, layout.spans[0].stream))
    assert all(more.slice(s.name) == layout.slice(s.name) for s in layout.spans)
    assert more.length() == layout.length() + 3 and "more" in more and "more" not in layout
    assert hash(more) != hash(layout) and more == layout.with_spans(Span("more", 3, layout.spans[0].stream))


def test_groups_join_equal_times_only() -> None:
    layout = layout_of(
        [(2, "image", "t"), (3, "image", "t"), (1, "image", "zero"), (4, "image", "own"), (5, "image", "own")]
    )
    assert layout.groups("image") == (5, 1, 4, 5)


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(KeyError, match="no segment 'depth': the layout has \\['s0'\\]"):
        layout_of([(2, "image", "t")]).slice("depth")
