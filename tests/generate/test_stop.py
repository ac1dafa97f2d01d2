"""Stop strings end the text wherever the pieces are cut, and nothing of them gets out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.generate.stop import StopScan


def scan(stop, pieces):
    stop_scan = StopScan(stop)
    out = [stop_scan.push(piece) for piece in pieces]
    return "".join(out) + ("" if stop_scan.found else stop_scan.end()), stop_scan.found


@given(st.text("ab"), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_cuts_do_not_matter(text, stop, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)])]
    assert scan(stop, pieces) == scan(stop, list(text)) == scan(stop, [text])


@given(st.text("ab"), st.text("ab", min_size=1, max_size=4))
def test_the_text_ends_before_the_first_stop_string(text, stop):
    assert scan([stop], list(text)) == (text.partition(stop)[0], stop if stop in text else None)


def test_text_is_held_back_only_while_it_could_become_a_stop_string():
    stop_scan = StopScan(["\n\ndef"])
    assert [stop_scan.push(p) for p in ["x\n", "\n", "d", "o", "ne"]] == ["x", "", "", "\n\ndo", "ne"]


@pytest.mark.parametrize("stop", ["", ["ok", ""], [None]])
def test_an_empty_stop_string_is_refused(stop):
    with pytest.raises(ValueError, match="must be text of at least one character"):
        StopScan(stop)
