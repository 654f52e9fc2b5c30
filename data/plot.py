"""Pictures by hand: an SVG is text, a PNG is a header, zlib's bytes and checksums."""
import html
import math
import struct
import zlib

import numpy as np

COLORS = ("#8ab4e8", "#c62f2f", "#3f9142", "#e08a1e", "#8457a8", "#8c6a4f", "#111")
LEFT, RIGHT, TOP, BOTTOM = 52, 452, 44, 264  # of the axes
STYLE = 'viewBox="0 0 580 310" font-family="sans-serif" font-size="15" fill="#222"'


def nice_ticks(low, high, n=5):
    """About n round numbers that cover low .. high."""
    rough = (high - low) / n or 1.0
    power = 10 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(s - rough))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 10) for i in range(first, last + 1)]


def line_svg(title, curves, x_label="steps", y_label=""):
    """An SVG of `curves`, {name: [(x, y), ...]}. Values above the scale are drawn at its top.

    The scale ignores the first twentieth of x and, if there are many points, the highest twentieth
    of them: the initial drop of a loss would flatten the rest of the curve.
    """
    curves = {name: points for name, points in curves.items() if points}
    points = [point for curve in curves.values() for point in curve]
    last = max((x for x, _ in points), default=1) or 1
    seen = sorted(y for x, y in points if x >= last / 20) or [0.0, 1.0]
    high = seen[int(0.95 * (len(seen) - 1))] if len(seen) > 20 else seen[-1]
    xs, ys = nice_ticks(0, last), nice_ticks(seen[0], high if high > seen[0] else seen[0] + 1)

    def position(x, y):
        height = (min(y, ys[-1]) - ys[0]) / (ys[-1] - ys[0])
        right = LEFT + (RIGHT - LEFT) * x / xs[-1]
        return f"{right:.1f},{BOTTOM - (BOTTOM - TOP) * height:.1f}"

    def text(x, y, content, attributes='text-anchor="end"'):
        return f'<text x="{x}" y="{y}" {attributes}>{html.escape(content)}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {STYLE}>',
        '<rect width="580" height="310" fill="#fff"/>',
        text(LEFT, 20, title, 'font-weight="bold"'),
        text(LEFT, 38, y_label, 'font-size="13" fill="#666"'),
        text(RIGHT, BOTTOM + 40, x_label),
    ]
    for tick in ys:
        y = float(position(0, tick).split(",")[1])
        parts.append(f'<path d="M{LEFT} {y}H{RIGHT}" stroke="#ddd"/>')
        parts.append(text(LEFT - 6, f"{y + 5:.1f}", f"{tick:g}"))
    for tick in xs:
        x = position(tick, 0).split(",")[0]
        label = f"{tick / 1000:g}k" if last >= 1e4 else f"{tick:g}"
        parts.append(f'<path d="M{x} {BOTTOM}v5" stroke="#222"/>')
        parts.append(text(x, BOTTOM + 20, label, 'text-anchor="middle"'))
    parts.append(f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="#222"/>')
    for i, (name, points) in enumerate(curves.items()):
        color, points = COLORS[i % len(COLORS)], points * 2 if len(points) == 1 else points
        path = " ".join(position(x, y) for x, y in points)  # round ends make a single point a dot
        style = f'fill="none" stroke="{color}" stroke-width="2" stroke-linecap="round"'
        parts.append(f'<polyline points="{path}" {style}/>')
        y = TOP + 16 + 22 * i
        parts.append(f'<path d="M{RIGHT + 10} {y - 5}h16" stroke="{color}" stroke-width="3"/>')
        parts.append(text(RIGHT + 30, y, name, ""))
    return "\n".join([*parts, "</svg>\n"])


def write_png(path, pixels):
    """Write uint8 grey values (H, W) as a PNG. Format: RFC 2083."""

    def chunk(kind, body):
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    height, width = pixels.shape
    lines = np.pad(pixels, ((0, 0), (1, 0)))  # each line begins with its filter: 0, none
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)  # 8 bits, grey
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines.tobytes(), 9))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b""))
