"""Explicit 8-lane float32 vectors for Numba kernels.

A `f32x8` value is an LLVM `<8 x float>`: one AVX register, or two NEON ones. Kernels write

    acc = splat(f32(0.0))
    acc = fma(load(key, i), splat(query[e]), acc)

with flat, contiguous float32 arrays and element offsets. The IR goes through llvmlite, which ships
inside Numba's wheels, so nothing is compiled at install time.
"""

import operator

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 8
f32 = np.float32


class F32x8(types.Type):
    def __init__(self):
        super().__init__(name="f32x8")


f32x8 = F32x8()
_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_INDEX = ir.IntType(32)
_FAST = ("reassoc", "contract", "nsz", "arcp", "afn")  # NaN and infinity keep their meaning


@register_model(F32x8)
class _F32x8Model(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _VECTOR)


def _address(context, builder, array_type, array, index):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), _VECTOR.as_pointer())


def _is_flat_f32(array):
    return isinstance(array, types.Array) and array.dtype == types.float32 and array.ndim == 1


@intrinsic
def load(typingctx, array, index):
    """Eight consecutive elements of a flat float32 array, from `index`; no alignment needed."""
    if not _is_flat_f32(array) or not isinstance(index, types.Integer):
        return None

    def codegen(context, builder, sig, args):
        index = context.cast(builder, args[1], sig.args[1], types.intp)
        value = builder.load(_address(context, builder, sig.args[0], args[0], index))
        value.align = 4
        return value

    return f32x8(array, index), codegen


@intrinsic
def store(typingctx, array, index, value):
    """Write eight consecutive elements of a flat float32 array, from `index`."""
    if not _is_flat_f32(array) or not isinstance(index, types.Integer) or value != f32x8:
        return None

    def codegen(context, builder, sig, args):
        index = context.cast(builder, args[1], sig.args[1], types.intp)
        address = _address(context, builder, sig.args[0], args[0], index)
        builder.store(args[2], address).align = 4
        return context.get_dummy_value()

    return types.void(array, index, value), codegen


@intrinsic
def splat(typingctx, scalar):
    """A vector with the float32 `scalar` in every lane."""
    if scalar != types.float32:
        return None

    def codegen(context, builder, sig, args):
        one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), args[0], _INDEX(0))
        zeros = ir.Constant(ir.VectorType(_INDEX, LANES), [0] * LANES)
        return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), zeros)

    return f32x8(scalar), codegen


def _call(builder, name, result, args, flags=()):
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, [a.type for a in args]), name
    )
    return builder.call(function, args, fastmath=flags)


def _vector_intrinsic(arity, emit, doc):
    """An intrinsic over `arity` vectors whose IR `emit(builder, *values)` returns."""
    if arity == 1:

        def define(typingctx, a):
            return (f32x8(a), lambda c, b, s, v: emit(b, *v)) if a == f32x8 else None
    elif arity == 2:

        def define(typingctx, a, b):
            ok = a == f32x8 and b == f32x8
            return (f32x8(a, b), lambda c, bld, s, v: emit(bld, *v)) if ok else None
    elif arity == 3:

        def define(typingctx, a, b, c):
            ok = a == f32x8 and b == f32x8 and c == f32x8
            return (f32x8(a, b, c), lambda ctx, bld, s, v: emit(bld, *v)) if ok else None
    else:

        def define(typingctx, a, b, c, d):
            ok = a == f32x8 and b == f32x8 and c == f32x8 and d == f32x8
            return (f32x8(a, b, c, d), lambda ctx, bld, s, v: emit(bld, *v)) if ok else None

    define.__doc__ = doc
    return intrinsic(define)


def _ordered(relation):
    def emit(b, x, y, when_true, when_false):
        return b.select(b.fcmp_ordered(relation, x, y), when_true, when_false)

    return emit


_SUFFIX = f"v{LANES}f32"
_zero = ir.Constant(_VECTOR, [0.0] * LANES)
fma = _vector_intrinsic(
    3, lambda b, x, y, z: _call(b, f"llvm.fmuladd.{_SUFFIX}", _VECTOR, [x, y, z]), "x * y + z"
)
maximum = _vector_intrinsic(2, lambda b, x, y: _ordered(">")(b, x, y, x, y), "Larger of x and y")
minimum = _vector_intrinsic(2, lambda b, x, y: _ordered("<")(b, x, y, x, y), "Smaller of x and y")
sqrt = _vector_intrinsic(
    1, lambda b, x: _call(b, f"llvm.sqrt.{_SUFFIX}", _VECTOR, [x]), "Square root"
)
where_positive = _vector_intrinsic(
    3, lambda b, x, y, z: _ordered(">")(b, x, _zero, y, z), "y where x > 0, else z"
)
where_less = _vector_intrinsic(
    4, lambda b, x, y, z, w: _ordered("<")(b, x, y, z, w), "z where x < y, else w"
)
plus = _vector_intrinsic(
    2, lambda b, x, y: b.fadd(x, y), "x + y, never fused with the products that it adds"
)


@intrinsic
def bits_less_equal(typingctx, a, b):
    """Bit i of the result is set where lane i of a <= b, as an int64; not where one is NaN."""
    if a != f32x8 or b != f32x8:
        return None

    def codegen(context, builder, sig, args):
        lanes = builder.bitcast(builder.fcmp_ordered("<=", *args), ir.IntType(LANES))
        return builder.zext(lanes, ir.IntType(64))

    return types.int64(a, b), codegen


def _round_scale(b, x):
    """(fraction, 2**integer) of x = integer + fraction with |fraction| <= 1/2, x in [-126, 127]."""
    whole = _call(b, f"llvm.nearbyint.{_SUFFIX}", _VECTOR, [x])
    ints = ir.VectorType(ir.IntType(32), LANES)
    bias, shift = ir.Constant(ints, [127] * LANES), ir.Constant(ints, [23] * LANES)
    bits = b.shl(b.add(b.fptosi(whole, ints), bias), shift)
    return b.fsub(x, whole), b.bitcast(bits, _VECTOR)


# 2**f on [-1/2, 1/2]: Taylor coefficients ln(2)**n / n! refitted (least squares at Chebyshev nodes,
# float64, constant fixed at 1); largest relative error 1.2e-7 after float32 evaluation.
_EXP2 = (
    1.5353362e-4, 1.3398874e-3, 9.6184373e-3, 5.5503324e-2, 2.4022648e-1, 6.9314718e-1, 1.0,
)  # fmt: skip


def _exp2(b, x):
    low, high = ir.Constant(_VECTOR, [-126.0] * LANES), ir.Constant(_VECTOR, [127.0] * LANES)
    x = _ordered("<")(b, x, low, low, x)
    x = _ordered(">")(b, x, high, high, x)
    fraction, scale = _round_scale(b, x)
    value = ir.Constant(_VECTOR, [_EXP2[0]] * LANES)
    for c in _EXP2[1:]:
        value = _call(
            b,
            f"llvm.fmuladd.{_SUFFIX}",
            _VECTOR,
            [value, fraction, ir.Constant(_VECTOR, [c] * LANES)],
        )
    return b.fmul(value, scale)


exp2 = _vector_intrinsic(
    1, _exp2, "2**x, float32 accuracy; x below -126 gives 2**-126, NaN stays NaN"
)


def _reduce(name, doc):
    def define(typingctx, a):
        if a != f32x8:
            return None

        def codegen(context, builder, sig, args):
            if name == "add":
                start = ir.Constant(_FLOAT, -0.0)
                operands = [start, args[0]]
            else:
                operands = [args[0]]
            return _call(builder, f"llvm.vector.reduce.f{name}.{_SUFFIX}", _FLOAT, operands, _FAST)

        return types.float32(a), codegen

    define.__doc__ = doc
    return intrinsic(define)


hsum = _reduce("add", "Sum of the eight lanes, as float32 (fixed pairwise order)")
hmax = _reduce("max", "Largest of the eight lanes, as float32")


def _operator(op, emit):
    @infer_global(op)
    class _Typing(AbstractTemplate):
        def generic(self, args, kws):
            if len(args) == 2 and all(a == f32x8 for a in args):
                return signature(f32x8, *args)
            return None

    @lower_builtin(op, F32x8, F32x8)
    def _lower(context, builder, sig, args):
        return emit(builder, *args)


_operator(operator.add, lambda b, x, y: b.fadd(x, y, flags=("contract",)))
_operator(operator.sub, lambda b, x, y: b.fsub(x, y, flags=("contract",)))
_operator(operator.mul, lambda b, x, y: b.fmul(x, y, flags=("contract",)))
_operator(operator.truediv, lambda b, x, y: b.fdiv(x, y))


@njit(inline="always")
def zero():
    """A vector of zeros."""
    return splat(f32(0.0))


@intrinsic
def load_transposed(typingctx, source, index, stride, last, target, at):
    """Copy rows of eight floats to columns: `target[at + 8*e + j] = source[index + j*stride + e]`.

    Rows j beyond `last` repeat row `last`. Both arrays are flat float32.
    """
    integers = all(isinstance(t, types.Integer) for t in (index, stride, last, at))
    if not (_is_flat_f32(source) and _is_flat_f32(target) and integers):
        return None

    def codegen(context, builder, sig, args):
        def as_index(n):
            return context.cast(builder, args[n], sig.args[n], types.intp)

        index, stride, last, at = (as_index(n) for n in (1, 2, 3, 5))
        rows = []
        for j in range(LANES):
            lane = ir.Constant(index.type, j)
            row = builder.select(builder.icmp_signed("<", lane, last), lane, last)
            offset = builder.add(index, builder.mul(row, stride))
            row = builder.load(_address(context, builder, sig.args[0], args[0], offset))
            row.align = 4
            rows.append(row)
        # Three rounds of interleaving row j with row j + 4 transpose an 8 x 8 block.
        low = [n // 2 + (n % 2) * LANES for n in range(LANES)]
        masks = [ir.Constant(ir.VectorType(_INDEX, LANES), [n + s for n in low]) for s in (0, 4)]
        for _ in range(3):
            rows = [
                builder.shuffle_vector(rows[j // 2], rows[j // 2 + 4], masks[j % 2])
                for j in range(LANES)
            ]
        for e, row in enumerate(rows):
            offset = builder.add(at, ir.Constant(at.type, e * LANES))
            builder.store(row, _address(context, builder, sig.args[4], args[4], offset)).align = 4
        return context.get_dummy_value()

    return types.void(source, index, stride, last, target, at), codegen
