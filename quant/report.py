"""A page about a quantized file: what it was made of and how, where its bytes and its errors are, and what they cost.

The page is one string of HTML that is well-formed XML too. It asks for nothing from anywhere and needs no scripts.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from llmq.gguf import TensorSpec
from quant.chart import Cells, bars, cell, heat_map, table, text
from quant.quantize import TensorReport
from quant.receipt import SOURCE, TYPE, describe
from quant.recipe import PRESETS, assign

ROLES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
LAYER = re.compile(r"blk\.(\d+)\.(\w+?)(?:_exps)?\.weight")
THIS = "this file"

STYLE = """
:root { color-scheme: light dark; --ink: #1c1d20; --paper: #fdfdfc; --faint: #63666d; --line: #d9dadd; --bar: #5b7fb0;
  --mark: #e9eef6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e4e6; --paper: #17181b; --faint: #9a9da5; --line: #3a3c42;
  --bar: #6f94c8; --mark: #26303f; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; }
p { margin: .3rem 0 .7rem; color: var(--faint); max-width: 44rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem 1.1rem .15rem 0; text-align: left; vertical-align: baseline; }
th { font-weight: 600; font-size: .8rem; text-transform: uppercase; border-bottom: 1px solid var(--line); }
th, .number, .label { white-space: nowrap; }
.number { text-align: right; }
.receipt td:first-child { color: var(--faint); white-space: nowrap; }
.receipt td:last-child { overflow-wrap: anywhere; }
.group th { padding-top: .9rem; font-size: inherit; text-transform: none; }
.bar { width: 100%; padding-right: 0; }
.bar div { background: var(--bar); height: .75rem; min-width: 1px; border-radius: 2px; }
.marked { background: var(--mark); font-weight: 600; }
.wide { overflow-x: auto; margin-bottom: 1rem; }
svg { display: block; }
svg text { font-size: 12px; fill: currentColor; }
svg .cell { stroke: var(--line); stroke-width: .5; }
@media (max-width: 30rem) { table { font-size: .85rem; } th, td { padding-right: .6rem; } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def build_page(
    metadata: Mapping[str, Any],
    n_bytes: int,
    tensors: Sequence[TensorReport],
    figures: Sequence[Sequence[Sequence[str]]],
    about_figures: str,
    *,
    calibrated: bool = False,
) -> str:
    """The whole page, of a file of `n_bytes` with this metadata.

    `figures` are tables, each with a row of headings first, that tell how far the model is from its source;
    `about_figures` says how they were taken, or why there are none. `calibrated` is what assign() takes.
    """
    title = f"{metadata.get(SOURCE, 'A model')} as {metadata[TYPE]}"
    sections = [
        ("", _receipt(metadata)),
        ("Against its source", _paragraph(about_figures) + "".join(table(each[0], each[1:]) for each in figures)),
        ("Size beside every type", _sizes(n_bytes, tensors, calibrated)),
        ("Bytes by format", _formats(tensors)),
        ("Error by layer", _errors(tensors)),
        ("Bits by layer", _bits(tensors)),
        ("Tensors", _tensors(tensors)),
    ]
    body = "".join(f"<section>{f'<h2>{name}</h2>' if name else ''}{content}</section>" for name, content in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{text(title)}</h1>{_headline(n_bytes, tensors)}{body}</body></html>\n"
    )


def _paragraph(words: str) -> str:
    return f"<p>{text(words)}</p>"


def _headline(n_bytes: int, tensors: Sequence[TensorReport]) -> str:
    n_weights = sum(math.prod(each.shape) for each in tensors)
    bits = 8 * sum(each.n_bytes for each in tensors) / n_weights
    return _paragraph(f"{_megabytes(n_bytes)}, {n_weights / 1e6:,.1f} million weights of {bits:.2f} bits on average")


def _receipt(metadata: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr>{cell('td', label)}{cell('td', value)}</tr>" for label, value in describe(metadata))
    return f'<table class="receipt">{rows}</table>'


def _sizes(n_bytes: int, tensors: Sequence[TensorReport], calibrated: bool) -> str:
    shapes = {each.name: each.shape for each in tensors}
    beside_data = n_bytes - sum(each.n_bytes for each in tensors)
    sizes = {THIS: n_bytes}
    for preset in PRESETS.values():
        formats = assign(preset, shapes, calibrated=calibrated)
        sizes[preset.name] = beside_data + sum(TensorSpec(name, shapes[name], formats[name]).n_bytes for name in shapes)
    ordered = sorted(sizes.items(), key=lambda pair: pair[1])
    return bars([(name, [_megabytes(size), f"{size / n_bytes:.0%}"], size) for name, size in ordered], marked=THIS)


def _formats(tensors: Sequence[TensorReport]) -> str:
    n_bytes: Counter[str] = Counter()
    for each in tensors:
        n_bytes[each.format.name] += each.n_bytes
    total = sum(n_bytes.values())
    return bars([(name, [_megabytes(size), f"{size / total:.1%}"], size) for name, size in n_bytes.most_common()])


def _errors(tensors: Sequence[TensorReport]) -> str:
    words = "Root mean square error over the root mean square of the source's weights."
    cells = {
        place: (each.rms_error, f"{each.name}: {each.rms_error:.3%}, {each.format.name}")
        for place, each in _placed(tensors)
    }
    return _paragraph(words) + _map("Relative error by role and layer", cells, lambda value: f"{value:.2%}")


def _bits(tensors: Sequence[TensorReport]) -> str:
    formats = {each.format.name: _bits_of(each) for _place, each in _placed(tensors)}
    listed = ", ".join(f"{name} {bits:g}" for name, bits in sorted(formats.items(), key=lambda pair: pair[1]))
    cells = {
        place: (_bits_of(each), f"{each.name}: {each.format.name}, {_bits_of(each):g} bits")
        for place, each in _placed(tensors)
    }
    return _paragraph(f"Bits per weight: {listed}.") + _map("Bits by role and layer", cells, lambda value: f"{value:g}")


def _map(title: str, cells: Cells, number: Callable[[float], str]) -> str:
    n_layers = 1 + max(layer for _role, layer in cells)
    return heat_map(title, ROLES, n_layers, cells, number)


def _placed(tensors: Sequence[TensorReport]) -> Iterator[tuple[tuple[str, int], TensorReport]]:
    """Matrices of layers with their role and layer."""
    for each in tensors:
        match = LAYER.fullmatch(each.name)
        if match and match[2] in ROLES:
            yield (match[2], int(match[1])), each


def _tensors(tensors: Sequence[TensorReport]) -> str:
    head = ("tensor", "type", "error", "MB", "shape", "from")
    groups = []
    for name, members in groupby(tensors, _group):
        rows = "".join(_tensor(each) for each in members)
        groups.append(f'<tbody><tr class="group"><th colspan="{len(head)}">{text(name)}</th></tr>{rows}</tbody>')
    cells = "".join(cell("th", each, number=i > 1) for i, each in enumerate(head))
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead>{"".join(groups)}</table></div>'


def _group(tensor: TensorReport) -> str:
    parts = tensor.name.split(".")
    return f"layer {parts[1]}" if parts[0] == "blk" else "beside the layers"


def _tensor(each: TensorReport) -> str:
    numbers = (f"{each.rms_error:.3%}", f"{each.n_bytes / 1e6:,.3f}", " × ".join(map(str, each.shape)), each.source)
    cells = [cell("td", each.name), cell("td", each.format.name), *(cell("td", n, number=True) for n in numbers)]
    return f"<tr>{''.join(cells)}</tr>"


def _bits_of(tensor: TensorReport) -> float:
    return 8 * tensor.format.block_bytes / tensor.format.block_size


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.2f} MB"
