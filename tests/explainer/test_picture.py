"""The README's picture is drawn by the package, and the one in the repository is the one it draws."""

from pathlib import Path

import pytest
from matplotlib import rc_context

from palimpsest.explainer.picture import draw

KEPT = Path(__file__).parents[2] / "docs" / "pictures" / "palimpsest.svg"


def test_it_is_drawn_the_same_each_time(tmp_path):
    svg, png = draw(tmp_path / "a")
    with rc_context({"figure.constrained_layout.use": True, "font.size": 20}):
        assert svg.read_bytes() == draw(tmp_path / "b")[0].read_bytes()
    assert png.read_bytes().startswith(b"\x89PNG")
    assert svg.stat().st_size < 2 * KEPT.stat().st_size


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        draw(tmp_path / "file" / "pictures")
