"""Powers and the normal distribution for eight float32 lanes."""

from pointformer.kernels.cpu.runtime import inlined
from pointformer.kernels.cpu.simd import (
    constant,
    exp2,
    f32,
    fma,
    integers_like,
    maximum,
    minimum,
    splat,
    vector_intrinsic,
    where_positive,
    zero,
)

_SQRT_HALF_BITS = 0x3F3504F3


def _biased_exponent(b, x):
    """Integer e of x = mantissa * 2**e, mantissa in [sqrt(1/2), sqrt(2))."""
    integers = integers_like(x)
    bits = b.sub(b.bitcast(x, integers), constant(integers, _SQRT_HALF_BITS))
    return b.ashr(bits, constant(integers, 23))


def _mantissa(b, x):
    integers = integers_like(x)
    power = b.shl(_biased_exponent(b, x), constant(integers, 23))
    return b.bitcast(b.sub(b.bitcast(x, integers), power), x.type)


exponent = vector_intrinsic(
    1,
    lambda b, x: b.sitofp(_biased_exponent(b, x), x.type),
    "The integer e of x = m * 2**e with m in [sqrt(1/2), sqrt(2)), for normal x > 0",
)
mantissa = vector_intrinsic(
    1, _mantissa, "The m of x = m * 2**e in [sqrt(1/2), sqrt(2)), for normal x > 0"
)


def _leading_bits(b, x):
    integers = integers_like(x)
    return b.bitcast(b.and_(b.bitcast(x, integers), constant(integers, -(1 << 7))), x.type)


leading_bits = vector_intrinsic(
    1, _leading_bits, "x cut to 17 bits: these, and the rest, times an exponent are exact"
)


@inlined
def log2_mantissa(m):
    """log2(m) on [sqrt(1/2), sqrt(2)], absolute error 8e-8.

    log2(m) = s * P(s**2), s = (m - 1) / (m + 1): the series of atanh refitted to the interval
    (minimax of the relative error, 7e-10 before rounding).
    """
    s = (m - splat(f32(1.0))) / (m + splat(f32(1.0)))
    z = s * s
    p = fma(splat(f32(0.43173588)), z, splat(f32(0.57671438)))
    p = fma(p, z, splat(f32(0.96179885)))
    return s * fma(p, z, splat(f32(2.8853901)))


@inlined
def power(x, h):
    """x**h for x >= 0 and h > 0, to a relative error of about (1 + h) * 1e-7.

    The product h * log2(x) keeps its rounding error, which would grow with log2(x) otherwise: h is
    split so that products with e are exact, on CPUs without fused multiply-adds too.
    Results are kept in [2**-126, 2**127], but for 0**h = 0.
    """
    e = exponent(x)
    high = leading_bits(h)
    whole = high * e
    part = fma(h, log2_mantissa(mantissa(x)), (h - high) * e)
    y = whole + part
    rest = (whole - y) + part
    value = exp2(y)
    return where_positive(x, fma(value, rest * splat(f32(0.6931472)), value), zero())


@inlined
def log2(x):
    """log2(x) for normal x > 0, absolute error 8e-8 beside the rounding of the result."""
    return exponent(x) + log2_mantissa(mantissa(x))


@inlined
def normal_distribution(x):
    """Phi(x), the probability of less than x in a normal distribution, absolute error 2.7e-7.

    Phi(x) - 1/2 = x * P(x**2) / Q(x**2) on |x| <= 5.5, where Phi is within 2e-8 of its limits:
    minimax of the relative error, 2e-8 before rounding. Over all float32 numbers the largest error
    is 2.2e-7 with fused multiply-adds and 2.6e-7 without, both near the ends.
    """
    x = maximum(minimum(x, splat(f32(5.5))), splat(f32(-5.5)))
    z = x * x
    p = fma(splat(f32(2.2931154e-8)), z, splat(f32(6.3015913e-6)))
    p = fma(p, z, splat(f32(1.6457381e-4)))
    p = fma(p, z, splat(f32(4.6514825e-3)))
    p = fma(p, z, splat(f32(3.3458896e-2)))
    p = fma(p, z, splat(f32(0.39894227)))
    q = fma(splat(f32(1.1990283e-6)), z, splat(f32(7.2167053e-5)))
    q = fma(q, z, splat(f32(1.8606463e-3)))
    q = fma(q, z, splat(f32(2.8416133e-2)))
    q = fma(q, z, splat(f32(0.25053542)))
    q = fma(q, z, splat(f32(1.0)))
    return fma(x, p / q, splat(f32(0.5)))


@inlined
def normal_density(x):
    """exp(-x**2 / 2) / sqrt(2 pi), relative error (2 + x**2) * 1e-7."""
    return exp2(x * x * splat(f32(-0.72134752))) * splat(f32(0.39894228))
