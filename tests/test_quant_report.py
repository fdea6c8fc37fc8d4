"""The page about a file: what it says against the file, opened by itself, and that nothing in it comes to life."""

import math
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_gguf

from llmq.formats import Q4_K, dequantize
from llmq.gguf import open_gguf
from quant.chart import bars, color, heat_map, table, text
from quant.quantize import TensorReport, quantize
from quant.recipe import parse_override
from quant.report import build_page

FIGURES = [
    [("FIGURE", "VALUE", "FROM", "TO"), ("mean KL", "0.5", "0.25", "0.75")],
    [("KL UP TO", "NATS"), ("all", "3")],
]
HOSTILE = "</script><script>alert('1')</script>\"' onload=x <!-- &amp; ]]> \x1b[2J\x00\u202e\ud800 {{7*7}}"


@dataclass(frozen=True)
class Made:
    source: Path
    out: Path
    reports: list[TensorReport]
    page: str

    @property
    def root(self) -> ET.Element:
        return ET.fromstring(self.page)


def make(folder: Path, preset: str = "q4_k_m", **arguments: Any) -> Made:
    source, out = folder / "in.gguf", folder / f"{preset}.gguf"
    tiny_gguf(source, **arguments)
    overrides = [parse_override("blk.0.attn_k=q8_0")]
    reports = list(quantize(source, out, preset, fast=True, overrides=overrides))
    metadata = open_gguf(out).metadata
    return Made(source, out, reports, build_page(metadata, out.stat().st_size, reports, FIGURES, "Words."))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("page"), n_layers=3, n_experts=4)


def section(root: ET.Element, title: str) -> ET.Element:
    return next(each for each in root.iter("section") if each.findtext("h2") == title)


def rows(part: ET.Element) -> list[list[str]]:
    """Texts of all table cells."""
    return [["".join(cell.itertext()) for cell in row] for row in part.iter("tr")]


def words(part: ET.Element) -> str:
    return " ".join(part.itertext())


def test_the_head_is_the_receipt(made: Made) -> None:
    metadata = open_gguf(made.out).metadata
    assert made.root.findtext("body/h1") == made.root.findtext("head/title") == "in.gguf as q4_k_m"
    receipt = dict(rows(next(made.root.iter("section"))))
    assert receipt["weights"] == f"sha256 {metadata['llmq.source_sha256']}"
    assert receipt["made as"] == "q4_k_m, fast; blk.0.attn_k=q8_0"
    assert receipt["error"].startswith(f"{metadata['llmq.rms_error']:.3%} ")
    infos = open_gguf(made.out).tensors.values()
    n_weights, n_bytes = sum(math.prod(info.shape) for info in infos), sum(info.n_bytes for info in infos)
    assert made.root.findtext("body/p") == (
        f"{made.out.stat().st_size / 1e6:.2f} MB, {n_weights / 1e6:.1f} million weights of "
        f"{8 * n_bytes / n_weights:.2f} bits on average"
    )


def test_every_tensor_has_its_line(made: Made) -> None:
    lines = {row[0]: row[1:] for row in rows(section(made.root, "Tensors")) if len(row) > 1}
    assert lines.pop("tensor") == ["type", "error", "MB", "shape", "from"]
    with open_gguf(made.source) as before, open_gguf(made.out) as after:
        assert lines.keys() == after.tensors.keys()
        for name, info in after.tensors.items():
            expected = dequantize(before.tensors[name].format, before.data(name)).astype(np.float64)
            off = dequantize(info.format, after.data(name)).reshape(expected.shape) - expected
            error = math.sqrt((off**2).sum() / (expected**2).sum())
            kind, shown, *cells = lines[name]
            shape = " × ".join(map(str, info.shape))
            assert kind == info.format.name
            assert cells == [f"{info.n_bytes / 1e6:.3f}", shape, before.tensors[name].format.name]
            assert float(shown.rstrip("%")) / 100 == pytest.approx(error, abs=6e-6)


def test_tensors_stand_by_layer(made: Made) -> None:
    groups = [[row[0] for row in rows(part)] for part in section(made.root, "Tensors").iter("tbody")]
    assert [group[0] for group in groups] == ["layer 0", "layer 1", "layer 2", "beside the layers"]
    for i in range(3):
        assert all(name.startswith(f"blk.{i}.") for name in groups[i][1:])


@pytest.mark.parametrize("preset", ["q2_k", "q4_k_m", "q8_0", "f16"])
def test_a_type_has_the_size_of_its_file(made: Made, tmp_path: Path, preset: str) -> None:
    """Made for this; metadata that tells of the making differs by some bytes."""
    list(quantize(made.source, tmp_path / "out.gguf", preset, fast=True))
    size, ours = (tmp_path / "out.gguf").stat().st_size, made.out.stat().st_size
    sizes = {row[0]: row[1:3] for row in rows(section(made.root, "Size beside every type"))}
    shown, share = sizes[preset]
    assert float(shown.removesuffix(" MB")) == pytest.approx(size / 1e6, abs=0.006)
    assert float(share.rstrip("%")) / 100 == pytest.approx(size / ours, abs=0.006)


def test_this_file_stands_among_the_types(made: Made) -> None:
    part = section(made.root, "Size beside every type")
    sizes = [float(row[1].removesuffix(" MB")) for row in rows(part)]
    assert sizes == sorted(sizes)
    (marked,) = (row for row in part.iter("tr") if row.get("class") == "marked")
    assert [cell.text for cell in marked][:3] == ["this file", f"{made.out.stat().st_size / 1e6:.2f} MB", "100%"]
    widths = [float(re.fullmatch(r"width:([\d.]+)%", bar.get("style", ""))[1]) for bar in part.iter("div")]  # type: ignore[index]
    assert widths == pytest.approx([100 * size / sizes[-1] for size in sizes], abs=0.5)


def test_bytes_by_format_are_all_bytes(made: Made) -> None:
    with open_gguf(made.out) as gguf:
        n_bytes = {info.format.name: 0 for info in gguf.tensors.values()}
        for info in gguf.tensors.values():
            n_bytes[info.format.name] += info.n_bytes
    total = sum(n_bytes.values())
    found = {row[0]: row[1:3] for row in rows(section(made.root, "Bytes by format"))}
    assert found == {name: [f"{size / 1e6:.2f} MB", f"{size / total:.1%}"] for name, size in n_bytes.items()}


def squares(part: ET.Element) -> dict[str, ET.Element]:
    """Of a heat map, by the tensor's name in the title."""
    found = [each for each in part.iter("rect") if each.get("class") == "cell"]
    return {(each.findtext("title") or "").partition(":")[0]: each for each in found}


def test_heat_maps_have_every_matrix_in_its_place(made: Made) -> None:
    reports = {each.name: each for each in made.reports}
    for title in ("Error by layer", "Bits by layer"):
        found = squares(section(made.root, title))
        matrices = {name for name, each in reports.items() if name[:4] == "blk." and len(each.shape) > 1}
        assert found.keys() == {name for name in matrices if "gate_inp" not in name}
        for name, square in found.items():
            same_layer = {other.get("x") for key, other in found.items() if key.split(".")[1] == name.split(".")[1]}
            same_role = {other.get("y") for key, other in found.items() if key.split(".")[2] == name.split(".")[2]}
            assert (same_layer, same_role) == ({square.get("x")}, {square.get("y")})
        assert len({(square.get("x"), square.get("y")) for square in found.values()}) == len(found) == 21


def test_colors_and_titles_tell_errors_and_bits(made: Made) -> None:
    reports = {each.name: each for each in made.reports}
    errors, bits = (squares(section(made.root, title)) for title in ("Error by layer", "Bits by layer"))
    worst = max(errors, key=lambda name: reports[name].rms_error)
    assert errors[worst].get("fill") == color(1.0)
    assert errors["blk.0.attn_k.weight"].get("fill") != color(1.0)
    assert bits["blk.0.attn_k.weight"].get("fill") == color(1.0)
    assert bits["blk.0.attn_k.weight"].findtext("title") == "blk.0.attn_k.weight: Q8_0, 8.5 bits"
    each = reports[worst]
    assert errors[worst].findtext("title") == f"{worst}: {each.rms_error:.3%}, {each.format.name}"
    assert f"{each.rms_error:.2%}" in words(section(made.root, "Error by layer"))
    assert "Q4_K 4.5" in words(section(made.root, "Bits by layer"))
    assert "Q8_0 8.5" in words(section(made.root, "Bits by layer"))


def test_figures_are_shown_as_they_are(made: Made) -> None:
    part = section(made.root, "Against its source")
    assert part.findtext("p") == "Words."
    assert rows(part) == [list(row) for each in FIGURES for row in each]


def test_the_page_asks_for_nothing(made: Made) -> None:
    assert not re.search(r"(?i)https?:|//|url\(|@import|\bsrc=|\bhref=|<script|<link|<iframe|javascript", made.page)
    policy = made.root.find("head/meta[@http-equiv='Content-Security-Policy']")
    assert policy is not None
    assert policy.get("content") == "default-src 'none'; style-src 'unsafe-inline'"


@pytest.mark.parametrize("arguments", [{"tied": True}, {"n_layers": 1}, {"n_layers": 14}], ids=str)
def test_other_models(tmp_path: Path, arguments: dict[str, Any]) -> None:
    made = make(tmp_path, "q8_0", **arguments)
    part, n_layers = section(made.root, "Error by layer"), arguments.get("n_layers", 2)
    assert len(squares(part)) == 7 * n_layers
    labels = [each.text for each in part.iter("text") if (each.text or "").isdigit()]
    assert labels == [str(i) for i in range(0, n_layers, 4 if n_layers > 12 else 1)]
    width = float(next(part.iter("svg")).get("width", 0))
    assert all(float(each.get("x", 0)) + float(each.get("width", 0)) <= width for each in part.iter("rect"))
    assert len([row for row in rows(section(made.root, "Tensors")) if len(row) > 1]) == len(made.reports) + 1


def test_a_model_without_loss(tmp_path: Path) -> None:
    """Nothing is divided by an error of 0."""
    tiny_gguf(tmp_path / "in.gguf", n_layers=1)
    reports = list(quantize(tmp_path / "in.gguf", tmp_path / "out.gguf", "f32"))
    page = build_page(open_gguf(tmp_path / "out.gguf").metadata, 10**6, reports, [], "Not measured.")
    assert {each.get("fill") for each in squares(section(ET.fromstring(page), "Error by layer")).values()} == {color(0)}


def test_nothing_hostile_comes_to_life(made: Made) -> None:
    reports = [
        TensorReport(each.name, each.shape, HOSTILE, each.format, each.n_bytes, each.index, each.total, 0.1, False)
        for each in made.reports
    ]
    reports.append(TensorReport(HOSTILE, (256, 256), "F32", Q4_K, 36864, 0, 1, 0.1, False))
    names = ("version", "source", "source_sha256", "source_revision", "type", "settings", "calibration_sha256")
    metadata = {f"llmq.{name}": HOSTILE * 100 for name in names} | {"llmq.rms_error": 0.5}
    page = build_page(metadata, 10**6, reports, [[(HOSTILE, HOSTILE), (HOSTILE, HOSTILE)]], HOSTILE)
    root = ET.fromstring(page.encode())
    tags = {each.tag for each in ET.fromstring(made.page).iter()}
    assert {each.tag for each in root.iter()} == tags
    assert not any(name.startswith("on") for each in root.iter() for name in each.attrib)
    assert all(each.isprintable() or each == "\n" for each in page)
    safe = "".join(each if each.isprintable() else "\ufffd" for each in HOSTILE)
    assert words(root).count("alert('1')") == words(root).count(safe)
    assert words(root).count(safe) > 900


@given(st.text())
def test_any_text_is_itself_or_marked(untrusted: str) -> None:
    element = ET.fromstring(f'<a b="{text(untrusted)}">{text(untrusted)}</a>')
    shown = "".join(each if each.isprintable() else "\ufffd" for each in untrusted)
    assert (element.text or "") == element.get("b") == shown


def test_colors_go_from_dark_to_light() -> None:
    def luminance(share: float) -> float:
        red, green, blue = bytes.fromhex(color(share)[1:])
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    assert color(0) == color(-1) == "#00224e"
    assert color(1) == color(2) == "#fee838"
    steps = [luminance(i / 100) for i in range(101)]
    assert steps == sorted(steps)
    assert max(b - a for a, b in pairwise(steps)) < 4


def test_many_columns_are_labelled_sparsely() -> None:
    cells = {("a", 0): (1.0, "low"), ("a", 31): (4.0, "high"), ("b", 31): (2.0, "half")}
    root = ET.fromstring(heat_map("A map", ("a", "b"), 32, cells, "{:.1f}".format))
    labels = [each.text for each in root.iter("text")]
    assert labels == ["layer", "a", "b", *map(str, range(0, 32, 4)), "0.0", "4.0"]
    image = next(root.iter("svg"))
    assert image.get("aria-label") == "A map"
    right = max(float(each.get("x", 0)) + float(each.get("width", 0)) for each in root.iter("rect"))
    low = max(float(each.get("y", 0)) + float(each.get("height", 0)) for each in root.iter("rect"))
    assert right <= float(image.get("width", 0))
    assert low <= float(image.get("height", 0))
    assert squares(root)["half"].get("fill") == color(0.5)


def test_tables_and_bars() -> None:
    part = ET.fromstring(table(("a", "b"), [("c", "1"), ("d", "2")]))
    assert rows(part) == [["a", "b"], ["c", "1"], ["d", "2"]]
    assert [[cell.get("class") for cell in row] for row in part.iter("tr")] == [[None, "number"]] * 3
    part = ET.fromstring(bars([("x", ["0 B"], 0), ("y", ["0 B"], 0)], marked="y"))
    assert [bar.get("style") for bar in part.iter("div")] == ["width:0.00%"] * 2
    assert [row.get("class") for row in part.iter("tr")] == [None, "marked"]
