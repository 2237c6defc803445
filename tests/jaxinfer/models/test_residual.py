"""The stream's sum and norm, on one device and on several, and how layers are run."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.models import residual
from jaxinfer.models.layers import Dim, Placement, Projection, RMSNorm, Sequences, StepContext, gelu_tanh
from jaxinfer.models.residual import LayerResult, Link, Stream, through
from jaxinfer.quant.observe import Observed
from jaxinfer.quant.quantise import quantise
from jaxinfer.sharding import make_mesh
from pallas_kernels import Normed, PagedMetadata, dispatch, token_chain

RANDOM = np.random.default_rng(0)
BF16 = np.dtype(jnp.bfloat16)


def drawn(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), BF16)


def norm_of(size, offset):
    norm = RMSNorm(size, 1e-5, BF16, offset=offset)
    norm.weight.set_value(drawn(size))
    return norm


@pytest.mark.parametrize("mesh", [{}, {"data": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_sum_and_norm(mesh, offset):
    """As written out; on one device bit for bit (on several, XLA rounds elsewhere)."""
    norm, placement, held, added = norm_of(16, offset), Placement(make_mesh(mesh)), drawn(4, 16), drawn(4, 16)
    found = jax.jit(lambda *given: Stream(*given).normed(norm, placement))(held, added)
    total, normed = jax.jit(lambda held, added: (held + added, norm(held + added)))(held, added)
    assert np.array_equal(found.total, total)
    np.testing.assert_allclose(np.asarray(found.normed, np.float32), np.asarray(normed, np.float32), rtol=2**-6 if mesh else 0)
    assert np.array_equal(Stream(held, added).total(placement), total)
    alone = Stream(held)
    assert np.array_equal(alone.normed(norm, placement).total, held) and alone.total(placement) is held


def test_on_several_devices_a_kernel_has_the_tokens_of_each(monkeypatch):
    monkeypatch.setattr(dispatch, "choose", lambda op, *rest: "gpu")
    monkeypatch.setattr(dispatch, "resolve", lambda op, *rest: SimpleNamespace(residual_norm=kernel))
    seen = []

    def kernel(x, added, weight, *, epsilon, offset):
        seen.append((x.shape, added is None, weight.shape))
        return Normed(x, x if added is None else added)

    placement = Placement(make_mesh({"data": 2, "tensor": 2}))
    for added in (drawn(4, 16), None):
        found = Stream(drawn(4, 16), added).normed(norm_of(16, 0.0), placement)
        assert found[0].shape == found[1].shape == (4, 16)
    assert seen == [((2, 16), False, (16,)), ((2, 16), True, (16,))]


def test_layers_hand_on_the_stream_and_taps_are_its_sums():
    placement, norm = Placement(make_mesh({})), norm_of(8, 0.0)
    x = drawn(2, 8)

    def layer(stream, pool, context):
        return LayerResult(Stream(stream.total(placement), jnp.full_like(x, pool[0])), pool + 1)

    def context(*tapped):
        return StepContext(jnp.arange(2, dtype=jnp.int32), Sequences(2), placement, tapped)

    out = through([layer] * 3, x, tuple(jnp.full(1, number) for number in (1, 2, 4)), context(0, 2, 3), norm=norm)
    sums = [x]
    for number in (1, 2, 4):
        sums.append(sums[-1] + jnp.full_like(x, number))
    assert [int(pool[0]) for pool in out.kv] == [2, 3, 5]
    assert np.array_equal(out.features, jnp.concatenate([sums[0], sums[2], sums[3]], axis=1))
    assert np.array_equal(out.hidden, norm(sums[3]))
    assert through([], x, (), context(), norm=norm).features is None


def projection(out, into, *, scheme=None, bias=False):
    made = Projection([Dim(size) for size in out], [Dim(size) for size in into], BF16, bias=bias)
    weight = drawn(*out, *into) * 0.1
    made.weight.set_value(weight if scheme is None else quantise(np.asarray(weight), len(into), scheme))
    if bias:
        made.bias.set_value(drawn(*out))
    return made


def layer_of(scheme=None, **changes):
    """A stream in front of what a layer does behind its attention, and the next layer's norm and first matmul."""
    out, gate_up, down, qkv = (
        projection(*shape, scheme=scheme) for shape in (((8,), (2, 3)), ((2, 6), (8,)), ((8,), (6,)), ((2, 4), (8,)))
    )
    links = Link(out), Link(gate_up, norm_of(8, 0.0), changes.get("gate", jax.nn.silu)), Link(changes.get("down", down))
    tokens = changes.get("tokens", 1)
    stream = Stream(drawn(tokens, 8), counters=changes.get("counters", "counters"))
    return stream.then(*links, of=drawn(tokens, 2, 3)), norm_of(8, 1.0), qkv


def written_out(stream, norm, qkv, placement):
    (out, *_), (gate_up, first, gate), (down, *_) = stream.links
    between = Stream(stream.held, out(stream.added, placement)).normed(first, placement)
    both = gate_up(between.normed, placement)
    after = Stream(between.total, down(gate(both[:, 0]) * both[:, 1], placement)).normed(norm, placement)
    return qkv(after.normed, placement), after.total


@pytest.mark.parametrize("tokens", [1, 3])
def test_matmuls_that_are_still_to_be_done_are_done_one_by_one(tokens):
    placement, (stream, norm, qkv) = Placement(make_mesh({})), layer_of(tokens=tokens)
    found, (value, total) = stream.projected(norm, qkv, placement), written_out(stream, norm, qkv, placement)
    assert found.value.shape == (tokens, 2, 4) and found.stream.added is None
    assert np.array_equal(found.value, value) and np.array_equal(found.stream.held, total)
    assert np.array_equal(stream.total(placement), total) and np.array_equal(stream.normed(norm, placement).total, total)
    settled = stream.settled(placement)
    assert not settled.links and settled.settled(placement) is settled and np.array_equal(settled.total(placement), total)


@pytest.fixture
def kernels(monkeypatch):
    """As if there were a kernel for chains: how many links it is given, and which counters."""
    seen = []

    def chain(x, held, weights, norms, *, forms, activations, counters, implementation):
        seen.append((len(weights), counters))
        return token_chain(x, held, weights, norms, forms=forms, activations=activations, implementation="xla")

    monkeypatch.setattr(residual, "joins", lambda x, weights, activations, implementation: implementation == "auto")
    monkeypatch.setattr(residual, "token_chain", chain)
    return seen


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_one_token_goes_through_one_kernel(kernels, scheme):
    placement, (stream, norm, qkv) = Placement(make_mesh({})), layer_of(scheme)
    found, (value, total) = stream.projected(norm, qkv, placement), written_out(stream, norm, qkv, placement)
    assert found.value.shape == (1, 2, 4) and found.value.dtype == value.dtype
    for mine, wanted in ((found.value, value), (found.stream.held, total)):
        np.testing.assert_allclose(np.asarray(mine, np.float32), np.asarray(wanted, np.float32), rtol=2**-5, atol=2**-5)
    again = found.stream.then(*stream.links, of=stream.added).settled(placement)
    assert kernels == [(4, "counters"), (3, "counters")] and again.added.shape == (1, 8) and again.counters == "counters"


def test_many_tokens_of_int8_go_through_what_knows_several_matmuls(kernels):
    placement, (stream, norm, qkv) = Placement(make_mesh({})), layer_of("w8a8", tokens=5, counters=None)
    found, (value, total) = stream.projected(norm, qkv, placement), written_out(stream, norm, qkv, placement)
    assert kernels == [(4, None)] and found.value.shape == (5, 2, 4)
    for mine, wanted in ((found.value, value), (found.stream.held, total)):
        mine, wanted = np.asarray(mine, np.float32), np.asarray(wanted, np.float32)
        assert np.linalg.norm(mine - wanted) < 0.05 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    "changes",
    [
        {"counters": None},
        {"gate": gelu_tanh},
        {"down": projection((8,), (6,), bias=True)},
        {"down": projection((8,), (6,), scheme="int8")},
        {"down": projection((8,), (6,), scheme="w8a8")},
    ],
)
def test_what_no_kernel_does_is_done_one_by_one(kernels, monkeypatch, changes):
    """Weights of two kinds are told apart by the op."""
    placement, (stream, norm, qkv) = Placement(make_mesh({})), layer_of(**changes)
    monkeypatch.setattr(residual, "joins", lambda x, weights, *rest: all(weight.scales is None for weight in weights))
    found, (value, total) = stream.projected(norm, qkv, placement), written_out(stream, norm, qkv, placement)
    assert np.array_equal(found.value, value) and np.array_equal(found.stream.held, total) and not kernels


def test_weights_whose_inputs_are_looked_at_are_multiplied_one_by_one(kernels):
    stream, norm, qkv = layer_of()
    noted = []
    down = stream.links[2].projection
    down.weight.set_value(Observed(down.weight.get_value(), noted.append))
    stream.projected(norm, qkv, Placement(make_mesh({})))
    assert len(noted) == 1 and not kernels


def test_several_devices_share_a_chain_as_they_share_matmuls(kernels):
    placement, (stream, norm, qkv) = Placement(make_mesh({"tensor": 2})), layer_of()
    assert stream.projected(norm, qkv, placement).value.shape == (1, 2, 4) and not kernels


def test_a_tapped_stream_is_summed_once(kernels):
    placement, (stream, norm, _) = Placement(make_mesh({})), layer_of()

    def layer(before, pool, context):
        return LayerResult(Stream(before.total(placement), counters=before.counters).then(*stream.links, of=stream.added), pool)

    one = jnp.ones(1, jnp.int32)
    context = StepContext(one - 1, PagedMetadata(one[None], one - 1, one, one, decode_rows=1, counters="counters"), placement, (1, 2))
    out = through([layer] * 2, stream.held, (jnp.zeros(1),) * 2, context, norm=norm)
    assert kernels == [(3, "counters")] * 2 and out.features.shape == (1, 16)
