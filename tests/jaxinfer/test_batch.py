"""What the scheduler hands to the step: order and counting."""

from jaxinfer.batch import DRAFTED, LAST_SAMPLED, Admission, Batch, Row
from jaxinfer.request import Request


def row(name, start, tokens, *, samples=True):
    return Row(Request(name, (1, 2, 3)), slot=0, start=start, tokens=tokens, pages=(1,), samples=samples)


def test_a_row_counts_what_the_cache_holds_after_the_step():
    assert row("a", 0, (1, 2, 3)).kv_length == 3
    assert row("a", 3, (LAST_SAMPLED,)).kv_length == 4


def test_decodes_come_first_and_all_tokens_count():
    decodes, prefills = (row("a", 3, (LAST_SAMPLED,)), row("b", 5, (LAST_SAMPLED,))), (row("c", 0, (1, 2), samples=False),)
    batch = Batch(decodes, prefills, (Admission(prefills[0].request, 2),))
    assert batch.rows == decodes + prefills
    assert batch.tokens == 4
    assert batch.admissions[0].generated == () == batch.copies


def test_drafts_widen_the_decodes():
    batch = Batch((row("a", 3, (LAST_SAMPLED,)), row("b", 3, (LAST_SAMPLED, 7, 8))), ())
    assert (batch.decode_tokens, batch.hidden, batch.tokens) == (3, False, 4)
    assert Batch((row("a", 3, (LAST_SAMPLED, DRAFTED)),), ()).hidden
    assert Batch((), (row("a", 0, (1, 2)),)).decode_tokens == 1


def test_the_placeholders_are_no_tokens():
    assert LAST_SAMPLED < 0 > DRAFTED != LAST_SAMPLED
