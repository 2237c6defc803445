"""Transforms read any slice right, and read no more than it needs."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.models.weights import Joined, Part, Stacked, transform_of

KV, GROUP, DIM, EMBED, MLP = 3, 2, 4, 5, 6
HEADS = lambda _: ((KV, GROUP, DIM),)
SINGLE = lambda _: ((KV, 1, DIM),)


@dataclass
class Memory:
    """A tensor in memory that counts what is read of it."""

    values: np.ndarray
    count: list[int] = field(default_factory=list)

    @property
    def shape(self):
        return self.values.shape

    @property
    def dtype(self):
        return self.values.dtype

    def read(self, index):
        assert len(index) == self.values.ndim and all(part.step in (None, 1) for part in index)
        piece = self.values[index]
        self.count.append(piece.size)
        return piece


def memory(*shape):
    return Memory(np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32))


QKV = Joined(1, (Part("*.q", HEADS), Part("*.k", SINGLE), Part("*.v", SINGLE)))
CASES = {
    "renamed": (Part("*.down"), {"7.down": (EMBED, MLP)}, lambda s: s["7.down"]),
    "columns split": (
        Part("*.o", lambda _: ((EMBED,), (KV, GROUP, DIM))),
        {"7.o": (EMBED, KV * GROUP * DIM)},
        lambda s: s["7.o"].reshape(EMBED, KV, GROUP, DIM),
    ),
    "q, k and v joined": (
        QKV,
        {"7.q": (KV * GROUP * DIM, EMBED), "7.k": (KV * DIM, EMBED), "7.v": (KV * DIM, EMBED)},
        lambda s: np.concatenate([s[f"7.{n}"].reshape(KV, -1, DIM, EMBED) for n in "qkv"], axis=1),
    ),
    "experts stacked": (
        Stacked(Joined(0, (Part("*.{}.gate", lambda _: ((1, MLP),)), Part("*.{}.up", lambda _: ((1, MLP),))))),
        {f"7.{expert}.{part}": (MLP, EMBED) for expert in range(3) for part in ("gate", "up")},
        lambda s: np.stack([np.stack([s[f"7.{expert}.gate"], s[f"7.{expert}.up"]]) for expert in range(3)]),
    ),
    "their biases": (
        QKV,
        {"7.q": (KV * GROUP * DIM,), "7.k": (KV * DIM,), "7.v": (KV * DIM,)},
        lambda s: np.concatenate([s[f"7.{n}"].reshape(KV, -1, DIM) for n in "qkv"], axis=1),
    ),
    "gate and up stacked": (
        Joined(0, (Part("*.gate", lambda _: ((1, MLP),)), Part("*.up", lambda _: ((1, MLP),)))),
        {"7.gate": (MLP, EMBED), "7.up": (MLP, EMBED)},
        lambda s: np.stack([s["7.gate"], s["7.up"]]),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_says_what_it_needs(case):
    transform, shapes, whole = CASES[case]
    target = whole({name: np.zeros(shape) for name, shape in shapes.items()}).shape
    assert transform.needs(None, target, "7") == shapes


@pytest.mark.parametrize("case", CASES)
def test_takes_our_array_apart_again(case):
    transform, shapes, whole = CASES[case]
    tensors = {name: memory(*shape).values for name, shape in shapes.items()}
    found = transform.tensors(None, whole(tensors), "7")
    assert set(found) == set(tensors) and all(np.array_equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_reads_any_slice(case, data):
    transform, shapes, whole = CASES[case]
    sources = {name: memory(*shape) for name, shape in shapes.items()}
    expected = whole({name: source.values for name, source in sources.items()})
    lows = [data.draw(st.integers(0, size - 1)) for size in expected.shape]
    index = tuple(slice(low, data.draw(st.integers(low + 1, size))) for low, size in zip(lows, expected.shape, strict=True))
    assert np.array_equal(transform.read(sources, None, expected.shape, "7", index), expected[index])


@pytest.mark.parametrize(
    ("case", "axis"), [("columns split", 1), ("q, k and v joined", 0), ("gate and up stacked", 1), ("renamed", 1), ("experts stacked", 0)]
)
def test_reads_no_more_than_the_shard_of_a_device(case, axis):
    transform, shapes, whole = CASES[case]
    sources = {name: memory(*shape) for name, shape in shapes.items()}
    target = whole({name: source.values for name, source in sources.items()}).shape
    index = tuple(slice(1, 2) if dim == axis else slice(0, size) for dim, size in enumerate(target))
    piece = transform.read(sources, None, target, "7", index)
    assert sum(sum(source.count) for source in sources.values()) == piece.size


def test_parts_that_a_slice_does_not_touch_are_not_read():
    transform, shapes, _ = CASES["gate and up stacked"]
    sources = {name: memory(*shape) for name, shape in shapes.items()}
    transform.read(sources, None, (2, MLP, EMBED), "7", (slice(1, 2), slice(0, MLP), slice(0, EMBED)))
    assert sources["7.gate"].count == [] and sources["7.up"].count == [MLP * EMBED]


def test_names_are_found_by_their_layer():
    weights = {"norm.weight": Part("model.norm.weight"), "layers.*.mlp.down.weight": Part("model.layers.*.mlp.down_proj.weight")}
    transform, layer = transform_of("layers.12.mlp.down.weight", weights)
    assert (transform, layer) == (weights["layers.*.mlp.down.weight"], "12")
    assert transform_of("norm.weight", weights) == (weights["norm.weight"], "")
    with pytest.raises(KeyError):
        transform_of("layers.0.other", weights)
