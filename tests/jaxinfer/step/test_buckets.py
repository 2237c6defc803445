"""The one list of compiled shapes: it holds every batch the scheduler may make, and grows slowly."""

import itertools

import pytest

from jaxinfer.batch import Batch, Row
from jaxinfer.request import Request
from jaxinfer.step.buckets import Bucket, Occupancy, buckets, choose, occupancy, prefill_rows, verifying

SIZES = [(1, 16), (4, 32), (16, 512), (7, 100), (64, 512), (256, 2048)]


@pytest.mark.parametrize(("sequences", "tokens"), SIZES)
def test_every_batch_within_the_limits_has_a_bucket(sequences, tokens):
    available = buckets(sequences, tokens)
    most = available[-1].prefill_rows
    edges = {0, 1, 2, 3, sequences - 1, sequences}
    for decode, rows, count in itertools.product(edges, {0, 1, 2, most}, {0, 1, 15, 31, 32, 33, tokens - 1, tokens}):
        need = Occupancy(prefill_tokens=count, prefill_rows=rows, decode_rows=decode)
        if not 0 <= decode <= sequences or not 0 <= rows <= most or not 0 <= count <= tokens or (count == 0) != (rows == 0):
            continue
        bucket = choose(available, need)
        assert bucket.prefill_tokens >= count
        assert bucket.prefill_rows >= rows
        assert bucket.decode_rows >= decode
        assert not any(
            other.tokens < bucket.tokens and other.prefill_tokens >= count and other.prefill_rows >= rows and other.decode_rows >= decode
            for other in available
        )


@pytest.mark.parametrize(("sequences", "tokens"), SIZES)
def test_the_list_is_short_sorted_and_without_doubles(sequences, tokens):
    available = buckets(sequences, tokens)
    assert len(set(available)) == len(available) <= 24
    assert list(available) == sorted(available)
    assert max(bucket.decode_rows for bucket in available) == sequences
    assert max(bucket.prefill_tokens for bucket in available) == tokens
    assert all(bucket.decode_rows + bucket.prefill_rows > 0 for bucket in available)


def test_a_decode_pays_for_no_prefill():
    chosen = choose(buckets(16, 512), Occupancy(0, 0, 3))
    assert chosen == Bucket(0, 0, 4)
    assert (chosen.tokens, chosen.rows) == (4, 4)


def test_rows_and_tokens_that_are_not_there_cost_little_where_each_costs():
    available = buckets(256, 2048)
    needs = ((600, 3, 0), (600, 3, 20), (2048, 3, 128), (2048, 3, 129), (33, 1, 5), (0, 0, 150))
    chosen = [choose(available, Occupancy(*need)) for need in needs]
    sizes = [(bucket.prefill_tokens, bucket.decode_rows) for bucket in chosen]
    assert sizes == [(1024, 0), (1024, 128), (2048, 128), (2048, 256), (128, 256), (0, 192)]


def test_what_no_bucket_holds_is_an_error():
    with pytest.raises(LookupError, match="no compiled program holds"):
        choose(buckets(4, 32), Occupancy(0, 0, 5))


def test_prefill_rows_are_few():
    assert [prefill_rows(tokens, 256) for tokens in (1, 32, 512, 4096)] == [1, 4, 64, 64]
    assert prefill_rows(4096, 3) == 3


def test_names_are_short_and_different():
    available = buckets(16, 512)
    assert str(Bucket(0, 0, 4)) == "decode4"
    assert str(Bucket(32, 4, 16)) == "decode16-prefill32x4"
    assert len({str(bucket) for bucket in available}) == len(available)


def test_occupancy_is_that_of_the_fullest_replica():
    def row(replica, tokens):
        return Row(Request("r", (1,)), 0, 0, tokens, (1,), True, replica)

    batch = Batch((row(0, (1,)), row(1, (1,)), row(1, (1,))), (row(0, (1, 2, 3)), row(0, (4,)), row(1, (1, 2, 3, 4, 5))))
    assert occupancy(batch, 2) == Occupancy(prefill_tokens=5, prefill_rows=2, decode_rows=2)
    assert occupancy(Batch((), ()), 2) == Occupancy(0, 0, 0)


def test_rows_with_drafts_have_a_few_buckets_of_their_own():
    wide = verifying(64, 4)
    assert [str(bucket) for bucket in wide[:4]] == ["decode1x3", "decode4x3", "decode16x3", "decode64x3"]
    assert [str(bucket) for bucket in wide[4:]] == ["decode1x5", "decode4x5", "decode16x5", "decode64x5"]
    assert {bucket.decode_tokens for bucket in verifying(4, 2)} == {3}
    available = (*buckets(64, 512), *wide)
    assert choose(available, Occupancy(0, 0, 3)) == Bucket(0, 0, 4)
    assert choose(available, Occupancy(0, 0, 3, 2)) == Bucket(0, 0, 4, 3)
    assert choose(available, Occupancy(0, 0, 3, 4)) == Bucket(0, 0, 4, 5)
    assert (Bucket(0, 0, 4, 5).tokens, Bucket(0, 0, 4, 5).rows) == (20, 4)
    with pytest.raises(LookupError):
        choose(available, Occupancy(32, 1, 3, 2))
