"""A whole weight quantised in one call, for what has it in memory; the loader does the same piece by piece."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from jaxinfer.quant.find import find_scheme
from jaxinfer.quant.qarray import QArray, QSpec
from jaxinfer.sharding import ArraySpec


def quantise(weight: Shaped[np.ndarray, "..."], contracting: int, scheme: str) -> QArray:
    """A weight [out.., in..] with `contracting` trailing dimensions that a matmul sums over.

    Raises:
        ConfigError: a scheme that does not exist or does not take this shape.
        ValueError: a weight that holds NaN or infinity.
    """
    spec = find_scheme(scheme).describe(ArraySpec(weight.shape, weight.dtype, (None,) * weight.ndim), contracting)
    return quantise_as(weight, spec)


def quantise_as(weight: Shaped[np.ndarray, "..."], spec: QSpec) -> QArray:
    """A weight as a scheme described it, which may not ask for more than values and scales.

    Raises:
        ValueError: a weight that holds NaN or infinity, or a description with zeros or smooth, which no scheme finds by itself.
    """
    if len(spec.arrays) > 2:
        raise ValueError("zeros and smooth come from a checkpoint or from calibration, not from the weight alone")
    scheme = find_scheme(spec.scheme)
    scales = scheme.scales(weight, spec.blocks)
    return spec.make([jnp.asarray(scheme.values(weight, scales)), jnp.asarray(scales)])
