"""Powers and the normal distribution's tail for eight float32 lanes."""

from llvmlite import ir
from numba import njit

from pointformer.kernels.cpu import simd
from pointformer.kernels.cpu.simd import exp2, f32, fma, maximum, splat, where_positive, zero

_INTS = ir.VectorType(ir.IntType(32), simd.LANES)
_SQRT_HALF_BITS = 0x3F3504F3


def _ints(value):
    return ir.Constant(_INTS, [value] * simd.LANES)


def _biased_exponent(b, x):
    """Integer e of x = mantissa * 2**e, mantissa in [sqrt(1/2), sqrt(2))."""
    return b.ashr(b.sub(b.bitcast(x, _INTS), _ints(_SQRT_HALF_BITS)), _ints(23))


def _mantissa(b, x):
    return b.bitcast(
        b.sub(b.bitcast(x, _INTS), b.shl(_biased_exponent(b, x), _ints(23))), simd._VECTOR
    )


exponent = simd._vector_intrinsic(
    1,
    lambda b, x: b.sitofp(_biased_exponent(b, x), simd._VECTOR),
    "The integer e of x = m * 2**e with m in [sqrt(1/2), sqrt(2)), for normal x > 0",
)
mantissa = simd._vector_intrinsic(
    1, _mantissa, "The m of x = m * 2**e in [sqrt(1/2), sqrt(2)), for normal x > 0"
)


@njit(inline="always")
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


@njit(inline="always")
def power(x, h):
    """x**h for x >= 0 and h > 0, to a relative error of about (1 + h) * 1e-7.

    The product h * log2(x) keeps its rounding error, which would grow with log2(x) otherwise.
    Results are kept in [2**-126, 2**127], but for 0**h = 0.
    """
    e = exponent(x)
    whole = h * e
    part = h * log2_mantissa(mantissa(x))
    y = whole + part
    rest = (whole - y) + part + fma(h, e, zero() - whole)
    value = exp2(y)
    return where_positive(x, fma(value, rest * splat(f32(0.6931472)), value), zero())


@njit(inline="always")
def log2(x):
    """log2(x) for normal x > 0, absolute error 8e-8 beside the rounding of the result."""
    return exponent(x) + log2_mantissa(mantissa(x))


@njit(inline="always")
def normal_density_and_tail(x):
    """exp(-x**2 / 2), and the probability of more than |x| in a normal distribution.

    tail = exp(-x**2 / 2) * u * P(u), u = 1 / (1 + 0.35 |x|): the scaled complementary error
    function, minimax of the relative error on |x| <= 13.5, 3e-8 before and 3e-7 after rounding
    P and u; the exponential's argument adds x**2 * 4e-8. 1 - tail has an absolute error of 1e-7.
    """
    size = maximum(x, zero() - x)
    exponential = exp2(x * x * splat(f32(-0.72134752)))
    u = splat(f32(1.0)) / fma(size, splat(f32(0.35)), splat(f32(1.0)))
    p = splat(f32(-0.02912587))
    p = fma(p, u, splat(f32(0.14387227)))
    p = fma(p, u, splat(f32(-0.25550463)))
    p = fma(p, u, splat(f32(0.15892936)))
    p = fma(p, u, splat(f32(-0.02293719)))
    p = fma(p, u, splat(f32(0.10543296)))
    p = fma(p, u, splat(f32(0.11985243)))
    p = fma(p, u, splat(f32(0.13985908)))
    p = fma(p, u, splat(f32(0.13962157)))
    return exponential, exponential * u * p
