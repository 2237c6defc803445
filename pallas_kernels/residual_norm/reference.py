"""What the sum and its norm mean."""

from typing import NamedTuple

from jaxtyping import Array, Float

from pallas_kernels.norm import rms_norm


class Normed(NamedTuple):
    """The sum and its norm; `normed` first, for what is compared first."""

    normed: Float[Array, "tokens features"]
    total: Float[Array, "tokens features"]


def residual_norm(
    x: Float[Array, "tokens features"],
    added: Float[Array, "tokens features"] | None,
    weight: Float[Array, "features"],
    *,
    epsilon: float,
    offset: float = 0.0,
) -> Normed:
    """See api.residual_norm."""
    total = x if added is None else x + added
    return Normed(rms_norm(total, weight, epsilon=epsilon, offset=offset), total)
