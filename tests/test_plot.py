"""data/plot.py: an SVG that others read; test_mnist.py reads the PNGs."""

import xml.etree.ElementTree as ElementTree

from data.plot import line_svg


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
