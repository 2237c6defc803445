"""What programs need beside weights, pool and slots: maxima of temporaries, two outputs, all code."""

from dataclasses import dataclass
from unittest.mock import Mock

from jaxinfer.step.buckets import Bucket
from jaxinfer.step.sizes import UNSEEN_CODE, Beside, ProgramSize, beside, kind

DECODE, WIDE, MIXED = Bucket(0, 0, 4), Bucket(0, 0, 8), Bucket(32, 4, 8)


@dataclass(frozen=True)
class Sampler:
    rows: int
    demand: int


def test_sizes_come_from_the_compiler():
    analysis = Mock(temp_size_in_bytes=7, output_size_in_bytes=10, alias_size_in_bytes=4, generated_code_size_in_bytes=3)
    assert ProgramSize.of(Mock(memory_analysis=lambda: analysis)) == ProgramSize(7, 6, 3)
    analysis.alias_size_in_bytes = 11
    assert ProgramSize.of(Mock(memory_analysis=lambda: analysis)).output == 0


def test_the_largest_of_each_counts():
    sizes = {DECODE: ProgramSize(5, 2, 0), MIXED: ProgramSize(3, 4, 0), Sampler(4, 2): ProgramSize(11, 9, 0), "admit": ProgramSize(1, 1, 0)}
    assert beside(sizes, sizes) == Beside(forward=5, outputs=8, held=0, others=11, code=0)
    assert beside(sizes, sizes).total == 24
    assert beside({}, [DECODE]).total == 0 and beside({}, [DECODE], held=7).total == 7


def test_code_of_programs_not_compiled_is_that_of_the_largest_of_their_kind():
    sizes = {WIDE: ProgramSize(0, 0, 100), MIXED: ProgramSize(0, 0, 300), Sampler(8, 2): ProgramSize(0, 0, 20)}
    keys = (DECODE, WIDE, MIXED, Bucket(128, 8, 8), Sampler(4, 2), Sampler(8, 2), Sampler(4, 0), "admit")
    assert beside(sizes, keys).code == 2 * 100 + 2 * 300 + 2 * 20 + 2 * UNSEEN_CODE
    without = {key: ProgramSize(1, 1, 0) for key in sizes}
    assert beside(without, keys).code == 0


def test_kinds():
    assert kind(DECODE) == kind(WIDE) != kind(MIXED)
    assert kind(Sampler(4, 2)) == kind(Sampler(8, 2)) != kind(Sampler(8, 0))
    assert kind("admit") != kind("copy-pages")
