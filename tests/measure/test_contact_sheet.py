"""Sheets: where pictures and titles stand, and that equal input gives equal bytes."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from ditloom.contracts.errors import UserError
from ditloom.measure.contact_sheet import Sheet, beside, contact_sheet, save_png, wrapped

IMAGES = [np.full((16, 20, 3), 20 * i, dtype=np.uint8) for i in range(7)]
TITLES = [f"picture {i}" for i in range(7)]


def test_pictures_stand_row_by_row_unchanged_but_enlarged():
    sheet = Sheet(columns=3, scale=2, gap=5, font_size=10, lines=2)
    page = np.asarray(contact_sheet(IMAGES, TITLES, sheet=sheet))
    assert page.shape == (5 + 3 * (32 + 26 + 5), 3 * 45 + 5, 3)
    for place in range(7):
        row, column = divmod(place, 3)
        top, left = 5 + row * 63, 5 + column * 45
        assert (page[top : top + 32, left : left + 40] == 20 * place).all()
        assert (page[top + 32 : top + 58, left : left + 40] < 200).any()
    assert (page[5 + 2 * 63 :, 50:] == 255).all()


def test_equal_input_gives_equal_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        save_png(contact_sheet(IMAGES, TITLES, "heading"), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "RGB"


def test_the_heading_and_grey_pictures():
    grey = [image[:, :, :1] for image in IMAGES]
    with_heading, without = contact_sheet(grey, TITLES, "heading"), contact_sheet(IMAGES, TITLES)
    assert with_heading.height > without.height
    below = np.asarray(with_heading)[with_heading.height - without.height + 8 :]
    assert np.array_equal(below, np.asarray(without)[8:])


def test_titles_are_wrapped_and_cut_to_the_width():
    font = ImageFont.load_default(11)
    title = "person with blond hair in motorised wheelchair facing right"
    for lines in (0, 1, 2, 3):
        laid = wrapped(title, font, 90, lines)
        assert len(laid) == lines
        assert all(font.getlength(line) <= 90 for line in laid)
        assert not laid or laid[-1].endswith("...")
    assert wrapped("a red apple", font, 90, 2) == ["a red apple"]
    assert wrapped("", font, 90, 2) == []
    assert wrapped("incomprehensibilities", font, 60, 1)[0].endswith("...")


def test_pictures_side_by_side():
    assert beside(IMAGES[0], IMAGES[1]).shape == (16, 40, 3)


@pytest.mark.parametrize("bad", [{"columns": 0}, {"scale": 0}, {"gap": -1}])
def test_impossible_layouts_and_missing_titles_are_refused(bad):
    with pytest.raises(UserError, match="at least one column"):
        Sheet(**bad)
    with pytest.raises(UserError, match="title for each picture"):
        contact_sheet(IMAGES, TITLES[:2])
