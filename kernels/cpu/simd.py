"""Explicit vectors for Numba kernels: 8 or 16 lanes of float32, 8 of 64-bit integers.

A `f32x8` value is an LLVM `<8 x float>`: one AVX register, or two NEON ones. A `f32x16` is one
AVX-512 register, and two AVX registers where there are none as wide: the same source serves all.
Kernels write

    acc = splat(f32(0.0))
    acc = fma(load(key, i), splat(query[e]), acc)

with flat, contiguous float32 arrays, or pointers to them, and element offsets. `load16` and
`splat16` make the wide vectors; everything else takes either kind, but not both at a time. The IR
goes through llvmlite, which ships inside Numba's wheels, so nothing is compiled at install time.
"""

import operator

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 8
f32 = np.float32


_FLOAT = ir.FloatType()
_INDEX = ir.IntType(32)


class F32Vector(types.Type):
    def __init__(self, lanes):
        self.lanes = lanes
        super().__init__(name=f"f32x{lanes}")


@register_model(F32Vector)
class _F32VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ir.VectorType(_FLOAT, fe_type.lanes))


f32x8, f32x16 = F32Vector(LANES), F32Vector(2 * LANES)


def constant(like, value):
    """The IR constant with `value` in every lane of the IR type `like`."""
    return ir.Constant(like, [value] * like.count)


def integers_like(vector):
    """The IR type of as many 32-bit integers as a vector has lanes."""
    return ir.VectorType(_INDEX, vector.type.count)


def _address(context, builder, array_type, array, index, lanes=LANES):
    data = array
    if isinstance(array_type, types.Array):
        data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), ir.VectorType(_FLOAT, lanes).as_pointer())


def _is_flat_f32(array):
    if array == types.CPointer(types.float32):
        return True
    return isinstance(array, types.Array) and array.dtype == types.float32 and array.ndim == 1


def _loader(vector, doc):
    def define(typingctx, array, index):
        if not _is_flat_f32(array) or not isinstance(index, types.Integer):
            return None

        def codegen(context, builder, sig, args):
            index = context.cast(builder, args[1], sig.args[1], types.intp)
            address = _address(context, builder, sig.args[0], args[0], index, vector.lanes)
            value = builder.load(address)
            value.align = 4
            return value

        return vector(array, index), codegen

    define.__doc__ = doc
    return intrinsic(define)


load = _loader(f32x8, "Eight elements of a flat float32 array from `index`; no alignment needed.")
load16 = _loader(f32x16, "Sixteen elements of a flat float32 array, like `load`.")


@intrinsic
def store(typingctx, array, index, value):
    """Write a vector to consecutive elements of a flat float32 array, from `index`."""
    if not _is_flat_f32(array) or not isinstance(index, types.Integer):
        return None
    if not isinstance(value, F32Vector):
        return None

    def codegen(context, builder, sig, args):
        index = context.cast(builder, args[1], sig.args[1], types.intp)
        address = _address(context, builder, sig.args[0], args[0], index, sig.args[2].lanes)
        builder.store(args[2], address).align = 4
        return context.get_dummy_value()

    return types.void(array, index, value), codegen


def _first_lanes(builder, count):
    """A mask of the first `count` of eight lanes."""
    lanes = ir.VectorType(_INDEX, LANES)
    one = builder.insert_element(ir.Constant(lanes, ir.Undefined), count, _INDEX(0))
    counts = builder.shuffle_vector(one, ir.Constant(lanes, ir.Undefined), constant(lanes, 0))
    return builder.icmp_signed("<", ir.Constant(lanes, list(range(LANES))), counts)


@intrinsic
def load_first(typingctx, array, index, count, rest):
    """Like `load`, but of the first `count` elements; the other lanes are those of `rest`."""
    if not _is_flat_f32(array) or not isinstance(count, types.Integer) or rest != f32x8:
        return None

    def codegen(context, builder, sig, args):
        index = context.cast(builder, args[1], sig.args[1], types.intp)
        count = context.cast(builder, args[2], sig.args[2], types.int32)
        address = _address(context, builder, sig.args[0], args[0], index)
        inputs = [address, _INDEX(4), _first_lanes(builder, count), args[3]]
        return _call(builder, "llvm.masked.load.v8f32.p0", args[3].type, inputs)

    return f32x8(array, index, count, rest), codegen


@intrinsic
def store_first(typingctx, array, index, value, count):
    """Like `store`, but of the first `count` lanes."""
    if not _is_flat_f32(array) or not isinstance(count, types.Integer) or value != f32x8:
        return None

    def codegen(context, builder, sig, args):
        index = context.cast(builder, args[1], sig.args[1], types.intp)
        count = context.cast(builder, args[3], sig.args[3], types.int32)
        address = _address(context, builder, sig.args[0], args[0], index)
        inputs = [args[2], address, _INDEX(4), _first_lanes(builder, count)]
        _call(builder, "llvm.masked.store.v8f32.p0", ir.VoidType(), inputs)
        return context.get_dummy_value()

    return types.void(array, index, value, count), codegen


@intrinsic
def pointer(typingctx, array):
    """Where the elements of a flat array are: `pointer[i]` and vectors without the array's costs.

    Reference counts of arrays and indices that count from the end cost inner loops dearly, and long
    to compile. The array must outlive its pointer.
    """
    if not isinstance(array, types.Array) or array.ndim != 1 or array.layout != "C":
        return None

    def codegen(context, builder, sig, args):
        return context.make_array(sig.args[0])(context, builder, args[0]).data

    return types.CPointer(array.dtype)(array), codegen


@intrinsic
def advance(typingctx, pointer, index):
    """The pointer to element `index` of what `pointer` points to."""
    if not isinstance(pointer, types.CPointer) or not isinstance(index, types.Integer):
        return None

    def codegen(context, builder, sig, args):
        return builder.gep(args[0], [context.cast(builder, args[1], sig.args[1], types.intp)])

    return pointer(pointer, index), codegen


def _cast(dtype, doc):
    def define(typingctx, pointer):
        if not isinstance(pointer, types.CPointer):
            return None
        result = types.CPointer(dtype)
        return result(pointer), lambda context, builder, sig, args: builder.bitcast(
            args[0], context.get_value_type(result)
        )

    define.__doc__ = doc
    return intrinsic(define)


as_float32 = _cast(types.float32, "The same memory as float32, to copy by vectors.")
as_int32 = _cast(types.int32, "The same memory as 32-bit integers.")
as_int64 = _cast(types.int64, "The same memory as 64-bit integers.")

_CACHE_LINE = 64


@intrinsic
def allocate(typingctx, count):
    """A pointer to `count` float32 zeros, at the start of a cache line, until `free`.

    What `np.zeros` is for kernels: that compiles longer than many a kernel.
    """
    if not isinstance(count, types.Integer):
        return None

    def codegen(context, builder, sig, args):
        intp = context.get_value_type(types.intp)
        count = context.cast(builder, args[0], sig.args[0], types.intp)
        size = builder.mul(count, intp(4))
        # Room to align, and for the address to free, kept in front.
        block = context.nrt.allocate(builder, builder.add(size, intp(2 * _CACHE_LINE)))
        address = builder.ptrtoint(block, intp)
        start = builder.and_(builder.add(address, intp(2 * _CACHE_LINE - 1)), intp(-_CACHE_LINE))
        data = builder.inttoptr(start, _FLOAT.as_pointer())
        builder.store(address, builder.gep(builder.bitcast(data, intp.as_pointer()), [intp(-1)]))
        cgutils.memset(builder, data, size, 0)
        return data

    return types.CPointer(types.float32)(count), codegen


@intrinsic
def free(typingctx, pointer):
    """Give back what `allocate` gave."""
    if pointer != types.CPointer(types.float32):
        return None

    def codegen(context, builder, sig, args):
        intp = context.get_value_type(types.intp)
        address = builder.gep(builder.bitcast(args[0], intp.as_pointer()), [intp(-1)])
        block = builder.inttoptr(builder.load(address), cgutils.voidptr_t)
        context.nrt.free(builder, block)
        return context.get_dummy_value()

    return types.void(pointer), codegen


@intrinsic
def float_bits(typingctx, value):
    """The 32 bits of a float32 as a signed integer, as int64."""
    if value != types.float32:
        return None

    def codegen(context, builder, sig, args):
        return builder.sext(builder.bitcast(args[0], _INDEX), ir.IntType(64))

    return types.int64(value), codegen


@intrinsic
def prefetch(typingctx, array, index):
    """Ask for the cache line of an element that will be read soon; it need not exist."""
    if not _is_flat_f32(array) or not isinstance(index, types.Integer):
        return None

    def codegen(context, builder, sig, args):
        index = context.cast(builder, args[1], sig.args[1], types.intp)
        address = _address(context, builder, sig.args[0], args[0], index, 1)
        pointer = builder.bitcast(address, ir.IntType(8).as_pointer())
        read, keep, data = _INDEX(0), _INDEX(3), _INDEX(1)
        _call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, read, keep, data])
        return context.get_dummy_value()

    return types.void(array, index), codegen


def _splatter(vector, doc):
    def define(typingctx, scalar):
        if scalar != types.float32:
            return None

        def codegen(context, builder, sig, args):
            undefined = ir.Constant(ir.VectorType(_FLOAT, vector.lanes), ir.Undefined)
            one = builder.insert_element(undefined, args[0], _INDEX(0))
            zeros = constant(ir.VectorType(_INDEX, vector.lanes), 0)
            return builder.shuffle_vector(one, undefined, zeros)

        return vector(scalar), codegen

    define.__doc__ = doc
    return intrinsic(define)


splat = _splatter(f32x8, "Eight lanes that all hold the float32 `scalar`.")
splat16 = _splatter(f32x16, "Sixteen lanes that all hold the float32 `scalar`.")


def _call(builder, name, result, args):
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, [a.type for a in args]), name
    )
    return builder.call(function, args)


def _overloaded(name, builder, args):
    """Call an LLVM intrinsic that is overloaded by the vector's type."""
    vector = args[0].type
    return _call(builder, f"{name}.v{vector.count}f32", vector, args)


def _same_vectors(*values):
    return isinstance(values[0], F32Vector) and all(value == values[0] for value in values)


def vector_intrinsic(arity, emit, doc):
    """An intrinsic over `arity` vectors of one kind whose IR `emit(builder, *values)` returns."""

    def typed(*values):
        if not _same_vectors(*values):
            return None
        return values[0](*values), lambda context, builder, signature, v: emit(builder, *v)

    # Numba reads the number of arguments off the signature.
    define = (
        lambda typingctx, a: typed(a),
        lambda typingctx, a, b: typed(a, b),
        lambda typingctx, a, b, c: typed(a, b, c),
        lambda typingctx, a, b, c, d: typed(a, b, c, d),
    )[arity - 1]
    define.__doc__ = doc
    return intrinsic(define)


def _ordered(relation):
    def emit(b, x, y, when_true, when_false):
        return b.select(b.fcmp_ordered(relation, x, y), when_true, when_false)

    return emit


fma = vector_intrinsic(3, lambda b, x, y, z: _overloaded("llvm.fmuladd", b, [x, y, z]), "x * y + z")
maximum = vector_intrinsic(2, lambda b, x, y: _ordered(">")(b, x, y, x, y), "Larger of x and y")
minimum = vector_intrinsic(2, lambda b, x, y: _ordered("<")(b, x, y, x, y), "Smaller of x and y")
maximum_or_nan = vector_intrinsic(
    2,
    lambda b, x, y: b.select(b.fcmp_unordered("uno", x, x), x, _ordered(">")(b, x, y, x, y)),
    "Larger of x and y, NaN where one is NaN",
)
sqrt = vector_intrinsic(1, lambda b, x: _overloaded("llvm.sqrt", b, [x]), "Square root")
where_positive = vector_intrinsic(
    3,
    lambda b, x, y, z: _ordered(">")(b, x, constant(x.type, 0.0), y, z),
    "y where x > 0, else z",
)
where_less = vector_intrinsic(
    4, lambda b, x, y, z, w: _ordered("<")(b, x, y, z, w), "z where x < y, else w"
)
plus = vector_intrinsic(
    2, lambda b, x, y: b.fadd(x, y), "x + y, never fused with the products that it adds"
)


def _bits(relation):
    def define(typingctx, a, b):
        if not _same_vectors(a, b):
            return None

        def codegen(context, builder, sig, args):
            which = builder.fcmp_ordered(relation, *args)
            return builder.zext(builder.bitcast(which, ir.IntType(a.lanes)), ir.IntType(64))

        return types.int64(a, b), codegen

    define.__doc__ = f"Bit i of the result, an int64, is set where lane i of a {relation} b"
    return intrinsic(define)


bits_less = _bits("<")
bits_less_equal = _bits("<=")


@intrinsic
def lowest_bit(typingctx, bits):
    """The number of the lowest bit that is set in an int64; undefined for 0."""
    if bits != types.int64:
        return None

    def codegen(context, builder, sig, args):
        return builder.cttz(args[0], ir.IntType(1)(1))

    return types.int64(bits), codegen


def _round_scale(b, x):
    """(fraction, 2**integer) of x = integer + fraction with |fraction| <= 1/2, x in [-126, 127]."""
    whole = _overloaded("llvm.nearbyint", b, [x])
    integers = integers_like(x)
    exponent = b.add(b.fptosi(whole, integers), constant(integers, 127))
    bits = b.shl(exponent, constant(integers, 23))
    return b.fsub(x, whole), b.bitcast(bits, x.type)


# 2**f on [-1/2, 1/2]: Taylor coefficients ln(2)**n / n! refitted (least squares at Chebyshev nodes,
# float64, constant fixed at 1); largest relative error 1.2e-7 after float32 evaluation.
_EXP2 = (
    1.5353362e-4, 1.3398874e-3, 9.6184373e-3, 5.5503324e-2, 2.4022648e-1, 6.9314718e-1, 1.0,
)  # fmt: skip


def _exp2(b, x):
    low, high = constant(x.type, -126.0), constant(x.type, 127.0)
    x = _ordered("<")(b, x, low, low, x)
    x = _ordered(">")(b, x, high, high, x)
    fraction, scale = _round_scale(b, x)
    value = constant(x.type, _EXP2[0])
    for c in _EXP2[1:]:
        value = _overloaded("llvm.fmuladd", b, [value, fraction, constant(x.type, c)])
    return b.fmul(value, scale)


exp2 = vector_intrinsic(
    1, _exp2, "2**x, float32 accuracy; x below -126 gives 2**-126, NaN stays NaN"
)


_LOG2_E = (1.44269502, 1.92596303e-8)  # what float32 holds of it, and the rest
_LEAST_EXPONENT = -87.0


def _exp(b, x):
    low, high = constant(x.type, _LEAST_EXPONENT), constant(x.type, 88.5)
    inside = _ordered("<")(b, x, low, low, x)
    inside = _ordered(">")(b, inside, high, high, inside)
    main, rest = (constant(x.type, part) for part in _LOG2_E)
    whole = _overloaded("llvm.nearbyint", b, [b.fmul(inside, main)])
    # The product is not rounded where multiply-adds are fused.
    fraction = _overloaded("llvm.fmuladd", b, [inside, main, b.fneg(whole)])
    fraction = _overloaded("llvm.fmuladd", b, [inside, rest, fraction])
    value = constant(x.type, _EXP2[0])
    for c in _EXP2[1:]:
        value = _overloaded("llvm.fmuladd", b, [value, fraction, constant(x.type, c)])
    integers = integers_like(x)
    # 2**whole in two halves: up to 2**128 it may go.
    whole = b.fptosi(whole, integers)
    half = b.ashr(whole, constant(integers, 1))
    for part in (half, b.sub(whole, half)):
        bits = b.shl(b.add(part, constant(integers, 127)), constant(integers, 23))
        value = b.fmul(value, b.bitcast(bits, x.type))
    value = _ordered("<")(b, x, low, constant(x.type, 0.0), value)
    return _ordered(">")(b, x, high, constant(x.type, np.inf), value)


exp = vector_intrinsic(
    1, _exp, "e**x, float32 accuracy; 0 below -87, infinite above 88.5, NaN stays NaN"
)


def _reduce(combine, doc):
    def define(typingctx, a):
        if not _same_vectors(a):
            return None

        def codegen(context, builder, sig, args):
            (value,) = args
            while value.type.count > 1:
                half = value.type.count // 2
                undefined = ir.Constant(value.type, ir.Undefined)
                lanes = ir.VectorType(_INDEX, half)
                low, high = (
                    builder.shuffle_vector(
                        value, undefined, ir.Constant(lanes, list(range(first, first + half)))
                    )
                    for first in (0, half)
                )
                value = combine(builder, low, high)
            return builder.extract_element(value, _INDEX(0))

        return types.float32(a), codegen

    define.__doc__ = doc
    return intrinsic(define)


hsum = _reduce(
    lambda b, x, y: b.fadd(x, y), "Sum of the lanes, as float32: halves, then halves of that"
)
hmax = _reduce(lambda b, x, y: _ordered(">")(b, x, y, x, y), "Largest of the lanes, as float32")


def _operator(op, emit):
    @infer_global(op)
    class _Typing(AbstractTemplate):
        def generic(self, args, kws):
            if len(args) == 2 and _same_vectors(*args):
                return signature(args[0], *args)
            return None

    @lower_builtin(op, F32Vector, F32Vector)
    def _lower(context, builder, sig, args):
        return emit(builder, *args)


_operator(operator.add, lambda b, x, y: b.fadd(x, y, flags=("contract",)))
_operator(operator.sub, lambda b, x, y: b.fsub(x, y, flags=("contract",)))
_operator(operator.mul, lambda b, x, y: b.fmul(x, y, flags=("contract",)))
_operator(operator.truediv, lambda b, x, y: b.fdiv(x, y))


@intrinsic
def zero(typingctx):
    """A vector of zeros."""
    return f32x8(), lambda context, builder, sig, args: constant(ir.VectorType(_FLOAT, LANES), 0.0)


@intrinsic
def load_pair16(typingctx, array, index):
    """Two elements of a flat float32 array from `index`, eight times over."""
    if not _is_flat_f32(array) or not isinstance(index, types.Integer):
        return None
    return f32x16(array, index), _repeated(2)


@intrinsic
def load_quad16(typingctx, array, index):
    """Four elements of a flat float32 array from `index`, four times over."""
    if not _is_flat_f32(array) or not isinstance(index, types.Integer):
        return None
    return f32x16(array, index), _repeated(4)


def _repeated(count):
    def codegen(context, builder, sig, args):
        index = context.cast(builder, args[1], sig.args[1], types.intp)
        value = builder.load(_address(context, builder, sig.args[0], args[0], index, count))
        value.align = 4
        lanes = [lane % count for lane in range(f32x16.lanes)]
        mask = ir.Constant(ir.VectorType(_INDEX, f32x16.lanes), lanes)
        return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), mask)

    return codegen


def _every_second(b, x, y, first):
    lanes = ir.VectorType(_INDEX, x.type.count)
    mask = ir.Constant(lanes, list(range(first, 2 * x.type.count, 2)))
    return b.shuffle_vector(x, y, mask)


add_neighbors = vector_intrinsic(
    2,
    lambda b, x, y: b.fadd(_every_second(b, x, y, 0), _every_second(b, x, y, 1)),
    "Sums of lanes 0 and 1, 2 and 3, ... of x, then of y",
)


def _folder(width):
    """Sums of neighboring groups of `width` lanes, in turns of x and of y.

    Four of them, from the widest on, leave 16 vectors' sums: each takes a blend and one shuffle.
    """

    def emit(b, x, y):
        lanes, count = ir.VectorType(_INDEX, x.type.count), x.type.count
        kept, moved = [], []
        for lane in range(count):
            odd = lane // width % 2
            kept.append(lane + odd * count)
            moved.append(lane + (width if odd == 0 else count - width))
        kept, moved = (b.shuffle_vector(x, y, ir.Constant(lanes, order)) for order in (kept, moved))
        return b.fadd(kept, moved)

    return vector_intrinsic(2, emit, f"Sums of x and y over pairs of groups of {width} lanes")


fold8, fold4, fold2, fold1 = map(_folder, (8, 4, 2, 1))


@intrinsic
def load_low16(typingctx, array, index):
    """Eight elements like `load`, then eight zeros."""
    if not _is_flat_f32(array) or not isinstance(index, types.Integer):
        return None

    def codegen(context, builder, sig, args):
        index = context.cast(builder, args[1], sig.args[1], types.intp)
        value = builder.load(_address(context, builder, sig.args[0], args[0], index))
        value.align = 4
        mask = ir.Constant(ir.VectorType(_INDEX, 2 * LANES), list(range(2 * LANES)))
        return builder.shuffle_vector(value, constant(value.type, 0.0), mask)

    return f32x16(array, index), codegen


@intrinsic
def low8(typingctx, value):
    """The first eight of sixteen lanes."""
    if value != f32x16:
        return None

    def codegen(context, builder, sig, args):
        mask = ir.Constant(ir.VectorType(_INDEX, LANES), list(range(LANES)))
        return builder.shuffle_vector(args[0], ir.Constant(args[0].type, ir.Undefined), mask)

    return f32x8(value), codegen


def _interleaver(rows, width, doc):
    """Of `rows` rows, eight floats each, `width` of one row, then of the next, and so on."""

    def define(typingctx, source, index, stride, count, target, at):
        integers = all(isinstance(t, types.Integer) for t in (index, stride, count, at))
        if not (_is_flat_f32(source) and _is_flat_f32(target) and integers):
            return None

        def codegen(context, builder, sig, args):
            def as_index(n):
                return context.cast(builder, args[n], sig.args[n], types.intp)

            index, stride, count, at = (as_index(n) for n in (1, 2, 3, 5))
            element = _FLOAT if width == 1 else ir.IntType(32 * width)
            row_type = ir.VectorType(element, LANES // width)
            vectors = []
            for n in range(rows):
                row = ir.Constant(index.type, n)
                exists = builder.icmp_signed("<", row, count)
                offset = builder.add(index, builder.mul(row, stride))
                offset = builder.select(exists, offset, index)
                value = builder.load(_address(context, builder, sig.args[0], args[0], offset))
                value.align = 4
                value = builder.select(exists, value, constant(value.type, 0.0))
                vectors.append(builder.bitcast(value, row_type))
            while len(vectors) > 1:
                half = len(vectors) // 2
                length = vectors[0].type.count
                lanes = [n // 2 + (n % 2) * length for n in range(2 * length)]
                mask = ir.Constant(ir.VectorType(_INDEX, 2 * length), lanes)
                vectors = [
                    builder.shuffle_vector(vectors[n], vectors[n + half], mask) for n in range(half)
                ]
            address = _address(context, builder, sig.args[4], args[4], at)
            pointer = builder.bitcast(address, vectors[0].type.as_pointer())
            builder.store(vectors[0], pointer).align = 4
            return context.get_dummy_value()

        return types.void(source, index, stride, count, target, at), codegen

    define.__doc__ = doc
    return intrinsic(define)


interleave_pairs = _interleaver(
    8,
    2,
    """Eight floats each of eight rows of `source`: two of every row, the next two of every row, ...

    Row n starts at `index + n * stride`; those from `count` on are zeros. Writes
    `target[at:at + 64]`. Both arrays are flat float32.
    """,
)
interleave_quads = _interleaver(
    4, 1, "Eight floats each of four rows: one of every row, the next of every row, ..."
)


_LONGS = ir.VectorType(ir.IntType(64), LANES)


class _Int64Vector(types.Type):
    def __init__(self):
        super().__init__(name=f"i64x{LANES}")


@register_model(_Int64Vector)
class _Int64VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _LONGS)


i64x8 = _Int64Vector()


def _longs_at(context, builder, sig, args):
    index = context.cast(builder, args[1], sig.args[1], types.intp)
    return builder.bitcast(builder.gep(args[0], [index]), _LONGS.as_pointer())


@intrinsic
def load_longs(typingctx, pointer, index):
    """Eight 64-bit integers from `index` of what `pointer` points to."""
    if pointer != types.CPointer(types.int64) or not isinstance(index, types.Integer):
        return None

    def codegen(context, builder, sig, args):
        value = builder.load(_longs_at(context, builder, sig, args))
        value.align = 8
        return value

    return i64x8(pointer, index), codegen


@intrinsic
def store_longs(typingctx, pointer, index, value):
    """Write eight 64-bit integers from `index` of what `pointer` points to."""
    if pointer != types.CPointer(types.int64) or value != i64x8:
        return None

    def codegen(context, builder, sig, args):
        builder.store(args[2], _longs_at(context, builder, sig, args)).align = 8
        return context.get_dummy_value()

    return types.void(pointer, index, value), codegen


@intrinsic
def splat_long(typingctx, scalar):
    """Eight lanes that all hold the int64 `scalar`."""
    if scalar != types.int64:
        return None

    def codegen(context, builder, sig, args):
        undefined = ir.Constant(_LONGS, ir.Undefined)
        one = builder.insert_element(undefined, args[0], _INDEX(0))
        zeros = constant(ir.VectorType(_INDEX, LANES), 0)
        return builder.shuffle_vector(one, undefined, zeros)

    return i64x8(scalar), codegen


@intrinsic
def count_less(typingctx, counts, a, b):
    """`counts`, one more in the lanes where a < b; all eight 64-bit integers."""
    if not counts == a == b == i64x8:
        return None

    def codegen(context, builder, sig, args):
        counts, a, b = args
        return builder.sub(counts, builder.sext(builder.icmp_signed("<", a, b), _LONGS))

    return i64x8(counts, a, b), codegen


def _halves(shift, doc):
    def define(typingctx, value):
        if value != i64x8:
            return None

        def codegen(context, builder, sig, args):
            integers = ir.VectorType(_INDEX, LANES)
            shifted = builder.lshr(args[0], constant(_LONGS, shift))
            return builder.bitcast(builder.trunc(shifted, integers), ir.VectorType(_FLOAT, LANES))

        return f32x8(value), codegen

    define.__doc__ = doc
    return intrinsic(define)


low_halves = _halves(0, "The lower 32 bits of eight 64-bit integers, as bits of float32")
high_halves = _halves(32, "The upper 32 bits of eight 64-bit integers, as bits of float32")
