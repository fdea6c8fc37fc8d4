"""Pieces of a page: escaped text, tables, bars, and heat maps as SVG. All are strings of well-formed XML."""

import html
from collections.abc import Callable, Mapping, Sequence

# Cividis, which colour-blind people see as others do (Nunez, Anderton and Renslow 2018), from low to high.
CIVIDIS = ((0, 34, 78), (59, 73, 108), (112, 113, 115), (165, 156, 116), (225, 204, 85), (254, 232, 56))
CELL, STEP, LEFT, TOP = 18, 20, 84, 18
FEW_COLUMNS = 12
LEGEND_STEPS, LEGEND_STEP = 24, 6

# By row and column, the number and the words that belong there.
Cells = Mapping[tuple[str, int], tuple[float, str]]


def text(untrusted: str) -> str:
    """Escaped for text and attributes; what is not printable, such as controls and bidirectional overrides, is shown
    as U+FFFD.
    """
    return html.escape("".join(each if each.isprintable() else "\ufffd" for each in untrusted))


def color(share: float) -> str:
    """From 0, the lowest, to 1."""
    at = min(max(share, 0.0), 1.0) * (len(CIVIDIS) - 1)
    i = min(int(at), len(CIVIDIS) - 2)
    low, high = CIVIDIS[i], CIVIDIS[i + 1]
    return "#" + "".join(f"{round(a + (b - a) * (at - i)):02x}" for a, b in zip(low, high, strict=True))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are plain text; all columns but the first are numbers."""
    lines = [_row("th", head), *(_row("td", row) for row in rows)]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(cell(tag, each, number=i > 0) for i, each in enumerate(cells))}</tr>"


def cell(tag: str, content: str, *, number: bool = False) -> str:
    kind = ' class="number"' if number else ""
    return f"<{tag}{kind}>{text(content)}</{tag}>"


def bars(rows: Sequence[tuple[str, Sequence[str], float]], marked: str = "") -> str:
    """Lines of a label, numbers as text, and a length; the one whose label is `marked` stands out."""
    longest = max(length for _label, _numbers, length in rows) or 1
    lines = []
    for label, numbers, length in rows:
        start = '<tr class="marked">' if label == marked else "<tr>"
        cells = f'<td class="label">{text(label)}</td>' + "".join(cell("td", number, number=True) for number in numbers)
        bar = f'<td class="bar"><div style="width:{100 * length / longest:.2f}%"></div></td>'
        lines.append(f"{start}{cells}{bar}</tr>")
    return f"<table>{''.join(lines)}</table>"


def heat_map(title: str, rows: Sequence[str], n_columns: int, cells: Cells, number: Callable[[float], str]) -> str:
    """A square for each cell, coloured from 0 to the largest number, with its words as title; columns are layers.
    `number` writes the ends of the legend.
    """
    most = max((value for value, _words in cells.values()), default=0.0) or 1.0
    parts = [_label(LEFT - 6, 12, "layer", "end")]
    parts += [_label(LEFT - 6, TOP + i * STEP + 13, row, "end") for i, row in enumerate(rows)]
    every = 1 if n_columns <= FEW_COLUMNS else 4
    parts += [_label(LEFT + i * STEP + CELL // 2, 12, str(i), "middle") for i in range(0, n_columns, every)]
    for (row, column), (value, words) in cells.items():
        x, y = LEFT + column * STEP, TOP + rows.index(row) * STEP
        shape = _square(x, y, CELL, color(value / most))
        parts.append(f'<rect class="cell" {shape}><title>{text(words)}</title></rect>')
    below = TOP + len(rows) * STEP + 12
    parts += _legend(below, number(0.0), number(most))
    width, height = LEFT + max(n_columns * STEP, LEGEND_STEPS * LEGEND_STEP + 70), below + STEP
    return (
        f'<div class="wide"><svg role="img" aria-label="{text(title)}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">{"".join(parts)}</svg></div>'
    )


def _label(x: int, y: int, words: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text(words)}</text>'


def _legend(y: int, least: str, most: str) -> list[str]:
    colors = [color(i / (LEGEND_STEPS - 1)) for i in range(LEGEND_STEPS)]
    steps = [f"<rect {_square(LEFT + i * LEGEND_STEP, y, LEGEND_STEP, fill)}/>" for i, fill in enumerate(colors)]
    end = LEFT + LEGEND_STEPS * LEGEND_STEP
    return [*steps, _label(LEFT - 6, y + 13, least, "end"), _label(end + 6, y + 13, most, "start")]


def _square(x: int, y: int, width: int, fill: str) -> str:
    return f'x="{x}" y="{y}" width="{width}" height="{CELL}" fill="{fill}"'
