"""Page accounting: every page has one owner or none, and the guard page never has one."""

import random

import pytest

from jaxinfer.cache.pages import GUARD_PAGE, PagePool


def test_a_fresh_pool_is_free_but_for_the_guard_page():
    pool = PagePool(5, 4)
    assert (pool.free, pool.owned, pool.capacity) == (4, 0, 16)
    pool.check()


@pytest.mark.parametrize("size", [-1, 0, 1])
def test_a_pool_without_a_usable_page_is_refused(size):
    with pytest.raises(ValueError, match="at least 2"):
        PagePool(size, 4)


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_pages_needed_at_the_edges(tokens, pages):
    pool, held = PagePool(9, 4), []
    assert pool.needed(tokens) == pages
    assert pool.grow(held, tokens)
    assert len(held) == pool.owned == pages


def test_growing_is_all_or_nothing():
    pool, held = PagePool(4, 4), []
    assert pool.grow(held, 5)
    before = list(held)
    assert not pool.grow(held, 17)
    assert held == before
    assert (pool.free, pool.owned) == (1, 2)
    assert pool.grow(held, 12)
    assert held[:2] == before
    assert not pool.grow(held, 13)
    pool.check()


def test_growing_never_shrinks():
    pool, held = PagePool(4, 4), []
    pool.grow(held, 12)
    assert pool.grow(held, 1)
    assert len(held) == 3


def test_the_page_released_last_is_handed_out_first():
    pool, first, second = PagePool(9, 4), [], []
    pool.grow(first, 12)
    released = first.pop()
    pool.release([released])
    pool.grow(second, 1)
    assert second == [released]


@pytest.mark.parametrize("page", [GUARD_PAGE, 3, -1, -2, 4, 99])
def test_releasing_what_nobody_owns_is_an_error(page):
    pool, held = PagePool(4, 4), []
    pool.grow(held, 8)
    assert held == [1, 2]
    with pytest.raises(ValueError, match="nobody owns"):
        pool.release([page])
    assert pool.owned == 2


def test_releasing_twice_is_an_error():
    pool, held = PagePool(4, 4), []
    pool.grow(held, 4)
    pool.release(held)
    with pytest.raises(ValueError, match="nobody owns"):
        pool.release(held)
    pool.check()


@pytest.mark.parametrize("seed", range(3))
def test_random_traffic_keeps_every_page_with_one_owner(seed):
    draw, pool = random.Random(seed), PagePool(33, 4)
    owners: dict[int, list[int]] = {}
    for step in range(2000):
        if owners and draw.random() < 0.45:
            pool.release(owners.pop(draw.choice(list(owners))))
        else:
            held = owners.setdefault(step if draw.random() < 0.5 or not owners else draw.choice(list(owners)), [])
            wanted = (len(held) + draw.randint(0, 6)) * 4 - draw.randint(0, 3)
            fits = pool.needed(wanted) - len(held) <= pool.free
            assert pool.grow(held, wanted) == fits
        pages = [page for held in owners.values() for page in held]
        assert GUARD_PAGE not in pages
        assert len(set(pages)) == len(pages) == pool.owned
        assert all(0 < page < 33 for page in pages)
        pool.check()
    for held in owners.values():
        pool.release(held)
    assert pool.owned == 0
    pool.check()


def leak(pool, held):
    pool._owned[held[0]] = 0


def double(pool, held):
    pool._free.append(pool._free[0])


def guard(pool, held):
    pool._free.append(GUARD_PAGE)


def give_away(pool, held):
    pool._free.append(held[0])


def lose(pool, held):
    pool._free.pop()


@pytest.mark.parametrize("fault", [leak, double, guard, give_away, lose])
def test_check_sees_broken_accounts(fault):
    pool, held = PagePool(8, 4), []
    pool.grow(held, 9)
    fault(pool, held)
    with pytest.raises(RuntimeError):
        pool.check()
