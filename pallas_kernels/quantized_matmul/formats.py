"""What implementations of the quantised matmul share: names of formats, halves of bytes, blocks of scales."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped, UInt8

PACKED = jnp.dtype(jnp.uint8)
ZERO = 8  # of 4 bits, where no zeros are given
NAMES = {"int8": "int8", "float8_e4m3fn": "fp8", "uint8": "int4"}


class Format(NamedTuple):
    """How a weight is quantised: "int8", "fp8" or "int4"; outputs and inputs (0: all of a row) of a block; "float" or "int8" inputs."""

    weight: str
    outputs: int
    inputs: int
    activations: str

    @classmethod
    def of(cls, weight: Shaped[Array, "out stored"], scales: Shaped[Array, "outs ins"], activations: str) -> "Format":
        """Of arrays that fit together."""
        features = weight.shape[1] * (2 if weight.dtype == PACKED else 1)
        inputs = features // scales.shape[1] if scales.shape[1] > 1 else 0
        return cls(NAMES[weight.dtype.name], weight.shape[0] // scales.shape[0], inputs, activations)

    def key(self, x: Float[Array, "tokens in"], weight: Shaped[Array, "out stored"]) -> dict[str, int | str]:
        """All that the choice of an implementation and its sizes depend on."""
        shape = {"tokens": x.shape[0], "in": x.shape[1], "out": weight.shape[0], "dtype": x.dtype.name}
        return shape | {"weight": self.weight, "group": self.inputs, "rows": self.outputs, "activations": self.activations}


class Halves(NamedTuple):
    """The two numbers in each byte: those of even inputs and those of odd ones."""

    even: UInt8[Array, "out half"]
    odd: UInt8[Array, "out half"]


def halves(weight: UInt8[Array, "out half"]) -> Halves:
    """Both numbers of each byte."""
    return Halves(weight & 15, weight >> 4)


def spread(per_block: Shaped[Array, "outs ins"], shape: tuple[int, int]) -> Shaped[Array, "out in"]:
    """One number per block, repeated over a weight [out, in]."""
    rows, columns = (size // count for size, count in zip(shape, per_block.shape, strict=True))
    return jnp.repeat(jnp.repeat(per_block, rows, axis=0), columns, axis=1)
