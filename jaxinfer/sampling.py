"""From logits to tokens: pure functions of logits, per-row settings and per-(request, position) keys, vectorised over rows.

The order is the usual one: penalties, biases and excluded tokens, temperature, top-k, top-p, min-p, then a draw. A token is drawn by
the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014) with noise that depends on the request's seed and the token's position alone,
so that a draw does not depend on what else is in the batch. Filters find their threshold by bisection over the ordered bits of the
float, which is exact, needs no sort and costs 32 reductions. Work that no row asks for is skipped at run time inside the one program.
This file does not know about slots, requests or buckets.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

MAX_TOP = 20
NEVER = float("-inf")
ALL_ALLOWED = np.uint32(0xFFFFFFFF)
NOT_FINITE, IMPOSSIBLE = -1, -2  # in place of a token


def pytree(cls: type) -> Any:
    """Register a dataclass of arrays as a pytree that unflattens without its checks (jax puts other things in it)."""
    names = tuple(f.name for f in fields(cls))

    def unflatten(_: None, children: tuple[Any, ...]) -> Any:
        return unchecked(cls, dict(zip(names, children, strict=True)))

    jax.tree_util.register_pytree_node(cls, lambda value: (tuple(getattr(value, n) for n in names), None), unflatten)
    return cls


def unchecked(cls: type, values: dict[str, Any]) -> Any:
    """A dataclass made without its checks: for descriptions in the place of arrays."""
    made = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


@pytree
@dataclass(frozen=True)
class RowSettings:
    """What each row asks for. `seed` holds two 32-bit halves; `position` is that of the token to be drawn."""

    temperature: Float[Array, " rows"]
    top_p: Float[Array, " rows"]
    min_p: Float[Array, " rows"]
    presence: Float[Array, " rows"]
    frequency: Float[Array, " rows"]
    repetition: Float[Array, " rows"]
    top_k: Int[Array, " rows"]
    logprobs: Int[Array, " rows"]
    seed: UInt32[Array, "rows 2"]
    position: Int[Array, " rows"]


@pytree
@dataclass(frozen=True)
class Sampled:
    """One drawn token per row with its log probability under the unmodified logits (nats) and the most likely alternatives.

    `told` is what the host has to know: the token, `NOT_FINITE` where the row's logits held a NaN or were all infinite, or `IMPOSSIBLE`
    where the row's rules exclude every token. Alternatives are zeros unless a row asked for any.
    """

    token: Int[Array, " rows"]
    told: Int[Array, " rows"]
    logprob: Float[Array, " rows"]
    top_tokens: Int[Array, "rows top"]
    top_logprobs: Float[Array, "rows top"]

    @property
    def finite(self) -> Bool[Array | np.ndarray, " rows"]:
        """Whether the row's logits could be drawn from."""
        return self.told != NOT_FINITE

    @property
    def possible(self) -> Bool[Array | np.ndarray, " rows"]:
        """Whether the row's rules leave a token, where its logits are finite."""
        return self.told != IMPOSSIBLE


def sample(logits: Float[Array, "rows vocab"], adjusted: Float[Array, "rows vocab"], settings: RowSettings) -> Sampled:
    """Draw one token per row from `adjusted` (logits after penalties and rules); log probabilities come from `logits`."""
    finite = jnp.isfinite(jnp.max(logits, axis=-1)) & ~jnp.any(jnp.isnan(logits), axis=-1)
    possible = jnp.max(adjusted, axis=-1) > NEVER
    greedy = likeliest(adjusted)
    drawn = jax.lax.cond(jnp.any(settings.temperature > 0), lambda: draw(filtered(adjusted, settings), settings), lambda: greedy)
    token = jnp.where(settings.temperature > 0, drawn, greedy)
    logprob, top_tokens, top_logprobs = jax.lax.cond(
        jnp.any(settings.logprobs >= 0), lambda: _reported(logits, token), lambda: _not_reported(token, logits.shape[-1])
    )
    told = jnp.where(finite, jnp.where(possible, token, IMPOSSIBLE), NOT_FINITE)
    return Sampled(token=token, told=told, logprob=logprob, top_tokens=top_tokens, top_logprobs=top_logprobs)


def sample_plainly(logits: Float[Array, "rows vocab"], settings: RowSettings | None) -> Sampled:
    """Draw one token per row at its temperature, or (without settings) take the likeliest: no filters, nothing reported, and nothing that
    the device has to decide at run time."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    finite = jnp.isfinite(top[:, 0]) & ~jnp.any(jnp.isnan(logits), axis=-1)
    token = likeliest(logits)
    if settings is not None:
        warm = settings.temperature > 0
        drawn = draw((logits - top) / jnp.where(warm, settings.temperature, 1.0)[:, None], settings)
        token = jnp.where(warm, drawn, token)
    logprob, top_tokens, top_logprobs = _not_reported(token, logits.shape[-1])
    told = jnp.where(finite, token, NOT_FINITE)
    return Sampled(token=token, told=told, logprob=logprob, top_tokens=top_tokens, top_logprobs=top_logprobs)


def penalised(
    logits: Float[Array, "rows vocab"], counts: Int[Array, "rows vocab"], in_prompt: Bool[Array, "rows vocab"], settings: RowSettings
) -> Float[Array, "rows vocab"]:  # fmt: skip
    """Apply the repetition penalty (Keskar et al. 2019: prompt and output) and OpenAI's presence and frequency penalties (output)."""
    produced = counts > 0
    repetition = settings.repetition[:, None]
    logits = jnp.where(in_prompt | produced, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
    return logits - settings.frequency[:, None] * counts.astype(logits.dtype) - settings.presence[:, None] * produced.astype(logits.dtype)


def mask_words(vocab: int) -> int:
    """32-bit words of one row's mask of allowed tokens."""
    return -(-vocab // 32)


def masked(logits: Float[Array, "rows vocab"], mask: UInt32[Array, "rows words"]) -> Float[Array, "rows vocab"]:
    """Logits with -inf where a row's mask has no bit: token t is allowed if bit t % 32 of word t // 32 is set."""
    bits = (mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & jnp.uint32(1)
    return jnp.where(bits.reshape(mask.shape[0], -1)[:, : logits.shape[1]] == 1, logits, NEVER)


def filtered(logits: Float[Array, "rows vocab"], settings: RowSettings) -> Float[Array, "rows vocab"]:
    """Logits over temperature, with -inf where top-k, top-p (Holtzman et al. 2020) or min-p (Nguyen et al. 2024) exclude a token.

    The likeliest token is moved to 0 first: so a tiny temperature sends the others to -inf and nothing to +inf.
    """
    temperature = jnp.where(settings.temperature > 0, settings.temperature, 1.0)
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature[:, None]
    wanted = jnp.any((settings.top_k > 0) | (settings.top_p < 1.0) | (settings.min_p > 0.0))
    return jax.lax.cond(wanted, lambda: _filter(scaled, settings), lambda: scaled)


def draw(logits: Float[Array, "rows vocab"], settings: RowSettings) -> Int[Array, " rows"]:
    """One token per row, distributed as softmax(logits), with noise from the row's seed and position alone."""
    noise = jax.vmap(_noise, in_axes=(0, 0, None))(settings.seed, settings.position, logits.shape[-1])
    return likeliest(logits + noise)


def likeliest(logits: Float[Array, "rows vocab"]) -> Int[Array, " rows"]:
    """Index of each row's first maximum, as two plain reductions: XLA's own argmax is not vectorised on CPUs (4x slower at 16 x 8192)."""
    vocab = logits.shape[-1]
    place = jnp.arange(vocab, dtype=jnp.int32)[None]
    first = jnp.min(jnp.where(logits == jnp.max(logits, axis=-1, keepdims=True), place, vocab), axis=-1)
    return jnp.minimum(first, vocab - 1)


def reported(vocab: int) -> int:
    """How many alternatives a step reports for each row."""
    return min(MAX_TOP, vocab)


def _noise(seed: UInt32[Array, " 2"], position: Int[Array, ""], vocab: int) -> Float[Array, " vocab"]:
    key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
    return jax.random.gumbel(key, (vocab,), jnp.float32)


def _filter(logits: Float[Array, "rows vocab"], settings: RowSettings) -> Float[Array, "rows vocab"]:
    """Top-k first, top-p over what is left, then min-p relative to the likeliest token, whose logit is 0; ties at a threshold are kept."""
    vocab = logits.shape[-1]
    keys = _ordered_bits(logits)
    k = jnp.where(settings.top_k > 0, settings.top_k, vocab)[:, None]
    keep = keys >= _largest(lambda bound: jnp.sum(keys >= bound, axis=-1, keepdims=True) >= k, keys)
    weights = jnp.where(keep, jnp.exp(logits), 0.0)
    target = settings.top_p[:, None] * jnp.sum(weights, axis=-1, keepdims=True)
    nucleus = keys >= _largest(lambda bound: jnp.sum(jnp.where(keys >= bound, weights, 0.0), axis=-1, keepdims=True) >= target, keys)
    keep = keep & (nucleus | (settings.top_p >= 1.0)[:, None])
    keep = keep & (weights >= settings.min_p[:, None])
    return jnp.where(keep, logits, NEVER)


def _ordered_bits(values: Float[Array, "rows vocab"]) -> UInt32[Array, "rows vocab"]:
    """Unsigned integers in the same order as the float32 values."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest(holds: Any, keys: UInt32[Array, "rows vocab"]) -> UInt32[Array, "rows 1"]:
    """The largest bound for which `holds` (true for 0, monotone), bit by bit from the top."""

    def narrow(i: Int[Array, ""], bound: UInt32[Array, "rows 1"]) -> UInt32[Array, "rows 1"]:
        candidate = bound | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(holds(candidate), candidate, bound)

    return jax.lax.fori_loop(0, 32, narrow, jnp.zeros((keys.shape[0], 1), jnp.uint32))


def _reported(logits: Float[Array, "rows vocab"], token: Int[Array, " rows"]) -> tuple[Array, Array, Array]:
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    top_logprobs, top_tokens = jax.lax.top_k(logprobs, reported(logits.shape[-1]))
    return jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0], top_tokens.astype(jnp.int32), top_logprobs


def _not_reported(token: Int[Array, " rows"], vocab: int) -> tuple[Array, Array, Array]:
    shape = (token.shape[0], reported(vocab))
    return jnp.zeros(shape[:1], jnp.float32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
