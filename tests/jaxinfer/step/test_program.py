"""The compiled programs: one for every bucket, nothing compiled later, buffers donated, and the collectives that a mesh needs."""

import re
from math import prod

import jax
import numpy as np
import pytest

from jaxinfer.batch import LAST_SAMPLED, Admission, Batch, Row
from jaxinfer.request import Request, SamplingParams
from jaxinfer.step import program as program_module
from jaxinfer.step.buckets import Bucket
from jaxinfer.step.executable import InTurns
from jaxinfer.step.forward import Demand
from jaxinfer.step.inputs import pack
from jaxinfer.step.keys import ADMIT, COPY, POOL, WIPE, SamplerKey, ScoreKey
from jaxinfer.step.program import options_for
from jaxinfer.step.slots import Draws

GREEDY = SamplingParams(temperature=0)


def rows(count, tokens, start=0):
    return tuple(Row(Request(str(i), (1,)), i, start, tokens, (i + 1,), samples=True) for i in range(count))


def step(program, batch):
    return program.sample(program.forward(pack(batch, program.config.bucket_for(batch))))


def test_every_bucket_is_compiled_before_the_first_request(plain, progress):
    compiled = set(plain.program._compiled)
    samplers = {SamplerKey(count, demand) for count in (1, 2, 4, 8) for demand in Demand}
    scorers = (ScoreKey(Bucket(32, 4, 0)), ScoreKey(Bucket(32, 4, 4)))
    assert compiled == {*plain.program.config.buckets, *samplers, *scorers, ADMIT, COPY, WIPE, POOL}
    assert set(plain.metrics.compile_seconds) == {str(key) for key in compiled}
    reports = [(done, total) for stage, done, total in progress if stage == "compile"]
    assert reports[0] == (0, len(compiled))
    assert reports[-1] == (len(compiled), len(compiled))
    assert reports == sorted(reports)


def test_the_smallest_bucket_that_holds_the_batch_runs(plain):
    choose = lambda *batch: plain.program.config.bucket_for(Batch(*batch)).bucket
    assert choose(rows(1, (LAST_SAMPLED,)), ()) == Bucket(0, 0, 1)
    assert choose(rows(3, (LAST_SAMPLED,)), ()) == Bucket(0, 0, 4)
    assert choose((), rows(2, (1, 2))) == Bucket(32, 4, 0)
    assert choose(rows(1, (LAST_SAMPLED,)), rows(2, (1, 2))) == Bucket(32, 4, 4)


@pytest.mark.parametrize("batch", [Batch(rows(5, (1,)), ()), Batch((), rows(1, (1,) * 33)), Batch((), rows(5, (1,)))])
def test_a_batch_that_fits_no_bucket_is_an_error_and_no_compilation(plain, batch):
    with pytest.raises(LookupError, match="no compiled program holds"):
        plain.program.config.bucket_for(batch)


def test_prompts_on_gpus_do_without_command_buffers(plain):
    mixed, decode = Bucket(32, 4, 4), Bucket(0, 0, 4)
    assert options_for("gpu") == {"xla_gpu_enable_command_buffer": ""}
    assert options_for("cpu") == options_for("tpu") == {}
    assert all(plain.program.call(key).options == {} for key in (mixed, decode))


def test_one_shape_of_everything(plain):
    config = plain.program.config
    assert config.spare_slot == 4
    assert config.vocab == 272
    shapes = config.shapes(Bucket(32, 4, 4))
    assert (shapes.replicas, shapes.pages_per_row, shapes.page_size) == (1, 16, 4)
    assert len(config.kv_specs) == 2


def test_a_step_takes_over_pool_and_slots(plain):
    """Donated: after a step the old arrays are gone, the weights stay."""
    program = plain.program
    program.admit(Admission(Request("0", (1, 2)), 0), Draws(1))
    before = (*program._kv, *jax.tree.leaves(program._slots))
    step(program, Batch((), rows(1, (1, 2))))
    assert all(array.is_deleted() for array in before)
    assert not any(array.is_deleted() for array in (*program.leaves, *program._kv))


def test_steps_without_prompts_compute_into_the_same_memory(plain):
    """What launches them on a GPU costs twice as much where arrays move. Prompts' results are left to who has them."""
    program, decode, mixed = plain.program, Batch(rows(2, (LAST_SAMPLED,), start=1), ()), Batch((), rows(1, (1, 2)))
    kept = program.forward(pack(mixed, program.config.bucket_for(mixed)))
    found = []
    for _ in range(3):
        computed = program.forward(pack(decode, program.config.bucket_for(decode)))
        found.append((computed, [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(computed)]))
        program.sample(computed)
    assert found[0][1] == found[1][1] == found[2][1]
    assert [computed.logits.is_deleted() for computed, _ in found] == [True, True, False] and not kept.logits.is_deleted()
    assert program.beside.held == sum(leaf.nbytes for leaf in jax.tree.leaves(program._computed))


def test_programs_of_steps_run_in_turns_with_a_copy_on_gpus(plain, monkeypatch):
    program, decode, mixed = plain.program, Bucket(0, 0, 4), Bucket(32, 4, 4)
    assert not any(isinstance(run, InTurns) for run in program._runs.values())
    monkeypatch.setattr(program_module, "PAIRED", ("cpu",))
    monkeypatch.setattr(program, "_runs", dict(program._runs))
    program._pair([decode, SamplerKey(4), mixed])
    assert [key for key, run in program._runs.items() if isinstance(run, InTurns)] == [decode, SamplerKey(4)]
    batch, drawn = Batch(rows(2, (3,), start=1), ()), []
    for _ in range(3):
        computed = program.forward(pack(batch, program.config.shapes(decode)))
        drawn.append((np.array(computed.logits), np.asarray(program.sample(computed).told)))
    for logits, told in drawn[1:]:
        np.testing.assert_array_equal(logits, drawn[0][0])
        np.testing.assert_array_equal(told, drawn[0][1])


def test_rows_without_a_request_write_only_what_nobody_reads(plain):
    """Padding rows and tokens touch the guard page and the spare slot alone."""
    program, spare = plain.program, plain.program.config.spare_slot
    host = lambda tree: jax.tree.map(np.array, tree)
    pool, slots = host(program._kv), host(program._slots)
    step(program, Batch((), ()))
    jax.tree.map(lambda old, new: np.testing.assert_array_equal(old[1:], np.asarray(new)[1:]), pool, program._kv)
    jax.tree.map(lambda old, new: np.testing.assert_array_equal(old[:spare], np.asarray(new)[:spare]), slots, program._slots)


def test_a_step_returns_without_waiting_and_gives_device_arrays(plain):
    sampled = step(plain.program, Batch((), rows(1, (1, 2))))
    assert isinstance(sampled.token, jax.Array)
    assert sampled.token.shape == sampled.finite.shape == (4,)
    assert sampled.top_tokens.shape == (4, 20)


def collectives(program, bucket):
    """Kind and shape of everything that the devices tell each other in one step."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    return re.findall(rf"= (\w+\[[\d,]*\])\S* ({kinds})(?:-start)?\(", program._compiled[bucket].as_text())


def test_one_device_talks_to_nobody(plain):
    assert collectives(plain.program, Bucket(0, 0, 4)) == []


def test_a_mesh_reduces_after_attention_and_after_the_mlp(meshed):
    """Each of two layers sums its residual stream twice; the look-ups of embeddings and last tokens have the same shape."""
    found = collectives(meshed.program, Bucket(0, 0, 1))
    assert 2 * 2 <= found.count(("f32[1,32]", "all-reduce")) <= 2 * 2 + 2, found
    assert not any(kind == "all-to-all" for _, kind in found)
    sampler = collectives(meshed.program, SamplerKey(2))
    assert ("s32[3,272]", "all-reduce") not in sampler, "the slots' tables of counts travel"


def test_a_mesh_splits_the_pool(meshed):
    for spec, pool in zip(meshed.program.config.kv_specs, meshed.program._kv, strict=True):
        assert {shard.data.size for shard in pool.addressable_shards} == {prod(spec.shape) // 4}


@pytest.mark.parametrize("engine", ["plain", "meshed"])
def test_pages_are_copied_and_wiped_in_their_replica_alone(engine, request):
    program = request.getfixturevalue(engine).program
    pages, replicas = program.config.pool.pages, program.config.pool.replicas
    step(program, Batch((), rows(1, (1, 2, 3))))  # page 1 of replica 0 holds something
    last = replicas - 1
    before = [np.array(pool).reshape(replicas, pages, *pool.shape[1:]) for pool in program._kv]
    program.copy_pages([(0, 1, target) for target in range(2, 12)] + [(0, 1, target) for target in range(12, pages)])  # several launches
    copied = [np.array(pool).reshape(replicas, pages, *pool.shape[1:]) for pool in program._kv]
    for old, new in zip(before, copied, strict=True):
        assert np.abs(old[0, 1]).max() > 0
        np.testing.assert_array_equal(new[0, 2:], np.broadcast_to(old[0, 1], new[0, 2:].shape))
        np.testing.assert_array_equal(new[1:, 1:], old[1:, 1:])
    program.wipe_pages([(0, page) for page in range(1, pages) if page != 3] + [(last, 3)])
    for old, new in zip(copied, [np.array(pool).reshape(replicas, pages, *pool.shape[1:]) for pool in program._kv], strict=True):
        assert not new[0, 1:3].any() and not new[last, 3].any() and not new[0, 4:].any()
        if replicas > 1:
            np.testing.assert_array_equal(new[0, 3], old[0, 3])
    program.wipe_pages([(0, 3)])
