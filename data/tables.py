"""Tables of numbers: printed with their first and last rows and columns, as shades, as a PNG."""
import unicodedata

import numpy as np

from data.plot import write_png

SHADES = "·░▒▓█"
LEGEND = "· under 4 %, ░ under 16 %, ▒ under 36 %, ▓ under 64 %, █ more"


def row_labels(texts):
    """Texts as they are written in Python, numbered, in columns of equal width."""
    shown = [f"{n:4} {repr(text)[1:-1]:.16} " for n, text in enumerate(texts)]
    wide = [sum(unicodedata.east_asian_width(c) in "WF" for c in line) for line in shown]
    width = max(len(line) + w for line, w in zip(shown, wide))
    return [line.ljust(width - w) for line, w in zip(shown, wide)]


def number_lines(texts, table, ends=(8, 4)):
    """Format a table (N, C) as lines, with a text before each row. Of many rows or columns only the
    first and last are shown; `ends` is how many (rows, columns) at each end."""
    keep = [[*range(n)] if n <= 2 * e else [*range(e), None, *range(n - e, n)]
            for n, e in zip(table.shape, ends)]  # fmt: skip
    labels, (rows, columns) = row_labels(texts), keep
    gap = len(labels[0]) * " "
    lines = [gap + "".join(f"{'...' if c is None else c:>9}" for c in columns)]
    for r in rows:
        cells = ("      ..." if None in (r, c) else f"{table[r, c]:9.4f}" for c in columns)
        lines.append((gap if r is None else labels[r]) + "".join(cells))
    return [*lines, f"[{len(table)} rows x {table.shape[1]} columns]"]


def shade_lines(texts, weights):
    """The lines of causal attention weights (T, T): a query's row, a column for each key."""
    labels = row_labels(texts)
    lines = [" " * len(labels[0]) + "".join(f" {n % 10}" for n in range(len(weights)))]
    for n, row in enumerate(np.sqrt(weights)):
        lines.append(labels[n] + "".join(2 * SHADES[min(4, int(5 * w))] for w in row[: n + 1]))
    return [*lines, LEGEND]


def draw_table(path, table):
    """Write a PNG in which the smallest number is white and the largest black."""
    scaled = (table - table.min()) / max(np.ptp(table), 1e-9)
    size = max(1, 512 // max(table.shape))  # pixels of a cell
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, np.kron(255 - (255 * scaled).astype(np.uint8), np.ones((size, size), np.uint8)))
