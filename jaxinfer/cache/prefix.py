"""Which page holds which text: the index of full KV pages that lets requests with a common beginning share them. Plain Python.

The K and V of a token depend on every token before it, so a page's content is named by its whole beginning: a *node* is one page of
token ids behind its parent node, and a root stands for what is not text (model, adapter, dtype, salt). Nodes are found by a SHA-256 that is
chained over (parent's digest, token ids); because nodes know their parents and token ids are compared as well, two texts with the
same digest are still told apart: the second is simply not kept. A node outlives its page for as long as a child of it has one.
Life of a page here: `enter` when its tokens are known and their step is scheduled, `match` as often as somebody has the same
beginning, `drop` when the pool needs the page for something else, or `poison` when what was written there is not to be trusted.
This file does not know who owns a page or which is evicted next (`pages.py`).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from itertools import islice, takewhile

NO_PAGE = -1
Digest = Callable[[bytes], bytes]


def sha256(data: bytes) -> bytes:
    """The digest that names contents."""
    return hashlib.sha256(data).digest()


class Node:
    """One page of text behind its parent. `page` is NO_PAGE when no page holds it; `alive` ends when the index lets it go.

    content: the token ids as bytes (an index holds many, and the garbage collector need not look into bytes). children: how many.
    """

    __slots__ = ("alive", "children", "content", "digest", "page", "parent")

    def __init__(self, parent: Node | None, digest: bytes, content: bytes = b"") -> None:
        self.parent = parent
        self.digest = digest
        self.content = content
        self.page = NO_PAGE
        self.children = 0
        self.alive = True


@dataclass(eq=False)
class Chain:
    """One sequence's way through an index: digests of its full pages (computed once), and how many of its own pages are entered.

    context: what is hashed before the first token. indexes: where it is looked up. found: what was there last. borrowed: its first pages
    that others wrote. written: nodes that hold pages which this sequence wrote, in any tenure. closed: nothing more is entered, because of
    a collision (until `restart`) or because the sequence is kept apart for good (`poisoned`): its content is not to be trusted, or it is
    to leave no trace. reused: tokens that were found computed when the tenure began.
    """

    context: tuple[str, ...]
    indexes: tuple[PrefixIndex, ...] = ()
    digests: list[bytes] = field(default_factory=list)
    found: dict[PrefixIndex, list[Node]] = field(default_factory=dict)
    node: Node | None = None
    entered: int = 0
    borrowed: int = 0
    written: list[tuple[PrefixIndex, Node]] = field(default_factory=list)
    closed: bool = False
    reused: int = 0
    poisoned: bool = False

    def longest(self, tokens: Sequence[int]) -> int:
        """How many of the tokens, the last one aside, stand in the pages of the index that knows most of them."""
        return max(
            (index.page_size * len(index.match(self, tokens, (len(tokens) - 1) // index.page_size)) for index in self.indexes), default=0
        )

    def restart(self, node: Node | None = None, borrowed: int = 0) -> None:
        """Begin a new tenure, perhaps in another index, behind pages that were found there (`node` is the last) or that a sibling wrote."""
        self.node, self.entered, self.closed = node, borrowed if node else 0, self.poisoned
        self.borrowed = borrowed
        self.found.clear()


class PrefixIndex:
    """The contents of one pool's pages. model: what all of them are computed with. `digest` is replaced in tests that force collisions."""

    def __init__(self, page_size: int, model: tuple[str, ...] = (), digest: Digest = sha256) -> None:
        self.page_size = page_size
        self._model = model
        self._digest = digest
        self._roots: dict[tuple[str, ...], Node] = {}
        self._nodes: dict[bytes, Node] = {}
        self._pages: dict[int, Node] = {}
        self._bad: set[int] = set()
        self._checked = 0

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, page: int) -> bool:
        return page in self._pages

    def node(self, page: int) -> Node:
        """The content of a page that is in the index."""
        return self._pages[page]

    def match(self, chain: Chain, tokens: Sequence[int], most: int) -> list[Node]:
        """The longest run of pages, at most `most`, that hold the beginning of `tokens`."""
        parent, size = self._roots.get(chain.context), self.page_size
        if parent is None or chain.poisoned:
            return []
        before = chain.found.get(self, [])  # compared then, and a node's content never changes
        found = list(takewhile(lambda node: node.alive and node.page != NO_PAGE, before[:most]))
        for number in range(len(found), most):
            node = self._find(found[-1] if found else parent, self._name(chain, tokens, number), _content(tokens, number, size))
            if node is None or node.page == NO_PAGE:
                break
            found.append(node)
        chain.found[self] = found
        return found

    def enter(self, chain: Chain, tokens: Sequence[int], pages: Sequence[int], full: int) -> None:
        """Make a sequence's first `full` pages known; those whose content another page holds already stay unknown.

        Who wrote a page makes it known, nobody else: so `written` is all that a poisoned sequence takes with it.
        """
        if chain.closed:
            return
        parent = chain.node
        if parent is None or not parent.alive:
            parent, chain.entered = self._root(chain), 0
        for number in range(chain.entered, full):
            node = self._child(chain, parent, tokens, number) if self._may_enter(chain, pages[number], number) else None
            if node is None:
                chain.closed = True
                break
            if node.page == NO_PAGE and pages[number] not in self._pages:
                node.page = pages[number]
                self._pages[node.page] = node
                chain.written.append((self, node))
            parent, chain.entered = node, number + 1
        chain.node = parent
        self._prune(parent)

    def drop(self, page: int) -> None:
        """Forget the content of a page, for example because it gets another one."""
        self._bad.discard(page)
        node = self._pages.pop(page, None)
        if node is not None:
            node.page = NO_PAGE
            self._prune(node)

    def poison(self, node: Node) -> list[int]:
        """Forget a node and everything that was computed behind it; returns their pages, not entered again before a `drop`."""
        if not node.alive:
            return []
        pages = sorted(member.page for member in self._behind(node) if member.page != NO_PAGE)
        for page in pages:
            self.drop(page)
        self._bad.update(pages)
        return pages

    def pages(self) -> Set[int]:
        """Every page whose content is known."""
        return self._pages.keys()

    def check(self) -> None:
        """Verify that pages and nodes agree; of the digests one is computed again at each call, in rotation.

        Raises:
            RuntimeError: they do not.
        """
        for page, node in self._pages.items():
            if node.page != page or not node.alive or self._nodes.get(node.digest) is not node:
                raise RuntimeError(f"page {page} and the content it is known by disagree")
        if not self._bad.isdisjoint(self._pages) or (not self._pages and (self._nodes or self._roots)):
            raise RuntimeError("contents are known that are not to be trusted, or that no page holds")
        if self._pages:
            self._checked = (self._checked + 1) % len(self._pages)
            node = next(islice(self._pages.values(), self._checked, None))
            if node.parent is None or node.digest != self._digest(node.parent.digest + node.content):
                raise RuntimeError(f"page {node.page} stands under a digest that is not its content's")

    def _may_enter(self, chain: Chain, page: int, number: int) -> bool:
        """Whether nothing speaks against the content of a sequence's page `number`; what others wrote they must have made known."""
        return page in self._pages if number < chain.borrowed else page not in self._bad

    def _root(self, chain: Chain) -> Node:
        root = self._roots.get(chain.context)
        if root is None:
            root = self._roots[chain.context] = Node(None, self._base(chain))
        return root

    def _child(self, chain: Chain, parent: Node, tokens: Sequence[int], number: int) -> Node | None:
        """The node of a page, made if it is new; None when another content has its digest."""
        digest, content = self._name(chain, tokens, number), _content(tokens, number, self.page_size)
        if digest in self._nodes:
            return self._find(parent, digest, content)
        node = self._nodes[digest] = Node(parent, digest, content)
        parent.children += 1
        return node

    def _find(self, parent: Node, digest: bytes, content: bytes) -> Node | None:
        node = self._nodes.get(digest)
        return node if node is not None and node.parent is parent and node.content == content else None

    def _name(self, chain: Chain, tokens: Sequence[int], number: int) -> bytes:
        """Digest of page `number` of a sequence; what is missing of the chain is computed and kept."""
        digests, size = chain.digests, self.page_size
        if not digests:
            digests.append(self._base(chain))
        for at in range(len(digests) - 1, number + 1):
            digests.append(self._digest(digests[at] + _content(tokens, at, size)))
        return digests[number + 1]

    def _base(self, chain: Chain) -> bytes:
        return self._digest(repr((self._model, chain.context)).encode())

    def _behind(self, node: Node) -> set[Node]:
        """The node and all behind it; a parent is always older than its children."""
        found = {node}
        for member in self._nodes.values():
            if member.parent in found:
                found.add(member)
        return found

    def _prune(self, node: Node) -> None:
        """Let go of a node that holds no page and leads to none, and then perhaps of its parent."""
        while node.page == NO_PAGE and not node.children and node.alive:
            node.alive = False
            if node.parent is None:
                self._roots = {context: root for context, root in self._roots.items() if root is not node}
                return
            del self._nodes[node.digest]
            node.parent.children -= 1
            node = node.parent


def _content(tokens: Sequence[int], number: int, size: int) -> bytes:
    """Token ids of one page."""
    return array("i", tokens[number * size : (number + 1) * size]).tobytes()
