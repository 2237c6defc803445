"""What `hopper_tiles` asks of its callers: where a tile's queries and its blocks of keys and values lie in memory."""

from typing import Any, NamedTuple, Protocol


class Tile(NamedTuple):
    """A tile for one head: number in the list and place among the queries, first token's position, the blocks of keys that it sees."""

    number: Any
    place: Any
    head: Any
    row: Any
    first: Any
    begin: Any
    end: Any
    stop: Any


class Queries(Protocol):
    """How a warpgroup's lines lie in memory; results lie the same way."""

    @property
    def tokens(self) -> int:
        """Tokens of a warpgroup."""
        ...

    @property
    def copies(self) -> int:
        """Copies that bring a warpgroup's lines."""
        ...

    def token(self, line: Any) -> Any:
        """Which of the warpgroup's tokens each line holds."""
        ...

    def load(self, array: Any, tile: Tile, warpgroup: int, into: Any, barrier: Any) -> None:
        """Start copying a warpgroup's lines into shared memory; each copy arrives at the barrier once."""
        ...

    def store(self, lines: Any, tile: Tile, warpgroup: Any, array: Any) -> None:
        """Start copying a warpgroup's results from shared memory."""
        ...


class Keys(Protocol):
    """How blocks of keys and values lie in memory."""

    def copies(self, keys: int) -> int:
        """Copies that bring a block of keys, or one of values."""
        ...

    def find(self, arrays: tuple[Any, ...], tile: Tile, block: Any, keys: int) -> Any:
        """Where a tile's block lies."""
        ...

    def copy(self, arrays: tuple[Any, ...], place: Any, which: int, into: Any, barrier: Any) -> None:
        """Start copying a block's keys (which=0) or values (1) into shared memory; each copy arrives at the barrier once."""
        ...
