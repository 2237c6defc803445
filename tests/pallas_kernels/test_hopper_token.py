"""How a token is cut and laid out as the right side of products, and which of their sums count."""

import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper

token = pytest.importorskip("pallas_kernels.hopper_token")
SIDES = [token.Limbs(), token.Same(jnp.bfloat16)]
SWIZZLED = [(4096, 2, 256), (14336, 2, 256), (14336, 8, 256), (4096, 4, 128), (896, 1, 128), (11008, 2, 128)]  # inputs, parts, bytes
FOLDS = [(128, 1, 128), (512, 2, 128), (2048, 8, 256), (4224, 3, 128), (14336, 8, 256)]


@pytest.mark.parametrize("side", SIDES, ids=lambda side: type(side).__name__)
@pytest.mark.parametrize("shape", FOLDS, ids=str)
def test_what_is_put_lies_where_products_look_for_it(interpreted, side, shape):
    """A column for each limb of each part; the token comes back from them."""
    fold = token.Fold(*shape)
    x = jnp.asarray(np.random.default_rng(fold.inputs).standard_normal(fold.inputs) * 3, jnp.bfloat16)
    room = token.room(side, fold)

    def body(x, out, factors, scratch):
        (shared,) = scratch
        factor = side.put(token.pieces_of(x), fold, shared)
        factors[...] = jnp.full((128,), 1.0) * factor
        for block in range(fold.length):
            out[block] = shared[block]

    made = (jax.ShapeDtypeStruct(room, side.stored), jax.ShapeDtypeStruct((128,), jnp.float32))
    found, factor = hopper.kernel(body, (hopper.swizzled(room, side.stored),), out_type=made, grid={"block": 1})(x)
    columns = np.asarray(found, np.float64).transpose(1, 0, 2).reshape(room[1], fold.part)[: fold.parts * side.columns]
    worth = 2.0 ** (8 * np.arange(side.columns))
    again = np.einsum("pci,c->pi", columns.reshape(fold.parts, side.columns, fold.part), worth).ravel() * float(factor[0])
    np.testing.assert_allclose(again, np.asarray(x, np.float64), rtol=0, atol=2.0**-22 * float(jnp.abs(x).max()))


class Numbers:
    """Plain integers in place of a kernel's values, and what is stored where."""

    def __init__(self):
        self.stored = {}
        self.names = {
            "addi": int.__add__, "muli": int.__mul__, "divui": int.__floordiv__, "remui": int.__mod__, "andi": int.__and__,
            "xori": int.__xor__, "shli": int.__lshift__, "c": lambda value, kind: value, "memref_ptr": lambda ref: 0,
            "getelementptr": lambda pointer, places, kind: pointer + sum(places), "store": self.store,
        }  # fmt: skip
        self.IntegerType = self

    def store(self, value, place):
        assert place not in self.stored
        self.stored[place] = value

    def get_signless(self, bits):
        return bits

    def __getattr__(self, name):
        return self.names[name]


def arrays(size, columns, vector):
    """Registers in the strided layout: of each, the first of the numbers that a thread has there, and its column."""
    found = []
    for column in range(columns):
        registers = np.array([(index * token.THREADS * vector, column) for index in range(size // token.THREADS // vector)], "i,i")
        found.append(types.SimpleNamespace(layout=types.SimpleNamespace(vec_size=vector), registers=registers))
    return found


@pytest.mark.parametrize("side", SIDES, ids=lambda side: type(side).__name__)
@pytest.mark.parametrize("shape", SWIZZLED, ids=str)
def test_threads_write_to_where_a_swizzled_array_lies(monkeypatch, side, shape):
    """Rows of 8 and 128 bytes are kept together, and 16 bytes i of row r are in place of i xor r."""
    inputs, parts, block = shape
    size = jnp.dtype(side.stored).itemsize
    fold = token.Fold(inputs, parts, block // size)
    length, columns, _ = token.room(side, fold)
    place = np.arange(length * columns * block).reshape(length, columns // 8, block // 128, 8, 8, 16)
    row, chunk = np.ogrid[:8, :8]
    lies = place[:, :, :, row, chunk ^ row].transpose(0, 1, 3, 2, 4, 5).reshape(length, columns, block)
    for piece in token.places_of(inputs):
        vector = token.neighbours(piece.size)
        for thread in (0, 1, 37, 127):
            numbers = Numbers()
            for module, name in (("jax.experimental.mosaic.gpu", "utils"), ("jaxlib.mlir", "ir")):
                monkeypatch.setattr(importlib.import_module(module), name, numbers)
            for name in ("arith", "llvm"):
                monkeypatch.setattr(importlib.import_module("jaxlib.mlir.dialects"), name, numbers, raising=False)
            monkeypatch.setattr(token, "thread", lambda thread=thread: thread)
            token._write(fold, piece.start, size, None, None, *arrays(piece.size, side.columns, vector))
            monkeypatch.undo()
            for found, (first, column) in numbers.stored.items():
                part, inner = divmod(piece.start + first + thread * vector, fold.part)
                at, within = divmod(inner, fold.block)
                assert found == lies[at, part * side.columns + column, within * size]
            assert len(numbers.stored) == side.columns * piece.size // token.THREADS // vector


@pytest.mark.parametrize("side", SIDES, ids=lambda side: type(side).__name__)
@pytest.mark.parametrize(("parts", "first", "size"), [(1, 0, 64), (2, 16, 16), (8, 0, 8)])
def test_sums_count_where_a_part_meets_itself(interpreted, side, parts, first, size):
    fold = token.Fold(1024, parts, 128)
    columns = token.columns_of(side, fold)
    sums = jnp.asarray(np.random.default_rng(parts).integers(-9, 9, (64, columns)), side.sums)

    def body(sums, out, scratch):
        (shared,) = scratch
        shared[...] = sums[...]
        out[...] = token.meeting(fold, side, shared, first, size)

    out = jax.ShapeDtypeStruct((token.THREADS,), jnp.float32)
    found = hopper.kernel(body, (token.plgpu.SMEM(sums.shape, sums.dtype),), out_type=out, grid={"block": 1})(sums)
    wanted = [
        sum(
            int(sums[part * fold.rows + first + row, part * side.columns + limb]) * 2.0 ** (8 * limb)
            for part in range(parts)
            for limb in range(side.columns)
        )
        for row in range(size)
    ]
    assert np.array_equal(found, np.tile(wanted, token.THREADS // size))


@pytest.mark.parametrize("shape", FOLDS, ids=str)
@pytest.mark.parametrize("place", [(0, 128), (0, 4096), (4096, 128), (2048, 2048)])
def test_runs_cover_a_place(shape, place):
    fold, (start, size) = token.Fold(*shape), place
    if start + size > fold.inputs:
        start, size = 0, fold.inputs
    seen = []
    for begin, count, target in token._runs(fold, token.pl.ds(start, size)):
        assert count > 0 and target.input + count <= fold.block and len(seen) == begin
        seen += [target.part * fold.part + target.block * fold.block + target.input + step for step in range(count)]
    assert seen == list(range(start, start + size))


def test_bytes_of_words(monkeypatch):
    """The instruction that chooses bytes, as PTX describes it, in its place."""

    def chosen(first, second, which):
        given = int(first).to_bytes(4, "little") + int(second).to_bytes(4, "little")
        return int.from_bytes(bytes(given[which >> 4 * digit & 7] for digit in range(4)), "little")

    monkeypatch.setattr(token, "bytes_chosen", chosen)
    monkeypatch.setattr(token, "less_128", lambda word: word ^ 0x80808080)
    rng = np.random.default_rng(0)
    shifted = rng.integers(0, 2**24, 8, dtype=np.int32)
    for limb, words in enumerate(token._bytes_of_four(list(shifted))):
        assert np.array_equal(np.array(words, np.uint32).view(np.int8), (shifted >> 8 * limb & 0xFF) - 128)


@pytest.mark.parametrize(
    ("inputs", "sizes"),
    [(128, [128]), (4096, [4096]), (14336, [2048] * 7), (896, [896]), (11008, [4096] * 2 + [2816]), (28672, [4096] * 7)],
)
def test_a_token_is_loaded_in_equal_pieces_and_a_rest(inputs, sizes):
    found = token.places_of(inputs)
    assert [place.size for place in found] == sizes and [place.start for place in found] == [sum(sizes[:n]) for n in range(len(sizes))]


def test_limbs_hold_the_largest_token():
    assert 127 * (1 + 2**8 + 2**16) >= token.RANGE > 2**22 and 128 * 128 * token.MOST_INPUTS < 2**31
