"""What is compiled and what it is called; and that a pass without the draft model touches nothing of it."""

import jax
import numpy as np

from jaxinfer.batch import Batch, Row
from jaxinfer.request import Request
from jaxinfer.step.buckets import Bucket
from jaxinfer.step.inputs import pack
from jaxinfer.step.keys import AloneKey, ProposeKey, SamplerKey


def test_no_two_programs_have_the_same_name(plain, speculating):
    for engine in (plain, speculating):
        keys = engine.program.config.keys
        assert len({str(key) for key in keys}) == len(set(keys)) == len(keys)
    assert str(AloneKey(Bucket(0, 0, 4))) == "decode4-alone"
    assert str(SamplerKey(4)) == "sample4-full" and str(SamplerKey(4, width=3)) == "verify4x3-full"


def test_shapes_without_drafts_have_a_pass_without_the_draft_model(plain, speculating):
    config = speculating.program.config
    assert plain.program.config.alone == plain.program.config.proposers == ()
    assert {key.bucket for key in config.alone} == {bucket for bucket in config.buckets if bucket.decode_tokens == 1}
    assert {key.bucket for key in config.proposers} == {bucket for bucket in config.buckets if bucket.decode_tokens > 1}
    assert ProposeKey(config.proposers[0].bucket, greedy=True) in config.keys


def test_a_pass_without_the_draft_model_leaves_its_pages_as_they_were(speculating):
    program = speculating.program
    layers = len(program.config.graph.config.attention_shapes)
    batch = Batch((Row(Request("a", (1,)), 0, 3, (7,), (3,), samples=True),), ())
    packed = pack(batch, program.config.bucket_for(batch))

    def run(**how):
        before = [np.asarray(part).copy() for part in jax.tree.leaves(program._kv[layers:])]
        logits = np.asarray(program.forward(packed, **how).logits)
        after = [np.asarray(part) for part in jax.tree.leaves(program._kv[layers:])]
        return logits, all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))

    alone, untouched = run(alone=True)
    followed, same = run()
    assert untouched and not same
    np.testing.assert_allclose(alone, followed, rtol=1e-5, atol=1e-5)
    program.wipe_pages([(0, 3)])
