"""exp, lane by lane."""

from llmq.jit import jit
from llmq.simd.basics import f32x16_of_bits, fma, i32_of_f32x16, round_f32x16, splat_f32x16, splat_i32x16, where_less

# Cody and Waite's split of ln 2: the first part has few enough bits that n * LN2_HIGH is exact.
LN2_HIGH, LN2_LOW = 0.693145751953125, 1.4286067653302e-06


@jit
def exp_f32x16(x):
    """exp of each lane to about 2 units in the last place; 0 below -87.3, no overflow above 88.3 (clamped).

    Split x = n ln 2 + r with |r| <= ln 2 / 2 (Cody and Waite), a polynomial for exp(r), n into the exponent bits.
    """
    low, high = splat_f32x16(-87.3), splat_f32x16(88.3)
    clamped = where_less(x, low, low, where_less(high, x, high, x))
    n = round_f32x16(clamped * splat_f32x16(1.4426950408889634))
    r = fma(n, splat_f32x16(-LN2_HIGH), clamped)
    r = fma(n, splat_f32x16(-LN2_LOW), r)
    p = splat_f32x16(1.0 / 5040)
    p = fma(p, r, splat_f32x16(1.0 / 720))
    p = fma(p, r, splat_f32x16(1.0 / 120))
    p = fma(p, r, splat_f32x16(1.0 / 24))
    p = fma(p, r, splat_f32x16(1.0 / 6))
    p = fma(p, r, splat_f32x16(0.5))
    p = fma(p, r, splat_f32x16(1.0))
    p = fma(p, r, splat_f32x16(1.0))
    scale = f32x16_of_bits((i32_of_f32x16(n) + splat_i32x16(127)) << splat_i32x16(23))
    return where_less(x, low, splat_f32x16(0.0), p * scale)
