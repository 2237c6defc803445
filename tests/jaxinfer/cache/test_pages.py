"""Page accounting: every page is free, owned or cached, and the guard page is none of them."""

import random
from array import array

import pytest

from jaxinfer.cache.pages import GUARD_PAGE, PagePool
from jaxinfer.cache.prefix import Chain, PrefixIndex

TEXT = list(range(100))


def pages(*ids):
    return array("i", ids)


def test_a_fresh_pool_is_free_but_for_the_guard_page():
    pool = PagePool(5, 4)
    assert (pool.free, pool.owned, pool.cached, pool.available, pool.capacity) == (4, 0, 0, 4, 16)
    pool.check([])


@pytest.mark.parametrize("size", [-1, 0, 1])
def test_a_pool_without_a_usable_page_is_refused(size):
    with pytest.raises(ValueError, match="at least 2"):
        PagePool(size, 4)


@pytest.mark.parametrize(("tokens", "count"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_pages_needed_at_the_edges(tokens, count):
    pool, held = PagePool(9, 4), pages()
    assert pool.needed(tokens) == count
    assert pool.grow(held, tokens)
    assert len(held) == pool.owned == count


def test_growing_is_all_or_nothing_and_never_shrinks():
    pool, held = PagePool(4, 4), pages()
    assert pool.grow(held, 5)
    before = list(held)
    assert not pool.grow(held, 17)
    assert list(held) == before
    assert (pool.free, pool.owned) == (1, 2)
    assert pool.grow(held, 12)
    assert list(held[:2]) == before
    assert not pool.grow(held, 13)
    assert pool.grow(held, 1)
    assert len(held) == 3
    pool.check([held])


def test_the_page_released_last_is_handed_out_first():
    pool, first, second = PagePool(9, 4), pages(), pages()
    pool.grow(first, 12)
    released = first.pop()
    pool.release([released])
    pool.grow(second, 1)
    assert list(second) == [released]


@pytest.mark.parametrize("page", [GUARD_PAGE, 3, -1, -2, 4, 99])
def test_releasing_what_nobody_owns_is_an_error(page):
    pool = PagePool(4, 4)
    pool.grow(pages(), 8)
    with pytest.raises(ValueError, match="nobody owns"):
        pool.release([page])


def test_a_page_comes_free_with_its_last_owner():
    pool, held = PagePool(5, 4), pages()
    pool.grow(held, 8)
    pool.share(held)
    assert (pool.owned, pool.exclusive(held), pool.owners(held[0])) == (2, 0, 2)
    pool.check([held, held])
    pool.release(held)
    assert (pool.owned, pool.exclusive(held)) == (2, 2)
    pool.release(held)
    assert (pool.owned, pool.free) == (0, 4)
    with pytest.raises(ValueError, match="holds nothing"):
        pool.share(held)


def known(pool, tokens):
    """A sequence that has computed these tokens."""
    chain, held = Chain(("",)), pages()
    assert pool.grow(held, len(tokens))
    pool.enter(chain, tokens, held, len(tokens))
    return chain, held


def test_a_page_with_known_content_is_cached_and_can_be_taken_up_again():
    pool = PagePool(9, 4, PrefixIndex(4))
    _, held = known(pool, TEXT[:10])
    pool.release(held)
    assert (pool.free, pool.cached, pool.owned, pool.available) == (6, 2, 0, 8)
    hit = [node.page for node in pool.match(Chain(("",)), TEXT[:10])]
    assert hit == list(held[:2])
    assert pool.unowned(hit) == 2
    pool.share(hit)
    assert (pool.cached, pool.owned, pool.unowned(hit)) == (0, 2, 0)
    pool.check([hit])


@pytest.mark.parametrize(("length", "hits"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (13, 3)])
def test_the_last_token_is_always_left_to_compute(length, hits):
    pool = PagePool(9, 4, PrefixIndex(4))
    known(pool, TEXT[:12])
    assert len(pool.match(Chain(("",)), TEXT[:length])) == hits


def test_the_page_used_longest_ago_goes_first_and_an_end_before_its_beginning():
    pool = PagePool(7, 4, PrefixIndex(4))
    (_, old), (_, new) = known(pool, TEXT[:12]), known(pool, TEXT[50:62])
    pool.release(old)
    pool.release(new)
    pool.share([node.page for node in pool.match(Chain(("",)), TEXT[:12])])
    pool.release(old[:2])  # used again: younger than all of `new`
    order = pages()
    pool.grow(order, 24)
    assert list(order) == [old[2], new[2], new[1], new[0], old[1], old[0]]
    assert not pool.match(Chain(("",)), TEXT[:12])
    pool.check([order])


def test_without_an_index_nothing_is_kept():
    pool = PagePool(9, 4)
    chain, held = known(pool, TEXT[:12])
    pool.release(held)
    assert (pool.cached, pool.free) == (0, 8)
    assert pool.match(chain, TEXT[:12]) == []
    assert pool.poison(chain) == []


def test_poisoned_pages_come_free_at_once_or_with_their_last_owner():
    pool = PagePool(9, 4, PrefixIndex(4))
    chain, held = known(pool, TEXT[:12])
    pool.release(held[2:])
    assert sorted(pool.poison(chain)) == sorted(held)
    assert (pool.cached, pool.free) == (0, 6)
    pool.enter(chain, TEXT[:12], held, 12)
    pool.release(held[:2])
    assert (pool.cached, pool.free) == (0, 8)
    pool.check([])


@pytest.mark.parametrize("seed", range(4))
def test_random_traffic_keeps_every_page_in_one_state(seed):
    draw, pool = random.Random(seed), PagePool(33, 4, PrefixIndex(4))
    held: list[array] = []
    for _ in range(1500):
        if held and draw.random() < 0.5:
            pool.release(held.pop(draw.randrange(len(held))))
        else:
            start = draw.randrange(3)
            tokens, chain, own = TEXT[start : start + draw.randrange(1, 30)], Chain(("",)), pages()
            nodes = pool.match(chain, tokens)
            pool.share(node.page for node in nodes)
            own.extend(node.page for node in nodes)
            fits = pool.needed(len(tokens)) - len(own) <= pool.available
            assert pool.grow(own, len(tokens)) == fits
            if fits:
                pool.enter(chain, tokens, own, len(tokens))
            held.append(own)
        pool.check(held)
    for own in held:
        pool.release(own)
    assert pool.owned == 0
    pool.check([])


def leak(pool, held):
    pool._owners[held[0]] = 0


def double(pool, held):
    pool._free.append(pool._free[0])


def guard(pool, held):
    pool._free.append(GUARD_PAGE)


def give_away(pool, held):
    pool._free.append(held[0])


def lose(pool, held):
    pool._free.pop()


def cached_unknown(pool, held):
    pool._cached[pool._free.pop()] = None


def known_but_free(pool, held):
    pool._free.append(pool._cached.popitem()[0])


@pytest.mark.parametrize("fault", [leak, double, guard, give_away, lose, cached_unknown, known_but_free])
def test_check_sees_broken_accounts(fault):
    pool = PagePool(12, 4, PrefixIndex(4))
    _, gone = known(pool, TEXT[:8])
    pool.release(gone)
    _, held = known(pool, TEXT[20:29])
    pool.check([held])
    fault(pool, held)
    with pytest.raises(RuntimeError):
        pool.check([held])
