"""Which KV pages belong to whom: plain Python counting, no arrays.

A pool has `size` pages numbered from 0. Page 0 is the guard page: padding is written there and nobody owns it. Every other page is
in one of three states:

    free     nobody owns it and nobody knows what it holds
    owned    one owner or more; with more than one it is full and nobody writes to it
    cached   nobody owns it, but its content is known to the prefix index: whoever needs that content may take it

`grow` hands out free pages, and when there are none the cached page that was used longest ago. `release` makes a page that lost its last
owner cached if its content is known, else free. The pages of one sequence are released last one first, so that an end is forgotten
before the beginning it depends on. This file does not know when the device is done with a page: whoever releases it says so only
after the last step that read it is committed.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from jaxinfer.cache.prefix import Chain, Node, PrefixIndex

GUARD_PAGE = 0


class PagePool:
    """The pages of one data replica; without an `index` no content is ever known. Of the free pages the one released last goes out first.

    Raises:
        ValueError: fewer than two pages (the guard page and one to use).
    """

    def __init__(self, size: int, page_size: int, index: PrefixIndex | None = None) -> None:
        if size < 2:
            raise ValueError(f"a pool of {size} pages has none to use beside the guard page; at least 2 are needed")
        self.size = size
        self.page_size = page_size
        self.index = index
        self._free = list(range(size - 1, GUARD_PAGE, -1))
        self._owners = [0] * size
        self._cached: OrderedDict[int, None] = OrderedDict()  # a dict would pass over all that it let go before its first entry

    @property
    def free(self) -> int:
        """Pages that nobody owns and whose content nobody knows."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Pages that nobody owns but whose content is known."""
        return len(self._cached)

    @property
    def available(self) -> int:
        """Pages that can be handed out now."""
        return len(self._free) + len(self._cached)

    @property
    def owned(self) -> int:
        """Pages that sequences hold; one that several share counts once."""
        return self.size - 1 - self.available

    @property
    def capacity(self) -> int:
        """Tokens that all usable pages hold together."""
        return (self.size - 1) * self.page_size

    def needed(self, tokens: int) -> int:
        """Pages that hold so many tokens of one sequence."""
        return -(-tokens // self.page_size)

    def grow(self, pages: array[int], tokens: int) -> bool:
        """Append pages to a sequence's until they hold `tokens` tokens; all or nothing.

        Returns:
            False, with nothing changed, when too few pages are available.
        """
        missing = -(-tokens // self.page_size) - len(pages)
        if missing <= 0:
            return True
        if missing > self.available:
            return False
        for _ in range(missing):
            page = self._free.pop() if self._free else self._evict()
            self._owners[page] = 1
            pages.append(page)
        return True

    def share(self, pages: Iterable[int]) -> None:
        """Become one more owner of pages that are owned or cached.

        Raises:
            ValueError: a page that is neither.
        """
        for page in pages:
            if not self._owners[page] and page not in self._cached:
                raise ValueError(f"page {page} is shared but holds nothing")
            self._cached.pop(page, None)
            self._owners[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Give up one ownership of each page.

        Raises:
            ValueError: a page that nobody owns, the guard page among them.
        """
        for page in reversed(pages):
            if not GUARD_PAGE < page < self.size or not self._owners[page]:
                raise ValueError(f"page {page} is released but nobody owns it")
            self._owners[page] -= 1
            if not self._owners[page]:
                self._rest(page)

    def owners(self, page: int) -> int:
        """How many hold a page."""
        return self._owners[page]

    def exclusive(self, pages: Iterable[int]) -> int:
        """How many of the pages have a single owner, so that its release makes them available."""
        return sum(self._owners[page] == 1 for page in pages)

    def unowned(self, pages: Iterable[int]) -> int:
        """How many of the pages count as available now."""
        return sum(page in self._cached for page in pages)

    def match(self, chain: Chain, tokens: Sequence[int]) -> list[Node]:
        """The longest run of known pages that hold the beginning of `tokens`; the last token is always left to be computed."""
        return self.index.match(chain, tokens, (len(tokens) - 1) // self.page_size) if self.index is not None else []

    def enter(self, chain: Chain, tokens: Sequence[int], pages: Sequence[int], count: int) -> None:
        """Make the content of a sequence's pages known as far as its first `count` tokens fill them."""
        if self.index is not None and count // self.page_size > chain.entered:
            self.index.enter(chain, tokens, pages, count // self.page_size)

    def poison(self, chain: Chain) -> list[int]:
        """Forget every page that a sequence wrote, and what others computed behind it: none of them is found again. Returns those pages."""
        chain.poisoned = chain.closed = True
        pages = [page for index, node in chain.written if index is self.index for page in index.poison(node)]
        for page in pages:
            if page in self._cached:
                del self._cached[page]
                self._rest(page)
        return pages

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Verify the invariants: free + cached + owned = usable, owners as in `held`, the guard page with nobody, contents known rightly.

        Raises:
            RuntimeError: an invariant is broken.
        """
        counts = [0] * self.size
        for pages in held:
            for page in pages:
                counts[page] += 1
        if counts != self._owners or counts[GUARD_PAGE]:
            raise RuntimeError("a page's owners are not those that hold it, or somebody holds the guard page")
        for page in (*self._free, *self._cached):
            counts[page] += 1
        if counts[GUARD_PAGE] or 0 in counts[1:] or self.size - 1 != self.available + self.size - self._owners.count(0):
            raise RuntimeError("a page is in no state or in two, or the guard page was handed out")
        known = self.index.pages() if self.index is not None else set[int]()
        if not known >= self._cached.keys() or not known.isdisjoint(self._free):
            raise RuntimeError("a cached page's content is not known, or a free one's is")
        if self.index is not None:
            self.index.check()

    def _rest(self, page: int) -> None:
        """Where a page goes that lost its last owner."""
        if self.index is not None and page in self.index:
            self._cached[page] = None
        else:
            if self.index is not None:
                self.index.drop(page)
            self._free.append(page)

    def _evict(self) -> int:
        """Take the cached page that was used longest ago."""
        page, _ = self._cached.popitem(last=False)
        if self.index is not None:
            self.index.drop(page)
        return page
