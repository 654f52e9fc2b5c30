"""Pictures by hand: an SVG is text, a PNG is a header, zlib's bytes and checksums."""

import html
import math
import struct
import zlib

import numpy as np

COLORS = ("#8ab4e8", "#c62f2f", "#3f9142", "#e08a1e", "#8457a8", "#8c6a4f", "#111")


def nice_ticks(low, high, n=5):
    """About n round numbers that cover low .. high."""
    rough = (high - low) / n or 1.0
    power = 10 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(s - rough))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 10) for i in range(first, last + 1)]


def line_svg(title, curves, x_label="steps", y_label=""):
    """An SVG of `curves`, {name: [(x, y), ...]}; what lies above its scale is drawn at the top.

    The first twentieth of x is left out of the scale, and so is the highest twentieth of all
    points if there are many: the initial drop of a loss would flatten the rest of the curve.
    """
    curves = {name: points for name, points in curves.items() if points}
    points = [point for each in curves.values() for point in each]
    last = max((x for x, _ in points), default=1) or 1
    seen = sorted(y for x, y in points if x >= last / 20) or [0.0, 1.0]
    high = seen[int(0.95 * (len(seen) - 1))] if len(seen) > 20 else seen[-1]
    xs, ys = nice_ticks(0, last), nice_ticks(seen[0], high if high > seen[0] else seen[0] + 1)
    left, right, top, bottom = 52, 452, 44, 264

    def place(x, y):
        up = (min(y, ys[-1]) - ys[0]) / (ys[-1] - ys[0])
        return f"{left + (right - left) * x / xs[-1]:.1f},{bottom - (bottom - top) * up:.1f}"

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 580 310" '
        'font-family="sans-serif" font-size="15" fill="#222">',
        '<rect width="580" height="310" fill="#fff"/>',
        f'<text x="{left}" y="20" font-weight="bold">{html.escape(title)}</text>',
        f'<text x="{left}" y="38" font-size="13" fill="#666">{html.escape(y_label)}</text>',
        f'<text x="{right}" y="{bottom + 40}" text-anchor="end">{html.escape(x_label)}</text>',
    ]
    for t in ys:
        y = float(place(0, t).split(",")[1])
        parts.append(f'<path d="M{left} {y}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 5:.1f}" text-anchor="end">{t:g}</text>')
    for t in xs:
        x, label = place(t, 0).split(",")[0], f"{t / 1000:g}k" if last >= 10000 else f"{t:g}"
        parts.append(f'<path d="M{x} {bottom}v5" stroke="#222"/>')
        parts.append(f'<text x="{x}" y="{bottom + 20}" text-anchor="middle">{label}</text>')
    parts.append(f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#222"/>')
    for i, (name, points) in enumerate(curves.items()):
        color, places = COLORS[i % len(COLORS)], [place(x, y) for x, y in points]
        path = " ".join(places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        if len(points) < 30:  # one alone is no line
            dots = (p.split(",") for p in places)
            parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>' for x, y in dots]
        at = top + 16 + 22 * i
        parts.append(f'<path d="M{right + 10} {at - 5}h16" stroke="{color}" stroke-width="3"/>')
        parts.append(f'<text x="{right + 30}" y="{at}">{html.escape(name)}</text>')
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
