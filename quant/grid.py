"""What a block format can hold: levels, scales and minima, as the search and the packing of bits see them.

A block of 256 weights has sub-blocks of 16 or 32 with a scale each, a small integer times the block's half float `d`;
some formats have minima as well, likewise with `dmin`. A block of 32 has one sub-block, whose scale is `d` itself. A
weight is  d * sc * level - dmin * m.
"""

from dataclasses import dataclass

from llmq.formats import (
    IQ4_NL,
    IQ4_VALUES,
    IQ4_XS,
    Q2_K,
    Q3_K,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Format,
)

UNIFORM, TABLE = "uniform", "table"


@dataclass(frozen=True, slots=True)
class Grid:
    """`size` weights share a scale; `levels` are the lowest and highest, all integers between or IQ4_VALUES.

    `scales` and `minima` are the ranges of the integers, (1, 1) where `d` or `dmin` stands alone, None without minima.
    The search tries `tries` numbers of steps from `first` on, `step` apart, for the span of a sub-block (with minima)
    or for its weight farthest from zero.
    """

    format: Format
    size: int
    levels: tuple[int, int]
    scales: tuple[int, int]
    minima: tuple[int, int] | None
    first: float
    step: float
    tries: int
    spacing: str = UNIFORM

    @property
    def n_sub(self) -> int:
        return self.format.block_size // self.size


IQ4_LEVELS = (int(IQ4_VALUES[0]), int(IQ4_VALUES[-1]))

GRIDS = {
    grid.format: grid
    for grid in (
        Grid(Q2_K, 16, (0, 3), (0, 15), (0, 15), 2.1, 0.1, 19),
        Grid(Q3_K, 16, (-4, 3), (-32, 31), None, 3.1, 0.1, 19),
        Grid(Q4_K, 32, (0, 15), (0, 63), (0, 63), 14, 0.1, 21),
        Grid(Q5_K, 32, (0, 31), (0, 63), (0, 63), 30.5, 0.1, 16),
        Grid(Q6_K, 16, (-32, 31), (-128, 127), None, 31.1, 0.1, 19),
        Grid(Q4_0, 32, (-8, 7), (1, 1), None, 7.1, 0.1, 19),
        Grid(Q5_0, 32, (-16, 15), (1, 1), None, 15.1, 0.1, 19),
        Grid(Q4_1, 32, (0, 15), (1, 1), (1, 1), 14, 0.1, 21),
        Grid(Q5_1, 32, (0, 31), (1, 1), (1, 1), 30, 0.1, 21),
        Grid(IQ4_NL, 32, IQ4_LEVELS, (1, 1), None, 119, 1, 17, TABLE),
        Grid(IQ4_XS, 32, IQ4_LEVELS, (-32, 31), None, 119, 1, 17, TABLE),
    )
}
