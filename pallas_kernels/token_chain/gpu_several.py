"""What the kernels of several tokens share on the host's side: tokens filled up, a norm in front of the first link, the interpreter, which
runs links one by one."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import hopper, hopper_counters
from pallas_kernels.hopper_folds import Link
from pallas_kernels.norm import rms_norm
from pallas_kernels.token_chain.reference import Weight


class Kernel(NamedTuple):
    """padded: how many tokens are computed for so many; plan: of links, and so many tokens; launch: (x, held, weights, norms, counters,
    plan=, interpreted=), held None where no norm comes; the last link's results, and the residual stream or None."""

    padded: Callable[[int], int]
    plan: Callable[[Sequence[Link], int], Any]
    launch: Callable[..., tuple[Array, Array | None]]


def run(
    kernel: Kernel,
    x: Float[Array, "tokens in"],
    held: Float[Array, "tokens features"],
    weights: Sequence[Weight],
    norms: Sequence[Float[Array, "_"] | None],
    links: Sequence[Link],
    counters: Any,
) -> tuple[Array, Array]:
    """The last link's results, and the residual stream behind the last norm. counters: the program's (`hopper_counters`)."""
    tokens, links, norms = x.shape[0], list(links), list(norms)
    value, total = (jnp.pad(each, ((0, kernel.padded(tokens) - tokens), (0, 0))) for each in (x, held))
    if norms[0] is not None:
        value, total = _normed(value, total, norms[0], links[0])
        links[0], norms[0] = links[0]._replace(epsilon=None), None
    if hopper.interpreting():
        for weight, norm, link in zip(weights, norms, links, strict=True):
            if norm is not None:
                value, total = _normed(value, total, norm, link)
            plan = kernel.plan([link._replace(epsilon=None)], value.shape[0])
            value, _ = kernel.launch(value, None, [weight], (), None, plan=plan, interpreted=True)
        return value[:tokens], total[:tokens]
    plan, found = kernel.plan(links, value.shape[0]), tuple(norm for norm in norms if norm is not None)
    shared = hopper_counters.made() if counters is None else counters
    value, stream = kernel.launch(value, total if found else None, weights, found, shared, plan=plan, interpreted=False)
    return value[:tokens], (total if stream is None else stream)[:tokens]


def _normed(value: Array, total: Array, norm: Array, link: Link) -> tuple[Array, Array]:
    """What a link with a norm is given, outside of the kernel, and the residual stream."""
    total = total + value
    return rms_norm(total, norm, epsilon=link.epsilon or 0.0, offset=link.offset), total
