"""One step against the model run plainly: decodes and prefills mixed, slots feeding tokens, penalties and biases on the way."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfer.batch import LAST_SAMPLED, Admission, Batch, Row
from jaxinfer.grammar import Grammar
from jaxinfer.models.layers import Placement
from jaxinfer.request import Request, SamplingParams
from jaxinfer.sampling import ALL_ALLOWED, mask_words
from jaxinfer.sharding import make_mesh, zeros
from jaxinfer.step import slots
from jaxinfer.step.buckets import Bucket
from jaxinfer.step.forward import Demand, Forward, RowInputs, Sampler, settled
from jaxinfer.step.inputs import Shapes, pack, unpack
from tests.driving import Driver

BUCKET = Bucket(prefill_tokens=12, prefill_rows=2, decode_rows=2)
PAGE, WIDTH, PAGES, LONGEST = 4, 4, 9, 16
GREEDY = SamplingParams(temperature=0)
PROMPTS = {"a": (3, 14, 15, 92, 65), "b": (35, 89, 79), "c": (32, 38, 46, 26, 43, 38, 32, 79)}
PLACES = {"a": (0, 0, (3, 7)), "b": (1, 0, (5,)), "c": (2, 1, (2, 8, 1))}  # slot, replica, pages
admit = jax.jit(slots.admit)


@pytest.fixture(scope="module")
def driver():
    """The model run plainly on one device: the oracle."""
    return Driver.golden("grouped")


def row(name, start, tokens, *, samples=True):
    slot, replica, pages = PLACES[name]
    return Row(Request(name, PROMPTS[name], GREEDY), slot, start, tokens, pages, samples, replica)


class Stepper:
    """One bucket's program, compiled once, and its state: two replicas, two sequences in the first, one in the second."""

    def __init__(self, driver):
        self.mesh, self.graph, self.leaves = driver.mesh, driver.graph, driver.leaves
        self.shapes = Shapes(BUCKET, self.mesh.shape["data"], WIDTH, PAGE, spare_slot=4)
        self.forward = jax.jit(Forward(self.graph, self.shapes, Placement(self.mesh)))
        self.sample = jax.jit(Sampler(self.shapes.spare_slot, Placement(self.mesh)))

    def begin(self, *names):
        """Empty the pool and admit requests."""
        self.kv = tuple(zeros(spec, self.mesh) for spec in self.graph.kv_specs(PAGES * self.shapes.replicas, PAGE))
        state = slots.neutral(5, self.graph.config.vocab_size)
        self.slots = jax.device_put(state, NamedSharding(self.mesh, PartitionSpec()))
        for name in names:
            admission = Admission(Request(name, PROMPTS[name], GREEDY), PLACES[name][0])
            self.slots = admit(self.slots, slots.pack_admission(admission, slots.Draws(0), LONGEST))
        return self

    def __call__(self, decodes, prefills):
        packed = pack(Batch(tuple(decodes), tuple(prefills)), self.shapes)
        self.kv, computed = self.forward(self.leaves, self.kv, self.slots, packed.buffer)
        mask = np.full((computed.logits.shape[0], mask_words(computed.logits.shape[1])), ALL_ALLOWED)
        self.slots, sampled = self.sample(computed.logits, computed.rows, mask, self.slots)
        return {row.request.id: np.asarray(sampled.token)[index].item() for index, row in packed.rows if row.samples}


@pytest.fixture(scope="module")
def stepper():
    return Stepper(Driver.golden("grouped", make_mesh({"data": 2})))


def wanted(driver, name, output=()):
    """The greedy next token by the plain run."""
    tokens = [*PROMPTS[name], *output]
    return int(driver.logits([tokens], [[len(tokens)]])[0][-1].argmax())


def test_prefills_and_decodes_share_steps(driver, stepper):
    stepper.begin(*PROMPTS)
    a, b, c = (PROMPTS[name] for name in "abc")
    first = stepper([], [row("a", 0, a), row("c", 0, c[:5], samples=False)])
    assert first == {"a": wanted(driver, "a")}
    second = stepper([row("a", 5, (LAST_SAMPLED,))], [row("b", 0, b), row("c", 5, c[5:])])
    assert second == {"a": wanted(driver, "a", [first["a"]]), "b": wanted(driver, "b"), "c": wanted(driver, "c")}
    third = stepper([row("b", 3, (LAST_SAMPLED,)), row("c", 8, (LAST_SAMPLED,))], [])
    assert third == {"b": wanted(driver, "b", [second["b"]]), "c": wanted(driver, "c", [second["c"]])}


def test_a_decode_may_carry_its_token_itself(driver, stepper):
    first = stepper.begin("a")([], [row("a", 0, PROMPTS["a"])])["a"]
    assert stepper([row("a", 5, (first,))], []) == {"a": wanted(driver, "a", [first])}
    assert first != 7
    assert stepper([row("a", 5, (7,))], []) == {"a": wanted(driver, "a", [7])}


def test_the_last_prompt_token_alone_comes_from_the_slot(driver, stepper):
    stepper.begin("b")
    assert stepper([], [row("b", 0, PROMPTS["b"][:2], samples=False)]) == {}
    assert stepper([row("b", 2, (LAST_SAMPLED,))], []) == {"b": wanted(driver, "b")}


def test_an_unsettled_row_begins_earlier_by_the_drafts_that_did_not_stand():
    shapes = Shapes(Bucket(4, 1, 2, decode_tokens=3), 2, WIDTH, PAGE, spare_slot=4, unsettled=True)
    late, known = row("a", 5, (LAST_SAMPLED, 7, 8)), row("b", 7, (LAST_SAMPLED, 7))._replace(pages=(5, 2, 4))
    rows = [late._replace(unsettled=True), known, row("c", 6, (LAST_SAMPLED,))._replace(unsettled=True)]
    state = slots.neutral(5, 8)
    state.rejected[:] = 9
    state.rejected[[PLACES[name][0] for name in "abc"]] = 2, 1, 3
    packed = pack(Batch(tuple(rows), ()), shapes)
    found = jax.jit(lambda buffer, state: settled(unpack(buffer, shapes), state, shapes))(packed.buffer, state)
    places = dict(zip("abc", (index for index, _ in packed.rows), strict=True))
    assert [found.kv_lengths[places[name]] for name in "abc"] == [6, 9, 4]
    of_rows = np.asarray(found.positions).reshape(2, -1)[:, :6].reshape(2, 2, 3)
    assert of_rows[0].tolist() == [[3, 4, 5], [7, 8, -1]] and of_rows[1].tolist() == [[3, -1, -1], [-1, -1, -1]]
    assert np.asarray(found.positions).reshape(2, -1)[:, 6:].max() == -1
    plain = replace(shapes, unsettled=False)
    assert "unsettled" in shapes.fields() and "unsettled" not in plain.fields()
    with pytest.raises(ValueError, match="cannot tell"):
        pack(Batch(tuple(rows), ()), plain)


def test_rows_that_do_not_sample_leave_their_slot_alone(stepper):
    stepper.begin(*PROMPTS)
    before = jax.tree.map(np.asarray, stepper.slots)
    stepper([], [row("a", 0, PROMPTS["a"][:3], samples=False)])
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[:4], np.asarray(y)[:4]), before, stepper.slots)


def test_every_row_gets_its_own_penalties_biases_holds_and_mask():
    """The sampler alone: requests with prompt 1, 2, 3 and some output, each row with the same logits."""
    logits, cold = np.array([1.0, 5.0, 4.5, 4.0, 3.5, 3.0, 0.0, -1.0], np.float32), replace(GREEDY, max_tokens=9)
    cases = [
        (cold, (), (6,), 1),
        (replace(cold, repetition_penalty=2.0), (), (6,), 4),
        (replace(cold, frequency_penalty=1.0), (), (1, 1, 2), 3),
        (replace(cold, logit_bias={7: 7.0}, repetition_penalty=3.0, logprobs=2), (), (6,), 7),
        (replace(cold, min_tokens=3), (1, 2), (6, 6), 3),
        (replace(cold, min_tokens=2), (1, 2), (6, 6), 1),
        (cold, (), (6,), 2),
    ]
    rows, state = [], slots.neutral(len(cases) + 1, len(logits))
    for slot, (params, held, generated, _) in enumerate(cases):
        admission = Admission(Request("r", (1, 2, 3), params), slot, generated)
        state = admit(state, slots.pack_admission(admission, slots.Draws(5, held), LONGEST))
        rows.append(Row(admission.request, slot, 2 + len(generated), (LAST_SAMPLED,), (1, 2), samples=True))
    inputs = RowInputs(*(jax.numpy.array(values, np.int32) for values in zip(*((row.slot, row.kv_length, 1) for row in rows), strict=True)))
    mask = np.full((len(cases), 1), ALL_ALLOWED)
    mask[-1] &= ~np.uint32(1 << 1)  # the likeliest token is forbidden to the last row
    run = jax.jit(Sampler(len(cases), Placement(make_mesh({}))))
    after, sampled = run(np.tile(logits, (len(cases), 1)), inputs, mask, state)
    assert sampled.token.tolist() == [token for *_, token in cases]
    assert after.last_token.tolist()[:-1] == sampled.token.tolist()
    assert after.counts[2].tolist() == [0, 2, 1, 1, 0, 0, 0, 0]
    assert sampled.finite.all()
    exact = logits - np.log(np.exp(logits).sum())
    np.testing.assert_allclose(sampled.logprob, exact[np.asarray(sampled.token)], rtol=1e-5)
    assert sampled.top_tokens[3, :3].tolist() == [1, 2, 3]
    np.testing.assert_allclose(sampled.top_logprobs[3, :3], exact[1:4], rtol=1e-5)


def test_a_row_asks_for_the_least_sampler_that_serves_it():
    warm = SamplingParams(temperature=0.7, seed=3, max_tokens=9, top_k=-1, stop=["x"])
    assert (Demand.of(GREEDY), Demand.of(replace(GREEDY, max_tokens=3, n=2)), Demand.of(warm)) == (0, 0, 1)
    for changes in ({"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"logprobs": 0}, {"min_tokens": 1}, {"logit_bias": {1: 2.0}},
                    {"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"bad_words": ("a",)}, {"allowed_token_ids": (1,)},
                    {"grammar": Grammar.regex("a")}):  # fmt: skip
        assert Demand.of(replace(warm, **changes)) is Demand.of(replace(GREEDY, **changes)) is Demand.FULL, changes


def test_every_sampler_draws_the_same_tokens():
    """Rows at several temperatures through all that serve them; a row of NaN is reported by each."""
    draw = np.random.default_rng(3)
    logits = draw.normal(size=(6, 40)).astype(np.float32)
    logits[5] = np.nan
    state, rows = slots.neutral(7, 40), RowInputs(*(jax.numpy.array(values, np.int32) for values in (range(6), [9] * 6, [1] * 6)))
    for demand, temperatures in ((Demand.GREEDY, [0] * 6), (Demand.DRAWN, [0, 0.3, 1, 2, 0, 1])):
        for slot, temperature in enumerate(temperatures):
            request = Request("r", (1, 2), SamplingParams(temperature=temperature))
            state = admit(state, slots.pack_admission(Admission(request, slot), slots.Draws(slot, (), ()), LONGEST))
        mask, place = np.full((6, 2), ALL_ALLOWED), Placement(make_mesh({}))
        _, least = jax.jit(Sampler(6, place, demand))(logits, rows, mask, state)
        _, full = jax.jit(Sampler(6, place))(logits, rows, mask, state)
        assert least.token.tolist()[:5] == full.token.tolist()[:5]
        assert least.finite.tolist() == full.finite.tolist() == [True] * 5 + [False]
