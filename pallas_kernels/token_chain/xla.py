"""A chain in plain XLA: what it means, link by link. Whoever wants its links as fast as XLA has them calls the ops of each."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.token_chain import reference
from pallas_kernels.token_chain.reference import Form, Weight


def token_chain(
    x: Float[Array, "tokens in"],
    held: Float[Array, "tokens features"],
    weights: Sequence[Weight],
    norms: Sequence[Float[Array, "_"] | None],
    *,
    forms: tuple[Form, ...],
    activations: str = "float",
    counters: Any = None,
) -> tuple[Array, Array]:
    """See api.token_chain."""
    del counters
    return reference.token_chain(x, held, weights, norms, forms=forms, activations=activations)
