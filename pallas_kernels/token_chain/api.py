"""Tokens through matmuls that follow one another, norms of the residual stream between them: signature, checks, choice.

What a layer does behind its attention, and the first matmul of the next layer, is such a chain. Of few tokens, separate kernels each wait
for the one before to end; in one kernel the next weight is on its way by then. Of many with int8 inputs, what is between two matmuls is
read and written several times over as separate passes, and takes half as long as the matmuls do.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.checks import describe, require, require_dtype, require_shape
from pallas_kernels.token_chain.reference import Form, Weight

OP = "token_chain"
OF_SEVERAL, MOST = "bfloat16", {"bfloat16": 64, "int8": 16}  # dtype of several tokens, and how many kernels take, by that of weights
FEW = 64  # tokens whose int8 matmuls wait for their weights: what is between them is little


class Chained(NamedTuple):
    """What the last matmul gives, and the residual stream with everything added but that."""

    out: Float[Array, "tokens out"]
    total: Float[Array, "tokens features"]


def token_chain(
    x: Float[Array, "tokens in"],
    held: Float[Array, "tokens features"],
    weights: Sequence[Weight],
    norms: Sequence[Float[Array, "_"] | None],
    *,
    forms: tuple[Form, ...],
    activations: Literal["float", "int8"] = "float",
    counters: Any = None,
    implementation: str = "auto",
) -> Chained:
    """For each link: where it has a norm, what there is so far is added to the residual stream `held`, and the sum's root mean square norm
    goes on; then comes the matmul, y = (x * smooth) @ (values * scales).T (scales None: values of x's dtype, else int8); where the form is
    gated, silu of y's first half times its second half. Sums are float32, every result is rounded to x's dtype.

    activations "int8" takes int8 weights with a smooth or without (SmoothQuant, arXiv 2211.10438): each token's inputs of a matmul are
    rounded to int8 with the scale max|x| / 127 (LLM.int8, arXiv 2208.07339). Any number of tokens is right; kernels know one token, up to
    `MOST` of them in `OF_SEVERAL`, and many with "int8" (`joins`). A token's result depends on that token, the weights and
    the static shapes alone. counters: the program's, see `hopper_counters`; None: chains of this program must not run at the same time by
    themselves. Raises ValueError when shapes or dtypes do not fit.
    """
    check(x, held, weights, norms, forms, activations)
    module = dispatch.resolve(OP, implementation, dispatch.target(), key_of(x, weights, activations))
    settings = {"forms": forms, "activations": activations, "counters": counters}
    return Chained(*module.token_chain(x, held, weights, norms, **settings))


def joins(x: Array, weights: Sequence[Weight], activations: str, implementation: str) -> bool:
    """Whether some kernel would know several of these links, so that they need not go one after another all the same."""
    target, known = dispatch.target(), key_of(x, weights, activations)
    if activations == "int8" and x.shape[0] <= FEW:
        return False
    several = activations == "float" and x.shape[0] != 1
    if several and not (x.shape[0] <= MOST.get(str(known["weight"]), 0) and known["dtype"] == OF_SEVERAL):
        return False
    if implementation == "auto":
        return target.platform == "gpu" and dispatch.choose(OP, implementation, target, known) == "gpu"
    if implementation != "gpu" or dispatch.by_name(OP, implementation, known) is not None:  # asked for by name links go one by one
        return False
    return dispatch.refusal(OP, implementation, target, known) is None


def key_of(x: Array, weights: Sequence[Weight], activations: str = "float") -> dispatch.Key:
    """What there is to know of a call: "weight" is "mixed" where not all links are alike."""
    kinds = {(weight.values.dtype.name, weight.scales is None) for weight in weights}
    kind = weights[0].values.dtype.name if len(kinds) == 1 else "mixed"
    shapes: dispatch.Key = {
        f"{name}{number}": size for number, w in enumerate(weights) for name, size in zip(("out", "in"), w.values.shape, strict=True)
    }
    known = {"tokens": x.shape[0], "dtype": x.dtype.name, "weight": kind, "activations": activations, "links": len(weights)}
    return known | shapes


def check(
    x: Array, held: Array, weights: Sequence[Weight], norms: Sequence[Array | None], forms: Sequence[Form], activations: str = "float"
) -> None:
    """Refuse arguments that do not fit together (ValueError)."""
    require(activations in ("float", "int8"), OP, f"activations is {activations!r}", "it must be 'float' or 'int8'")
    require(x.ndim == 2, OP, f"x is {describe(x)}", "it must have shape [tokens, in]")
    require(jnp.issubdtype(x.dtype, jnp.floating), OP, f"x is {describe(x)}", "it must be of a floating dtype")
    fits = held.ndim == 2 and held.shape[0] == x.shape[0]
    require(fits, OP, f"held is {describe(held)}", "it must have shape [tokens, features], as many tokens as x has")
    require_dtype(OP, "held", held, x.dtype, "that of x")
    counts, wanted = {len(weights), len(norms), len(forms)}, "one of each is wanted for a link"
    require(len(counts) == 1 and counts != {0}, OP, f"there are {sorted(counts)} weights, norms, forms", wanted)
    width = x.shape[1]
    for number, (weight, norm, form) in enumerate(zip(weights, norms, forms, strict=True)):
        if norm is not None:
            require(width == held.shape[1], OP, f"link {number} adds {width} numbers", f"the residual stream has {held.shape[1]}")
            require_shape(OP, f"norms[{number}]", norm, (width,), "features")
            require_dtype(OP, f"norms[{number}]", norm, x.dtype, "that of x")
        _check_weight(f"weights[{number}]", weight, width, x.dtype, activations)
        outputs = weight.values.shape[0]
        even = not form.gated or outputs % 2 == 0
        require(even, OP, f"weights[{number}] is {describe(weight.values)}", "a gated link has two equal halves")
        width = outputs // (2 if form.gated else 1)


def _check_weight(name: str, weight: Weight, width: int, dtype: Any, activations: str) -> None:
    values, scales, smooth = weight
    require(values.ndim == 2, OP, f"{name} is {describe(values)}", "it must have shape [out, in]")
    require_shape(OP, name, values, (values.shape[0], width), "out, in: what the link before gives")
    require(scales is not None or activations == "float", OP, f"{name} has no scales", "weights that meet int8 inputs are int8")
    require(smooth is None or activations == "int8", OP, f"{name} has a smooth", "it makes inputs easier to round: it belongs to 'int8'")
    if scales is None:
        require_dtype(OP, name, values, dtype, "that of x, where there are no scales")
    else:
        require_dtype(OP, name, values, jnp.int8, "int8, where there are scales")
        require_shape(OP, f"{name}.scales", scales, (values.shape[0], 1), "out, 1")
    if smooth is not None:
        require_shape(OP, f"{name}.smooth", smooth, (width,), "in")
