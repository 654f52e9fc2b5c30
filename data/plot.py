"""Pictures by hand: an SVG is text, a PNG is a header, zlib's bytes and checksums."""
import html
import math
import struct
import zlib

import numpy as np

COLORS = ("#8ab4e8", "#c62f2f", "#3f9142", "#e08a1e", "#8457a8", "#8c6a4f", "#111", "#2aa", "#d6a")
LEFT, RIGHT, TOP, BOTTOM = 52, 452, 44, 264  # of the axes
STYLE = 'viewBox="0 0 580 310" font-family="sans-serif" font-size="15" fill="#222"'


def nice_ticks(low, high):
    """About five round numbers that cover low .. high."""
    rough = (high - low) / 5 or 1.0
    power = 10 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(s - rough))
    return [round(i * step, 10) for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def svg_text(x, y, content, attributes='text-anchor="end"'):
    """An SVG element with a text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{html.escape(content)}</text>'


def line_svg(title, curves, x_label="steps", y_label=""):
    """An SVG of `curves`, {name: [(x, y), ...]}. The scale ignores the first twentieth of x and the
    highest twentieth of the other values, which are drawn at its top: the initial drop of a loss
    would flatten the rest of the curve."""
    curves = {name: points for name, points in curves.items() if points}
    points = [point for curve in curves.values() for point in curve]
    last = max((x for x, _ in points), default=0)
    seen = sorted(y for x, y in points if x >= last / 20) or [0.0, 1.0]
    high = seen[-1 - len(seen) // 20]
    xs, ys = nice_ticks(0, last or 1), nice_ticks(seen[0], high if high > seen[0] else seen[0] + 1)

    def position(x, y):
        height = (min(y, ys[-1]) - ys[0]) / (ys[-1] - ys[0])
        return LEFT + (RIGHT - LEFT) * x / xs[-1], BOTTOM - (BOTTOM - TOP) * height

    elements = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {STYLE}>',
        '<rect width="580" height="310" fill="#fff"/>',
        svg_text(LEFT, 20, title, 'font-weight="bold"'),
        svg_text(LEFT, 38, y_label, 'font-size="13" fill="#666"'),
        svg_text(RIGHT, BOTTOM + 40, x_label),
        f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="#222"/>',
    ]
    for tick in ys:
        y = position(0, tick)[1]
        elements.append(f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="#ddd"/>')
        elements.append(svg_text(LEFT - 6, y + 5, f"{tick:g}"))
    for tick in xs:
        x, label = position(tick, 0)[0], f"{tick / 1000:g}k" if last >= 1e4 else f"{tick:g}"
        elements.append(f'<path d="M{x:.1f} {BOTTOM}v5" stroke="#222"/>')
        elements.append(svg_text(x, BOTTOM + 20, label, 'text-anchor="middle"'))
    for i, (name, points) in enumerate(curves.items()):
        stroke, y = f'stroke="{COLORS[i % len(COLORS)]}"', TOP + 16 + 22 * i
        points = points * 2 if len(points) == 1 else points  # round ends make a single one a dot
        path = " ".join("{:.1f},{:.1f}".format(*position(*point)) for point in points)
        style = 'fill="none" stroke-width="2" stroke-linecap="round"'
        elements.append(f'<polyline points="{path}" {style} {stroke}/>')
        elements.append(f'<path d="M{RIGHT + 10} {y - 5}h16" {stroke} stroke-width="3"/>')
        elements.append(svg_text(RIGHT + 30, y, name, ""))
    return "\n".join([*elements, "</svg>\n"])


def sheet(tiles, columns, scale=1):
    """Arrange tiles (N, h, w), uint8, in rows of `columns`, each enlarged `scale` times."""
    tiles = np.kron(tiles, np.ones((1, scale, scale), np.uint8))
    n, h, w = tiles.shape
    rows, gap = -(-n // columns), 2
    page = np.full((rows, columns, h + gap, w + gap), 64, np.uint8)
    page.reshape(-1, h + gap, w + gap)[:n, :h, :w] = tiles
    return page.swapaxes(1, 2).reshape(rows * (h + gap), -1)


def png(pixels):
    """The bytes of a PNG of uint8 grey values (H, W). Format: RFC 2083."""

    def chunk(kind, body):
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    height, width = pixels.shape
    lines = np.pad(pixels, ((0, 0), (1, 0)))  # each line begins with its filter: 0, none
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)  # 8 bits, grey
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines.tobytes(), 9))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def write_png(path, pixels):
    """Write uint8 grey values (H, W) as a PNG."""
    path.write_bytes(png(pixels))
