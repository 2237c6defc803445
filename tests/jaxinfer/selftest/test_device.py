"""The device without arithmetic refuses what a compiled step would do wrong in silence."""

import pytest

from jaxinfer.batch import LAST_SAMPLED, Admission, Batch, PageCopy, Row
from jaxinfer.cache.prefix import Chain
from jaxinfer.engine.sequence import Sequence
from jaxinfer.request import Request
from jaxinfer.selftest.device import Broken, Device, Life

TEXT = (1, 2, 3, 4, 5, 6)


def life(name="a", prompt=TEXT, limit=5, salt=""):
    request = Request(name, prompt, cache_salt=salt)
    return Life.of(Sequence(request, request.ids[:], limit, 0, Chain((salt,))), limit)


def row(who, start, tokens, pages, samples=True, slot=0):
    return Row(who.sequence.request, slot, start, tokens, pages, samples)


def run(device, *rows, lives, copies=()):
    admissions = [Admission(r.request, r.slot) for r in rows if r.start == 0]
    return device.run(Batch((), rows, tuple(admissions), copies), list(lives))


def test_a_prompt_in_two_chunks_and_a_decode():
    device, who = Device(1, 5, 4), life()
    assert run(device, row(who, 0, TEXT[:5], (1, 2), samples=False), lives=[who]) == [()]
    ((token,),) = run(device, row(who, 5, TEXT[5:], (1, 2)), lives=[who])
    assert who.tokens == [*TEXT, token]
    assert len(run(device, row(who, 6, (LAST_SAMPLED,), (1, 2)), lives=[who])) == 1
    assert len(who.marks) == len(who.tokens) == 8


def test_equal_beginnings_have_equal_marks_and_salts_do_not():
    assert life().marks == life("b").marks
    assert life().marks[:5] == life(prompt=TEXT[:5]).marks
    assert not set(life().marks) & set(life(salt="x").marks)


def test_a_row_may_read_what_another_row_of_the_step_writes():
    device, one, two = Device(1, 5, 4), life(), life("b")
    device.slots[1] = (two.sequence.request.key, 6)
    reader, writer = row(two, 4, TEXT[4:], (1, 3), slot=1), row(one, 0, TEXT, (1, 2))
    assert () not in run(device, reader, writer, lives=[two, one])


def test_a_copied_page_holds_the_same():
    device, one, two = Device(1, 5, 4), life(), life("b")
    run(device, row(one, 0, TEXT, (1, 2)), lives=[one])
    device.slots[1] = (two.sequence.request.key, 6)
    run(device, row(two, 5, TEXT[5:], (1, 3), slot=1), lives=[two], copies=(PageCopy(2, 3),))


@pytest.mark.parametrize(
    ("match", "start", "tokens", "pages", "slot"),
    [
        ("something else", 4, TEXT[4:], (3, 4), 1), ("not its sequence's", 4, (9, 9), (1, 2), 1),
        ("another sequence's slot", 4, TEXT[4:], (1, 3), 0), ("launched step", 0, TEXT, (1, 3), 1),
        ("before all before it", 4, TEXT[4:5], (1, 3), 1),
    ],
)  # fmt: skip
def test_wrong_rows_are_refused(match, start, tokens, pages, slot):
    device, one, two = Device(1, 5, 4), life(), life("b")
    run(device, row(one, 0, TEXT, (1, 2)), lives=[one])
    device.slots[1] = (two.sequence.request.key, 6)
    batch = Batch((), (row(two, start, tokens, pages, slot=slot),))
    with pytest.raises(Broken, match=match):
        device.run(batch, [two])


def test_a_copy_over_a_page_that_is_read_is_refused():
    device, who = Device(1, 5, 4), life()
    run(device, row(who, 0, TEXT, (1, 2)), lives=[who])
    with pytest.raises(Broken, match="copied over"):
        run(device, lives=[], copies=(PageCopy(1, 2),))
    device.commit()
    run(device, lives=[], copies=(PageCopy(1, 2),))


def test_ruined_pages_and_tokens_past_the_limit_are_refused():
    device, who = Device(1, 5, 4), life(limit=1)
    run(device, row(who, 0, TEXT, (1, 2)), lives=[who])
    with pytest.raises(Broken, match="more tokens than it may"):
        run(device, row(who, 6, (LAST_SAMPLED,), (1, 2)), lives=[who])
    device.ruin(0, 1)
    other = life("b")
    device.slots[1] = (other.sequence.request.key, 6)
    with pytest.raises(Broken, match="something else"):
        run(device, row(other, 4, TEXT[4:], (1, 3), slot=1), lives=[other])


def test_drafts_stand_up_to_the_first_wrong_one_and_what_is_written_of_it_is_not_read():
    who = life("a")
    device = Device(1, 6, 4)
    ((first,),) = run(device, row(who, 0, TEXT, (1, 2)), lives=[who])
    second, third = who.foresee(2)
    batch = Batch((row(who, 6, (LAST_SAMPLED, second, third + 1, 3), (1, 2, 3)),), ())
    assert device.run(batch, [who]) == [(second, third)]
    device.commit()
    assert who.tokens == [*TEXT, first, second, third]
    assert len(device.run(Batch((row(who, 8, (LAST_SAMPLED,), (1, 2, 3)),), ()), [who])[0]) == 1
    with pytest.raises(Broken, match="something else than its text"):  # as if the wrong draft had been kept
        device.run(Batch((row(who, 9, (who.tokens[9],), (1, 2, 3)),), ()), [who])
        device.memory[0][3][0] = 1
        device.run(Batch((row(who, 10, (LAST_SAMPLED,), (1, 2, 3)),), ()), [who])
