"""Contents of pages: found by what stands before and in them, told apart when digests collide, forgotten when told."""

import pytest

from jaxinfer.cache.prefix import Chain, PrefixIndex, sha256

TEXT = list(range(12))


def entered(index, tokens=TEXT, pages=(1, 2, 3), salt="", full=3):
    chain = Chain((salt,))
    index.enter(chain, tokens, pages, full)
    return chain


def found(index, tokens, salt="", most=9):
    return [node.page for node in index.match(Chain((salt,)), tokens, min(most, len(tokens) // 4))]


def test_the_longest_run_of_full_pages_is_found():
    index = PrefixIndex(4)
    entered(index)
    assert found(index, TEXT) == [1, 2, 3]
    assert found(index, TEXT, most=2) == [1, 2]
    assert found(index, TEXT[:7]) == [1]
    assert found(index, TEXT[:8] + [99] * 4) == [1, 2]
    assert found(index, [99, *TEXT[1:]]) == []
    index.check()


def test_pages_are_entered_as_they_fill():
    index, chain = PrefixIndex(4), Chain(("",))
    index.enter(chain, TEXT[:6], (1, 2), 1)
    assert found(index, TEXT) == [1]
    index.enter(chain, TEXT, (1, 2, 3), 3)
    assert (found(index, TEXT), chain.entered) == ([1, 2, 3], 3)


def test_salts_and_models_do_not_share():
    index = PrefixIndex(4)
    entered(index, salt="a")
    assert found(index, TEXT) == found(index, TEXT, "b") == []
    assert found(index, TEXT, "a") == [1, 2, 3]
    names = [PrefixIndex(4, model)._name(Chain((salt,)), TEXT, 0) for model in ((), ("m", "bfloat16")) for salt in ("", "a")]
    assert len(set(names)) == 4


def test_the_digest_is_chained_over_parent_and_tokens():
    index = PrefixIndex(4)
    first = index._name(Chain(("",)), TEXT, 0)
    assert index._name(Chain(("",)), TEXT, 1) == sha256(first + b"".join(token.to_bytes(4, "little") for token in TEXT[4:8]))


def test_a_content_that_is_known_stays_where_it_is():
    index = PrefixIndex(4)
    entered(index)
    entered(index, [*TEXT, 7, 7, 7, 7], (4, 5, 6, 7), full=4)
    assert found(index, [*TEXT, 7, 7, 7, 7]) == [1, 2, 3, 7]
    index.check()


def test_with_every_digest_equal_texts_are_still_told_apart():
    index = PrefixIndex(4, digest=lambda data: b"same")
    entered(index)
    other = entered(index, [5] * 12, (4, 5, 6))
    assert other.closed and len(index) == 1
    assert found(index, TEXT) == [1]
    assert found(index, [5] * 12) == []
    index.check()


def test_equal_pages_behind_different_beginnings_are_told_apart_when_digests_collide():
    """The beginning's digest is the same and it has been forgotten: what stood behind it must not be found behind the other."""
    index = PrefixIndex(4, digest=lambda data: sha256(data[-16:]) if len(data) > 40 else sha256(b"root"))
    entered(index, [1] * 4 + [2] * 4, (1, 2), full=2)
    assert found(index, [3] * 4 + [2] * 4) == []
    entered(index, [3] * 4 + [2] * 4, (3, 4), full=2)
    assert found(index, [3] * 4 + [2] * 4) == [3]


def test_what_is_dropped_is_not_found_and_leaves_nothing_behind():
    index = PrefixIndex(4)
    entered(index)
    index.drop(2)
    assert found(index, TEXT) == [1]
    again = entered(index, pages=(4, 5, 6))
    assert found(index, TEXT) == [1, 5, 3]
    for page in (3, 1, 5):
        index.drop(page)
        index.check()
    assert len(index) == 0 and not index._nodes and not index._roots
    index.enter(again, TEXT, (4, 5, 6), 3)
    assert found(index, TEXT) == [4, 5, 6], "a chain whose nodes are gone begins again"


def test_a_sequence_that_waits_is_looked_up_again_from_where_it_was():
    asked = []
    index, waiting = PrefixIndex(4, digest=lambda data: (asked.append(data), sha256(data))[1]), Chain(("",))
    writer = entered(index, full=2)
    look = lambda: [node.page for node in index.match(waiting, TEXT, 3)]
    assert look() == [1, 2]
    index.enter(writer, TEXT, (1, 2, 3), 3)
    asked.clear()
    assert look() == [1, 2, 3] and asked == []
    index.drop(2)
    assert look() == [1]
    entered(index, pages=(1, 5, 3))
    assert look() == [1, 5, 3]
    index.poison(index.node(5))
    assert look() == [1]


@pytest.mark.parametrize(("known", "entered"), [(True, [5, 6]), (False, [])])
def test_who_did_not_write_a_page_does_not_make_it_known(known, entered):
    index = PrefixIndex(4)
    if known:
        index.enter(Chain(("",)), TEXT, (5,), 1)
    sibling = Chain(("",))
    sibling.restart(borrowed=1)
    index.enter(sibling, TEXT, (5, 6), 2)
    assert sorted(index.pages()) == entered and [node.page for _, node in sibling.written] == entered[1:]
    index.check()


def test_poison_takes_everything_behind_and_is_remembered():
    index = PrefixIndex(4)
    chain = entered(index, full=2)
    behind = entered(index, TEXT, (1, 2, 3))
    elsewhere = entered(index, [9] * 4, (7,), full=1)
    assert index.poison(chain.written[1][1]) == [2, 3]
    assert index.poison(chain.written[1][1]) == []
    assert found(index, TEXT) == [1]
    index.enter(behind, [*TEXT, 1, 1, 1, 1], (1, 2, 3, 8), 4)
    assert behind.closed and found(index, TEXT) == [1]
    index.drop(2)
    entered(index, pages=(1, 2, 4))
    assert found(index, TEXT) == [1, 2, 4]
    assert found(index, [9] * 4) == [7] and not elsewhere.closed


@pytest.mark.parametrize(
    "fault",
    [
        lambda index: setattr(index.node(2), "page", 5), lambda index: setattr(index.node(2), "alive", False),
        lambda index: index._nodes.clear(),
        lambda index: [setattr(index.node(page), "content", b"x" * 16) for page in (1, 2, 3)], lambda index: index._pages.clear(),
        lambda index: index._bad.add(1),
    ],
)  # fmt: skip
def test_check_sees_broken_records(fault):
    index = PrefixIndex(4)
    entered(index)
    assert 2 in index and sorted(index.pages()) == [1, 2, 3]
    fault(index)
    with pytest.raises(RuntimeError):
        index.check()
