"""A byte budget: the search against all mixes there are, hulls against their definition, sizes as people write them."""

import contextlib
import itertools
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmq.errors import UsageError
from llmq.formats import FORMATS, Format
from quant.budget import Option, allocate, hull, parse_size

FEW = list(FORMATS.values())[:4]
# Damages that are exact in binary, so that sums and ties are.
damages = st.integers(0, 64).map(lambda eighths: eighths / 8)


def options_of(formats: tuple[Format, ...], pairs: list[tuple[int, float]]) -> list[Option]:
    return [Option(fmt, n_bytes, damage) for fmt, (n_bytes, damage) in zip(formats, pairs, strict=False)]


some_options = st.builds(
    options_of,
    st.permutations(FEW).map(tuple),
    st.lists(st.tuples(st.integers(1, 40), damages), min_size=1, max_size=4),
)
tensors = st.lists(some_options, min_size=1, max_size=4).map(
    lambda each: {f"t{i}": options for i, options in enumerate(each)}
)


def totals(options: dict[str, list[Option]], mix: dict[str, Format]) -> tuple[int, float]:
    chosen = [next(option for option in each if option.format is mix[name]) for name, each in options.items()]
    return sum(option.n_bytes for option in chosen), sum(option.damage for option in chosen)


def mixes(options: dict[str, list[Option]]) -> list[tuple[int, float]]:
    """Bytes and damage of every mix there is."""
    return [
        (sum(option.n_bytes for option in mix), sum(option.damage for option in mix))
        for mix in itertools.product(*options.values())
    ]


# ---- the search
@given(tensors, st.integers(0, 170))
def test_against_every_mix(options: dict[str, list[Option]], budget: int) -> None:
    """Within the budget, and off the best by no more than the largest step on a hull."""
    fitting = [damage for n_bytes, damage in mixes(options) if n_bytes <= budget]
    if not fitting:
        with pytest.raises(UsageError, match="the matrices take at least"):
            allocate(options, budget)
        return
    mix = allocate(options, budget)
    assert mix.keys() == options.keys()
    n_bytes, damage = totals(options, mix)
    assert n_bytes <= budget
    steps = [a.damage - b.damage for each in options.values() for a, b in itertools.pairwise(hull(each))]
    assert min(fitting) <= damage <= min(fitting) + max(steps, default=0)


@given(tensors, st.integers(0, 170), st.sampled_from(FEW))
def test_no_single_format_is_better(options: dict[str, list[Option]], budget: int, fmt: Format) -> None:
    whole = {name: each for name, each in options.items() if any(option.format is fmt for option in each)}
    if whole and (uniform := totals(whole, dict.fromkeys(whole, fmt)))[0] <= budget:
        assert totals(whole, allocate(whole, budget))[1] <= uniform[1]


@given(tensors)
def test_room_for_everything_gets_the_least_damage(options: dict[str, list[Option]]) -> None:
    mix = allocate(options, 10**12)
    assert totals(options, mix)[1] == sum(min(option.damage for option in each) for each in options.values())


def test_the_order_of_tensors_and_options_makes_no_difference() -> None:
    equal = {name: options_of(tuple(FEW), [(8, 4.0), (16, 2.0), (24, 1.0)]) for name in "abcd"}
    reverse = {name: equal[name][::-1] for name in "dcba"}
    for budget in range(32, 97):
        assert allocate(equal, budget) == allocate(reverse, budget)


def test_one_format_for_all_where_a_step_is_much_of_the_budget() -> None:
    """Sixteen bytes: the small tensor's first two steps save more for a byte, and then the large one has no room."""
    small = options_of(tuple(FEW), [(1, 20.0), (2, 10.0), (4, 0.0)])
    large = options_of(tuple(FEW), [(4, 40.0), (14, 0.0)])
    assert allocate({"small": small, "large": large}, 16) == {"small": FEW[1], "large": FEW[1]}


def test_what_is_left_goes_to_a_smaller_step() -> None:
    a = options_of(tuple(FEW), [(10, 9.0), (30, 1.0)])
    b = options_of(tuple(FEW), [(10, 2.0), (15, 1.5)])
    assert allocate({"a": a, "b": b}, 25) == {"a": FEW[0], "b": FEW[1]}


def test_a_step_that_is_a_byte_too_large_is_not_taken() -> None:
    a = options_of(tuple(FEW), [(10, 9.0), (20, 1.0)])
    b = options_of(tuple(FEW), [(10, 2.0), (15, 1.5)])
    assert allocate({"a": a, "b": b}, 34) == {"a": FEW[1], "b": FEW[0]}
    assert allocate({"a": a, "b": b}, 35) == {"a": FEW[1], "b": FEW[1]}


def test_too_small_a_budget_says_what_it_takes() -> None:
    options = {"a": [Option(FEW[0], 1_234_567, 1.0)]}
    with pytest.raises(UsageError, match="at least 1,234,567 bytes, and the budget leaves them 1,234,566; give a"):
        allocate(options, 1_234_566)
    with pytest.raises(UsageError, match="leaves them 0; give a larger one"):
        allocate(options, -5)
    assert allocate(options, 1_234_567) == {"a": FEW[0]}


# ---- hulls
def is_below(option: Option, a: Option, b: Option) -> bool:
    """Strictly below the line from a to b, at the option's bytes."""
    share = Fraction(option.n_bytes - a.n_bytes, b.n_bytes - a.n_bytes)
    return Fraction(option.damage) < Fraction(a.damage) + share * (Fraction(b.damage) - Fraction(a.damage))


def is_corner(option: Option, options: list[Option]) -> bool:
    """No other option is as small and does as little, and no two others are as good when mixed."""
    others = [each for each in options if each is not option]
    if any(each.n_bytes <= option.n_bytes and each.damage <= option.damage for each in others):
        return False
    smaller = [each for each in others if each.n_bytes < option.n_bytes]
    larger = [each for each in others if each.n_bytes > option.n_bytes]
    return all(is_below(option, a, b) for a in smaller for b in larger)


@given(some_options.filter(lambda each: len({(option.n_bytes, option.damage) for option in each}) == len(each)))
@example(options_of(tuple(FEW), [(1, 3.0), (2, 2.0), (3, 1.0), (9, 0.5)]))
def test_a_hull_is_made_of_corners(options: list[Option]) -> None:
    corners = [option for option in options if is_corner(option, options)]
    assert hull(options) == sorted(corners, key=lambda option: option.n_bytes)


def test_of_equal_options_one_is_left() -> None:
    assert len(hull([Option(fmt, 5, 1.0) for fmt in FEW])) == 1


# ---- sizes
@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("4.1GB", 4_100_000_000), ("4.1gb", 4_100_000_000), ("4.1 G", 4_100_000_000), (" 4.1GB ", 4_100_000_000),
        ("3800MiB", 3800 << 20), ("3800mi", 3800 << 20), ("1TiB", 1 << 40), ("1tb", 10**12), ("1.5KiB", 1536),
        ("900k", 900_000), ("4096", 4096), ("4096B", 4096), ("4096 b", 4096), ("0.0000001GB", 100), ("0", 0),
        ("1.23456789GB", 1_234_567_890), ("0.3KB", 300), ("0.9B", 0), ("999999999T", 999_999_999 * 10**12),
    ],
)  # fmt: skip
def test_sizes(text: str, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "GB", "-1GB", "+1GB", "1,5GB", "1.GB", ".5GB", "1e9", "inf", "nan", "4GBB", "4XB", "4Gb/s", "4iB",
        "0x10", "1 2GB", "1.2.3GB", "9" * 10, "1." + "9" * 10, "٤GB", "4\nGB\n5", "4GB\x00", "half", "\udcff",
    ],
)  # fmt: skip
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a size; give one like 4\.1GB or 3800MiB") as error:
        parse_size(text)
    assert str(error.value).isprintable()


@given(st.integers(0, 10**9 - 1), st.integers(0, 999), st.sampled_from(["K", "M", "G", "T"]), st.booleans())
def test_sizes_are_exact(whole: int, thousandths: int, unit: str, binary: bool) -> None:
    factor = (1024 if binary else 1000) ** ("KMGT".index(unit) + 1)
    text = f"{whole}.{thousandths:03}{unit}{'iB' if binary else 'B'}"
    assert parse_size(text) == (whole * 1000 + thousandths) * factor // 1000


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert parse_size(text) >= 0
