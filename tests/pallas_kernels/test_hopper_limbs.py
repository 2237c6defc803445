"""Limbs of a few tokens' inputs: what they are worth, and where threads of a warpgroup put them, with the instructions in numpy."""

import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper
from pallas_kernels.hopper_token import Fold

limbs = pytest.importorskip("pallas_kernels.hopper_limbs")
token = pytest.importorskip("pallas_kernels.hopper_token")
THREADS = 128


def rows_of(count):
    """Rows of all sizes, one of zeros, some not finite."""
    rng = np.random.default_rng(count)
    values = rng.standard_normal((count, limbs.BLOCK)) * np.exp2(rng.integers(-30, 30, (count, 1)))
    values[1], values[2, 5], values[3, 7] = 0, np.inf, np.nan
    values[0] *= 2.0**127 / np.abs(values[0]).max()
    values[-1] *= 2.0**-110 / np.abs(values[-1]).max()  # less than a size is made for
    return np.asarray(jnp.asarray(values, jnp.bfloat16))


def check(values, cut, sizes):
    wide, top = values.astype(np.float64), np.abs(values.astype(np.float64)).max(axis=1)
    found = (cut[0::2].astype(np.float64) + 256.0 * cut[1::2]) * sizes[:, None]
    finite = np.isfinite(top)
    assert finite.sum() == len(values) - 2 and np.array_equal(np.isnan(sizes), ~finite)
    assert (np.abs(found - wide)[finite] * 65000 <= np.maximum(top[finite, None], limbs.LEAST)).all()


def met(products, sizes, fold, tokens):
    """What products [64, columns] come to, [tokens, 64]."""
    each = products.reshape(fold.parts, fold.rows, fold.parts, tokens, 2).astype(np.int64)
    wide = (each[..., 0] + 256 * each[..., 1]).astype(np.float32)
    parts = [wide[part, :, part] * sizes.reshape(fold.parts, tokens)[part] for part in range(fold.parts)]
    return np.concatenate(parts).T


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_limbs_are_worth_their_inputs():
    values = rows_of(16)
    inputs, cut, sizes = jnp.asarray(values), Written((32, 256)), Written((16,))
    with hopper.interpreted():
        limbs.cut(inputs, cut, sizes)
    check(values, np.asarray(cut.values), np.asarray(sizes.values))
    assert np.abs(np.asarray(cut.values, np.int32)).max() <= 128


class Written:
    """A reference that is written whole."""

    def __init__(self, shape):
        self.shape = shape

    def __setitem__(self, _, values):
        assert values.shape == self.shape
        self.values = values


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_part_of_the_weight_keeps_what_met_the_same_part_of_the_tokens(parts):
    rng, fold, tokens = np.random.default_rng(0), Fold(256 * parts, parts, 256), 8
    products, sizes = rng.integers(-4_000_000, 4_000_000, (64, 2 * parts * tokens), np.int32), rng.random(parts * tokens, np.float32)
    sums = Written((tokens, 64))
    with hopper.interpreted():
        total = limbs.added(limbs.nothing(tokens), jnp.asarray(products), limbs.sizes_of(jnp.asarray(sizes), fold), fold)
        limbs.leave(sums, total)
    np.testing.assert_allclose(sums.values, met(products, sizes, fold, tokens), rtol=1e-6)


def test_sums_of_a_block_stay_below_what_an_integer_holds():
    largest = 128 * limbs.BLOCK * 127
    assert largest * (1 + 256) < 2**31 and limbs.RANGE + 0x80 < 2**15
    assert np.array([limbs.LEAST, np.inf], np.float32).view(np.uint32).tolist() == [limbs.LEAST_BITS, limbs.INFINITY_BITS]


class Lanes(np.ndarray):
    """A number of each thread."""

    @property
    def type(self):
        return self.dtype


def lanes(values):
    return np.broadcast_to(values, THREADS).view(Lanes)


class Machine:
    """The instructions that are used, as PTX describes them, on all 128 threads at once; where `on` is not, nothing is stored."""

    def __init__(self):
        self.on = np.ones(THREADS, bool)
        self.read = []  # since the warp last met

    def load(self, kind, pointer, alignment=4):
        memory, places = pointer
        self.read.append(memory)
        assert (places % alignment == 0).all()
        count = kind[0] if isinstance(kind, tuple) else 1
        words = [memory[np.where(self.on, places, 0)[:, None] + 4 * word + np.arange(4)] for word in range(count)]
        found = [lanes(np.ascontiguousarray(word).view(np.uint32 if count > 1 else kind)[:, 0]) for word in words]
        return found if count > 1 else found[0]

    def store(self, values, pointer, alignment=4):
        memory, places = pointer
        assert not any(np.shares_memory(memory, each) for each in self.read)  # others of the warp may not have read it yet
        assert (places % alignment == 0).all()
        for word, each in enumerate(values if isinstance(values, list) else [values]):
            given = np.ascontiguousarray(each).view(np.uint8).reshape(THREADS, 4)
            memory[places[self.on, None] + 4 * word + np.arange(4)] = given[self.on]

    def asm(self, _, operands, code, constraints, has_side_effects=False):
        name = code.split()[0]
        if name == "max.u16x2":
            return lanes(np.maximum(*(np.ascontiguousarray(each).view(np.uint16) for each in operands)).view(np.uint32))
        if name == "redux.sync.max.u32":
            return lanes(np.repeat(np.asarray(operands[0]).reshape(4, 32).max(axis=1), 32))
        if name == "rcp.approx.ftz.f32":
            return lanes((1 / np.ascontiguousarray(operands[0]).view(np.float32)).view(np.uint32))
        if name == "prmt.b32":
            which, both = int(code.rstrip(";").split(",")[-1]), [each >> 8 * byte & 255 for each in operands for byte in range(4)]
            return lanes(sum(both[which >> 4 * digit & 7] << 8 * digit for digit in range(4)))
        assert name == "bar.warp.sync"
        self.read.clear()
        return None

    @contextmanager
    def when(self, condition):
        before, self.on = self.on, self.on & condition
        yield
        self.on = before


@pytest.fixture
def machine(monkeypatch):
    """Stands in for MLIR."""
    made = Machine()
    kinds = SimpleNamespace(get=lambda: np.dtype(np.float32))
    words = SimpleNamespace(get_signless=lambda bits: np.dtype(f"u{bits // 8}"))
    ir = SimpleNamespace(F32Type=kinds, IntegerType=words, VectorType=SimpleNamespace(get=lambda shape, kind: (*shape, kind)))
    signless = {"addi": np.add, "muli": np.multiply, "andi": np.bitwise_and, "xori": np.bitwise_xor, "shli": np.left_shift}
    arith = SimpleNamespace(
        **signless, shrui=np.right_shift, maxui=np.maximum, minui=np.minimum, mulf=np.multiply,
        CmpIPredicate=SimpleNamespace(ult=np.less, eq=np.equal),
        cmpi=lambda predicate, one, other: predicate(one, other), select=lambda *each: lanes(np.where(*each)),
        sitofp=lambda _, given: lanes(given.view(np.int32).astype(np.float32)),
    )  # fmt: skip
    wide = np.float64
    utils = SimpleNamespace(
        c=lambda value, kind: lanes(np.asarray(value & 0xFFFFFFFF if kind == np.uint32 else value, kind)),
        memref_ptr=lambda memory: (memory, np.zeros(THREADS, np.int64)),
        getelementptr=lambda pointer, at, kind: (pointer[0], pointer[1] + np.asarray(at[0], np.int64) * kind.itemsize),
        bitcast=lambda given, kind: lanes(np.ascontiguousarray(given).view(kind)), when=made.when,
    )  # fmt: skip
    fused = SimpleNamespace(fma=lambda one, by, other: lanes((one.astype(wide) * by.astype(wide) + other).astype(np.float32)))
    vectors = SimpleNamespace(extract=lambda given, _, place: given[place[0]], from_elements=lambda _, given: given)
    llvm = SimpleNamespace(load=made.load, store=made.store, inline_asm=made.asm)
    for name, parts in (
        ("jax.experimental.mosaic.gpu", {"utils": utils}), ("jaxlib.mlir", {"ir": ir}),
        ("jaxlib.mlir.dialects", {"arith": arith, "llvm": llvm, "math": fused, "vector": vectors}),
    ):  # fmt: skip
        module = ModuleType(name)
        module.__dict__.update(parts)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(limbs, "thread", lambda: lanes(np.arange(THREADS, dtype=np.uint32)))
    monkeypatch.setattr(limbs, "array_of", lambda numbers: registers(numbers))
    monkeypatch.setattr(limbs, "numbers_of", lambda values: list(values.registers.flat))
    return made


def registers(numbers):
    found = np.empty(len(numbers), object)
    found[:] = numbers
    return SimpleNamespace(registers=found)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning", "ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("count", [4, 8, 16, 32, 64])
def test_threads_cut_where_the_inputs_lie(machine, count):
    values = rows_of(count)
    memory, sizes = np.ascontiguousarray(values).view(np.uint8).reshape(-1).copy(), np.zeros(4 * count, np.uint8)
    limbs._cut(count, None, memory, memory, sizes)
    tiles = memory.view(np.int8).reshape(count // 4, 2, 8, 8, 16)  # limbs by eights, inputs by 128; what lies together, in pieces of 16
    straight = np.stack([tiles[:, :, limb, np.arange(8) ^ limb] for limb in range(8)], axis=1)
    check(values, straight.reshape(2 * count, 256), sizes.view(np.float32))


def held(products):
    """Products [64, columns] as the threads of a warpgroup have them: pairs of columns, in two rows of each 8 columns."""
    warp, lane = np.divmod(np.arange(THREADS), 32)
    return registers(
        [
            [lanes(products[warp * 16 + lane // 4 + 8 * half, 8 * tile + 2 * (lane % 4) + limb].view(np.uint32)) for limb in range(2)]
            for tile in range(products.shape[1] // 8)
            for half in range(2)
        ]
    )


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("tokens", [8, 16])
def test_a_thread_has_both_limbs_of_its_tokens(machine, parts, tokens):
    rng, fold = np.random.default_rng(0), Fold(256 * parts, parts, 256)
    products, sizes = rng.integers(-4_000_000, 4_000_000, (64, 2 * parts * tokens), np.int32), rng.random(parts * tokens, np.float32)
    made, count = held(products), tokens // 2
    chosen = limbs._sizes_of(fold, tokens // 4, None, sizes.view(np.uint8))
    before = registers([lanes(np.float32(0))] * count)
    total = limbs._added(fold, count, None, before, made, chosen)
    sums = np.zeros(4 * 64 * tokens, np.uint8)
    limbs._leave(64, 64, None, sums, total)
    np.testing.assert_allclose(sums.view(np.float32).reshape(tokens, 64), met(products, sizes, fold, tokens), rtol=1e-6)


def whole_sums(tokens):
    """Products as large as those of 131,000 inputs, and what they come to, [tokens, 64]."""
    products = np.random.default_rng(tokens).integers(-(2**31) + 1, 2**31, (64, 2 * tokens), np.int32)
    return products, (products[:, 0::2].astype(np.float64) + 256.0 * products[:, 1::2]).T


@pytest.mark.parametrize("rows", [8, 40, 64])
@pytest.mark.parametrize("tokens", [8, 24])
class TestSumsOverAllInputs:
    """Joined, times what tokens and rows are worth, and written where a token's numbers do not follow those of the one before at once."""

    @staticmethod
    def factors(tokens, rows):
        return np.linspace(1, 2, tokens, dtype=np.float32), np.linspace(0.5, 1, rows, dtype=np.float32)

    @staticmethod
    def check(found, wanted, per_token, per_row):
        np.testing.assert_allclose(found, (wanted[:, : len(per_row)] * per_token[:, None] * per_row), rtol=1e-6, atol=2.0**17)

    def test_as_arrays(self, tokens, rows):
        (products, wanted), factors, sums = whole_sums(tokens), self.factors(tokens, rows), Written((tokens, rows))
        with hopper.interpreted():
            limbs.leave(sums, limbs.scaled(limbs.joined(jnp.asarray(products)), *map(jnp.asarray, factors)), 320)
        self.check(sums.values, wanted, *factors)

    def test_by_threads(self, machine, tokens, rows):
        (products, wanted), (per_token, per_row) = whole_sums(tokens), self.factors(tokens, rows)
        total = limbs._joined(None, held(products))
        total = limbs._scaled(rows, None, total, per_token.view(np.uint8), per_row.view(np.uint8))
        sums = np.zeros(4 * 320 * tokens, np.uint8)
        limbs._leave(320, rows, None, sums, total)
        found = sums.view(np.float32).reshape(tokens, 320)
        self.check(found[:, :rows], wanted, per_token, per_row)
        assert not found[:, rows:].any()
