"""The sum and its norm on Hopper GPUs (Pallas Mosaic GPU): one kernel for one token, where XLA makes a reduction and a loop of it.

A warpgroup has a token, whose features stay in its registers from the first load to the last store: x, what is added and the weight are
on their way at once, the squares are summed over the warpgroup, and the sum and its norm are written. So a token depends on nothing else.
From two tokens on XLA (seen with jax 0.11.2) makes one kernel of the norm, too, and takes the sum into it or into the one before.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import dispatch, hopper, tuning
from pallas_kernels.residual_norm import xla
from pallas_kernels.residual_norm.api import key_of
from pallas_kernels.residual_norm.reference import Normed

THREADS = 128
MOST = 1  # tokens, unless measured otherwise
WIDEST = 8192  # features that fit the registers three times
VECTOR = 8  # features that a thread loads at once


class Sizes(NamedTuple):
    """Features that a thread loads at once; 0 leaves a shape to XLA."""

    vector: int


XLA = Sizes(0)


def refusal(target: dispatch.Target, key: dispatch.Key) -> str | None:
    """Why this cannot run on a target, or for what is known of a key; None when it can."""
    reason = hopper.refusal(target, {"dtype": key.get("dtype", "bfloat16")})
    features = int(key.get("features", THREADS))
    if reason is None and features % THREADS:
        return f"its kernel needs features in multiples of {THREADS}, not {features}"
    return reason


def heuristic(platform: str, key: dispatch.Key) -> dict[str, int]:
    """Sizes that were never measured."""
    few = int(key["tokens"]) <= MOST and int(key["features"]) <= WIDEST
    return (_vectorised(key) if few else XLA)._asdict()


def candidates(platform: str, key: dispatch.Key) -> list[dict[str, int]]:
    """Sizes worth measuring."""
    return [sizes._asdict() for sizes in (_vectorised(key), XLA)]


def _vectorised(key: dispatch.Key) -> Sizes:
    return Sizes(math.gcd(int(key["features"]) // THREADS, VECTOR))


def residual_norm(
    x: Float[Array, "tokens features"],
    added: Float[Array, "tokens features"] | None,
    weight: Float[Array, "features"],
    *,
    epsilon: float,
    offset: float,
) -> Normed:
    """See api.residual_norm."""
    sizes = Sizes(**tuning.sizes("residual_norm", "gpu", dispatch.target(), key_of(x, added)))
    if sizes == XLA or x.shape[0] == 0:
        return xla.residual_norm(x, added, weight, epsilon=epsilon, offset=offset)
    return _one_kernel(x, added, weight, sizes=sizes, epsilon=epsilon, offset=offset, interpreted=hopper.interpreting())


@partial(jax.jit, static_argnames=("sizes", "epsilon", "offset", "interpreted"))
def _one_kernel(
    x: Float[Array, "tokens features"],
    added: Float[Array, "tokens features"] | None,
    weight: Float[Array, "features"],
    *,
    sizes: Sizes,
    epsilon: float,
    offset: float,
    interpreted: bool,
) -> Normed:
    """Compiled as a function, so that a model's layers lower it once. interpreted only keeps traces for the interpreter apart."""
    tokens, features = x.shape
    row = jax.ShapeDtypeStruct(x.shape, x.dtype)
    run = plgpu.kernel(
        hopper.named(partial(_body, plgpu.Layout.WG_STRIDED((features,), vec_size=sizes.vector), epsilon, offset), __name__),
        out_type=(row,) if added is None else (row, row),
        grid=(tokens,),
        grid_names=("token",),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=hopper.REDUCTION_BYTES),
        interpret=hopper.interpretation(),
    )
    normed, *total = run(x, weight) if added is None else run(x, weight, added)
    return Normed(normed, total[0] if total else x)


def _body(layout: Any, epsilon: float, offset: float, x: Any, weight: Any, *rest: Any) -> None:
    """rest: what is added, if anything, and the outputs."""
    token = lax.axis_index("token")
    total, factors = hopper.load(x.at[token], layout), hopper.load(weight, layout)
    if len(rest) == 3:
        added, normed, sums = rest
        total = total + hopper.load(added.at[token], layout)
        sums[token] = total
    else:
        (normed,) = rest
    wide = total.astype(jnp.float32)
    scaled = wide * lax.rsqrt(jnp.sum(wide * wide) * (1.0 / wide.shape[0]) + epsilon)
    if offset:
        normed[token] = (scaled * (factors.astype(jnp.float32) + offset)).astype(normed.dtype)
    else:
        normed[token] = scaled.astype(normed.dtype) * factors
