"""data/plot.py: a PNG and an SVG that others read."""

import xml.etree.ElementTree as ElementTree

import numpy as np
from PIL import Image

from data.plot import line_svg, write_png


def test_a_png_is_read_by_others_as_it_was_written(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (13, 7), dtype=np.uint8)
    write_png(tmp_path / "a.png", pixels)
    Image.open(tmp_path / "a.png").verify()
    image = Image.open(tmp_path / "a.png")
    assert image.mode == "L" and (np.array(image) == pixels).all()


def test_an_svg_shows_every_curve_inside_its_frame(tmp_path):
    curves = {"a": [(0, 9.0), (50, 1.0), (100, 0.5)], "b": [(100, 0.25)], "empty": []}
    tree = ElementTree.fromstring(line_svg("title", curves))
    lines = [e for e in tree.iter() if e.tag.endswith("polyline")]
    texts = [e.text for e in tree.iter() if e.tag.endswith("text")]
    assert len(lines) == 2 and {"title", "a", "b", "100"} <= set(texts)
    for line in lines:
        for point in line.get("points").split():
            x, y = map(float, point.split(","))
            assert 52 <= x <= 452 and 44 <= y <= 264
