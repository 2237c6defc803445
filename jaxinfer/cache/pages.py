"""Which KV pages belong to whom: plain Python counting, no arrays.

A pool has `size` pages numbered from 0. Page 0 is the guard page: padding is written there and nobody owns it. Every other page
is either free or owned by exactly one sequence. This file does not know what a page holds, nor when the device is done with it:
whoever releases a page says so only after the last step that read it is committed.
"""

from __future__ import annotations

from collections.abc import Sequence

GUARD_PAGE = 0


class PagePool:
    """The free pages of one data replica; the page released last is handed out first, so that a small load stays in few pages.

    Raises:
        ValueError: fewer than two pages (the guard page and one to use).
    """

    def __init__(self, size: int, page_size: int) -> None:
        if size < 2:
            raise ValueError(f"a pool of {size} pages has none to use beside the guard page; at least 2 are needed")
        self.size = size
        self.page_size = page_size
        self._free = list(range(size - 1, GUARD_PAGE, -1))
        self._owned = bytearray(size)

    @property
    def free(self) -> int:
        """Pages that can be handed out now."""
        return len(self._free)

    @property
    def owned(self) -> int:
        """Pages that sequences hold."""
        return self.size - 1 - len(self._free)

    @property
    def capacity(self) -> int:
        """Tokens that all usable pages hold together."""
        return (self.size - 1) * self.page_size

    def needed(self, tokens: int) -> int:
        """Pages that hold so many tokens of one sequence."""
        return -(-tokens // self.page_size)

    def grow(self, pages: list[int], tokens: int) -> bool:
        """Append pages to a sequence's list until it holds `tokens` tokens; all or nothing.

        Returns:
            False, with nothing changed, when too few pages are free.
        """
        missing = self.needed(tokens) - len(pages)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            page = self._free.pop()
            self._owned[page] = 1
            pages.append(page)
        return True

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back.

        Raises:
            ValueError: a page that nobody owns, the guard page among them.
        """
        for page in pages:
            if not GUARD_PAGE < page < self.size or not self._owned[page]:
                raise ValueError(f"page {page} is released but nobody owns it")
            self._owned[page] = 0
            self._free.append(page)

    def check(self) -> None:
        """Verify the invariants: free + owned = usable, no page twice, the guard page with nobody.

        Raises:
            RuntimeError: an invariant is broken.
        """
        free = set(self._free)
        if len(free) != len(self._free) or GUARD_PAGE in free or self._owned[GUARD_PAGE]:
            raise RuntimeError("a page is free twice, or the guard page was handed out")
        if any(self._owned[page] == (page in free) for page in range(1, self.size)):
            raise RuntimeError("a page is both free and owned, or neither")
