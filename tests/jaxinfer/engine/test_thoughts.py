from jaxinfer.batch import Admission, Batch, Row
from jaxinfer.engine.proposers.proposal import Proposal
from jaxinfer.engine.thoughts import UNSEEN, Sequences, Thought, common
from jaxinfer.request import Request

ONE, OTHER = Request("one", (1,)), Request("other", (1,))


def row(request, count=1):
    return Row(request, 0, 0, (1,) * count, (1,), samples=True)


def test_what_a_draft_model_has_missed_is_counted_from_where_a_sequence_begins():
    about = Sequences()
    about.begin(Batch((), (row(ONE, 5),), (Admission(ONE, 0),)))
    for _ in range(UNSEEN):
        about.miss(Batch((row(ONE),), ()))
    assert not about.lost(ONE.key)
    about.begin(Batch((row(ONE), row(OTHER)), (), (Admission(OTHER, 1),)))  # all but its last token was there already
    about.miss(Batch((row(ONE),), ()))
    assert about.lost(ONE.key) and not about.lost(OTHER.key)
    about.begin(Batch((row(ONE),), (row(OTHER, 5),)))  # a second chunk begins nothing
    assert about.lost(ONE.key)
    about.begin(Batch((), (row(ONE, 9),), (Admission(ONE, 0, (1, 2)),)))  # it was preempted
    assert not about.lost(ONE.key)
    about.forget(ONE.key)
    assert not about.lost(ONE.key)


def test_tokens_of_prompts_may_be_missed_too():
    about = Sequences()
    about.begin(Batch((), (row(ONE, UNSEEN),), (Admission(ONE, 0), Admission(OTHER, 1))))
    about.miss(Batch((row(OTHER),), (row(ONE, UNSEEN),)))
    assert not about.lost(ONE.key) and about.unseen == {ONE.key: UNSEEN, OTHER.key: 1}
    about.miss(Batch((row(ONE),), ()))
    assert about.lost(ONE.key)


def test_what_was_said_is_used_or_forgotten():
    about = Sequences()
    for request in (ONE, OTHER):
        about.thoughts[request.key] = Thought(3, Proposal((7, 8), "some"))
    about.use([ONE.key])
    assert set(about.thoughts) == {OTHER.key}
    about.forget(OTHER.key)
    assert not about.thoughts


def test_common():
    assert [common(came, said) for came, said in (((1, 2), (1, 3)), ((1, 2), (1, 2, 3)), ((), (1,)), ((2,), (1,)))] == [1, 2, 0, 0]
