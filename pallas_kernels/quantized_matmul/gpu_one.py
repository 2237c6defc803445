"""One token times an int8 weight with a scale for each row, on Hopper GPUs: a kernel of one link (`hopper_links`).

The weight goes from shared memory to the tensor cores as it is stored and meets the token's limbs (`hopper_token.Limbs`): nothing converts
it.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from pallas_kernels import dispatch, hopper_folds, hopper_links
from pallas_kernels.hopper_folds import SLOTS, Link, Sizes
from pallas_kernels.hopper_token import THREADS

SIZES = Sizes(SLOTS[0])


def fits(key: dispatch.Key) -> bool:
    """Whether this is the product of a key; not for one that does not tell everything."""
    known = {"tokens": 1, "weight": "int8", "group": 0, "activations": "float"}
    if any(key.get(name) != value for name, value in known.items()) or key.get("dtype") not in ("bfloat16", "float16"):
        return False
    link = Link(int(key["in"]), int(key["out"]))
    return link.inputs > 0 and link.inputs % THREADS == 0 and bool(hopper_folds.folds(link, jnp.int8, SIZES.slot))


def multiply(
    x: Float[Array, "1 in"], weight: Int8[Array, "out in"], scales: Float[Array, "out 1"], *, out_dtype: jnp.dtype
) -> Float[Array, "1 out"]:
    """x @ (weight * scales).T for what `fits`."""
    outputs, inputs = weight.shape
    plan = hopper_folds.plan_of([Link(inputs, outputs)], x.dtype, weight.dtype, SIZES, out_dtype)
    out, _ = hopper_links.run(x.reshape(-1), None, [weight], [scales.reshape(-1)], [None], None, plan=plan)
    return out[None]
