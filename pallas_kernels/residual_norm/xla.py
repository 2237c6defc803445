"""The sum and its norm in plain XLA: what they mean is already the form that compilers make one or two loops of."""

from jaxtyping import Array, Float

from pallas_kernels.residual_norm import reference
from pallas_kernels.residual_norm.reference import Normed


def residual_norm(
    x: Float[Array, "tokens features"],
    added: Float[Array, "tokens features"] | None,
    weight: Float[Array, "features"],
    *,
    epsilon: float,
    offset: float,
) -> Normed:
    """See api.residual_norm."""
    return reference.residual_norm(x, added, weight, epsilon=epsilon, offset=offset)
