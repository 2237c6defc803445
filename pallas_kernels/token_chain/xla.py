"""A chain in plain XLA: what it means, link by link. Whoever wants its links as fast as XLA has them calls the ops of each."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Float, Shaped

from pallas_kernels.token_chain import reference
from pallas_kernels.token_chain.reference import Form


def token_chain(
    x: Float[Array, "1 in"],
    held: Float[Array, "1 features"],
    weights: Sequence[Shaped[Array, "_ _"]],
    scales: Sequence[Float[Array, "_ 1"] | None],
    norms: Sequence[Float[Array, "_"] | None],
    *,
    forms: tuple[Form, ...],
    counters: Any = None,
) -> tuple[Array, Array]:
    """See api.token_chain."""
    del counters
    return reference.token_chain(x, held, weights, scales, norms, forms=forms)
