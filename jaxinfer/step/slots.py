"""State of running sequences that stays on the device: settings of the sampler, last token, how often each token occurred.

`pack_admission` turns a sequence that enters a slot into one int32 buffer, `admit` writes it into the slot inside a small compiled
program of its own, `record` notes what a step sampled. The last slot is a spare one for padding rows. Nothing here is ever read
back by the host. This file does not know how settings are applied (`sampling.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.batch import Admission
from jaxinfer.request import MAX_LOGIT_BIAS, MAX_STOP_TOKENS, SamplingParams
from jaxinfer.sampling import RowSettings, pytree, unchecked

HELD = 2 * MAX_STOP_TOKENS
NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
INTEGERS = ("slot", "prompt_length", "length", "min_position", "top_k", "logprobs", "seed_low", "seed_high", "last_token")
NO_TOKEN = np.int32(2**31 - 1)  # an index past any vocabulary: scatters drop it


@pytree
@dataclass(frozen=True)
class Slots:
    """Per-slot state. `bias_tokens`, `held_tokens` are padded with `NO_TOKEN`; held ones are excluded below `min_position`."""

    last_token: Int[Array, " slots"]
    counts: Int[Array, "slots vocab"]
    in_prompt: Bool[Array, "slots vocab"]
    numbers: Float[Array, "slots numbers"]
    integers: Int[Array, "slots integers"]
    bias_tokens: Int[Array, "slots bias"]
    bias_values: Float[Array, "slots bias"]
    held_tokens: Int[Array, "slots held"]


def describe(slots: int, vocab: int) -> Slots:
    """Shapes and dtypes of the state for so many slots (the spare one included)."""
    shape = jax.ShapeDtypeStruct
    return unchecked(Slots, {
        "last_token": shape((slots,), jnp.int32),
        "counts": shape((slots, vocab), jnp.int32),
        "in_prompt": shape((slots, vocab), jnp.bool_),
        "numbers": shape((slots, len(NUMBERS)), jnp.float32),
        "integers": shape((slots, len(INTEGERS)), jnp.int32),
        "bias_tokens": shape((slots, MAX_LOGIT_BIAS), jnp.int32),
        "bias_values": shape((slots, MAX_LOGIT_BIAS), jnp.float32),
        "held_tokens": shape((slots, HELD), jnp.int32),
    })  # fmt: skip


def neutral(slots: int, vocab: int) -> Slots:
    """The state of slots that nobody uses, on the host: padding rows read it, and must not wake the sampler's optional work."""
    state = jax.tree.map(lambda spec: np.zeros(spec.shape, spec.dtype), describe(slots, vocab))
    state.numbers[:, NUMBERS.index("top_p")] = state.numbers[:, NUMBERS.index("repetition_penalty")] = 1.0
    state.integers[:, INTEGERS.index("logprobs")] = -1
    state.bias_tokens[:] = state.held_tokens[:] = NO_TOKEN
    return state


def admission_words(max_tokens: int) -> int:
    """Length of an admission buffer for sequences of at most `max_tokens` tokens."""
    return len(INTEGERS) + len(NUMBERS) + 2 * MAX_LOGIT_BIAS + HELD + max_tokens


def pack_admission(admission: Admission, seed: int, held: Sequence[int], max_tokens: int) -> np.ndarray:
    """One sequence's settings and (where a penalty needs them) its tokens as int32 words. `seed` is 64 bits, signed or not."""
    request, params = admission.request, admission.request.params
    tokens = (*request.prompt, *admission.generated)
    integers = {
        "slot": admission.slot, "min_position": len(request.prompt) + params.min_tokens, "top_k": max(params.top_k, 0),
        "logprobs": -1 if params.logprobs is None else params.logprobs,
        "seed_low": _signed(seed), "seed_high": _signed(seed >> 32), "last_token": tokens[-1],
    }  # fmt: skip
    words = np.zeros(admission_words(max_tokens), np.int32)
    numbers, bias_tokens, bias_values, held_tokens, text = _cut(words)
    numbers[:] = np.array([getattr(params, name) for name in NUMBERS], np.float32).view(np.int32)
    bias_tokens.fill(NO_TOKEN)
    bias_tokens[: len(params.logit_bias)] = list(params.logit_bias)
    bias_values[: len(params.logit_bias)] = np.array(list(params.logit_bias.values()), np.float32).view(np.int32)
    held_tokens.fill(NO_TOKEN)
    held_tokens[: len(held)] = held
    if _penalised(params):
        integers |= {"prompt_length": len(request.prompt), "length": len(tokens)}
        text[: len(tokens)] = tokens
    words[: len(INTEGERS)] = [integers.get(name, 0) for name in INTEGERS]
    return words


def admit(slots: Slots, words: Int[Array, " words"]) -> Slots:
    """Write an admission into its slot. Donates `slots`."""
    numbers, bias_tokens, bias_values, held_tokens, text = _cut(words)
    integers = words[: len(INTEGERS)]
    named = dict(zip(INTEGERS, integers, strict=True))
    place = jnp.arange(text.shape[0], dtype=jnp.int32)
    generated = (place >= named["prompt_length"]) & (place < named["length"])
    vocab = slots.counts.shape[1]
    counts = jnp.zeros((vocab,), jnp.int32).at[text].add(generated.astype(jnp.int32), mode="drop")
    in_prompt = jnp.zeros((vocab,), jnp.bool_).at[text].max(place < named["prompt_length"], mode="drop")
    to_float = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32)  # noqa: E731
    new = Slots(
        last_token=named["last_token"][None], counts=counts[None], in_prompt=in_prompt[None], numbers=to_float(numbers)[None],
        integers=integers[None], bias_tokens=bias_tokens[None], bias_values=to_float(bias_values)[None], held_tokens=held_tokens[None],
    )  # fmt: skip
    return jax.tree.map(lambda state, value: jax.lax.dynamic_update_slice_in_dim(state, value[0][None], named["slot"], 0), slots, new)


def settings(slots: Slots, rows: Int[Array, " rows"], positions: Int[Array, " rows"]) -> RowSettings:
    """What the sequences in these slots ask of the sampler; `positions` are those of the tokens to be drawn."""
    numbers = dict(zip(NUMBERS, slots.numbers[rows].T, strict=True))
    integers = dict(zip(INTEGERS, slots.integers[rows].T, strict=True))
    seed = jax.lax.bitcast_convert_type(jnp.stack([integers["seed_high"], integers["seed_low"]], axis=-1), jnp.uint32)
    return RowSettings(
        temperature=numbers["temperature"], top_p=numbers["top_p"], min_p=numbers["min_p"], presence=numbers["presence_penalty"],
        frequency=numbers["frequency_penalty"], repetition=numbers["repetition_penalty"], top_k=integers["top_k"],
        logprobs=integers["logprobs"], seed=seed, position=positions,
    )  # fmt: skip


def biased(
    logits: Float[Array, "rows vocab"], slots: Slots, rows: Int[Array, " rows"], positions: Int[Array, " rows"]
) -> Float[Array, "rows vocab"]:
    """Add each row's logit biases and exclude its held tokens while its output is shorter than its `min_tokens`."""
    index = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    logits = logits.at[index, slots.bias_tokens[rows]].add(slots.bias_values[rows], mode="drop")
    early = positions < slots.integers[rows, INTEGERS.index("min_position")]
    held = jnp.where(early[:, None], slots.held_tokens[rows], NO_TOKEN)
    return logits.at[index, held].set(-jnp.inf, mode="drop")


def wants_bias(slots: Slots, rows: Int[Array, " rows"]) -> Bool[Array, ""]:
    """Whether any of the rows has a bias or a token held back."""
    return jnp.any(slots.bias_tokens[rows, 0] != NO_TOKEN) | jnp.any(slots.held_tokens[rows, 0] != NO_TOKEN)


def record(slots: Slots, rows: Int[Array, " rows"], tokens: Int[Array, " rows"]) -> Slots:
    """Note the token that each slot drew (rows that drew none name the spare slot). Donates `slots`."""
    return replace(
        slots, last_token=slots.last_token.at[rows].set(tokens), counts=slots.counts.at[rows, tokens].add(1)
    )  # fmt: skip


def _cut(words: np.ndarray | Array) -> tuple[Any, ...]:
    """The parts of an admission buffer behind its integers: numbers, bias tokens, bias values, held tokens, tokens."""
    parts, at = [], len(INTEGERS)
    for size in (len(NUMBERS), MAX_LOGIT_BIAS, MAX_LOGIT_BIAS, HELD):
        parts.append(words[at : at + size])
        at += size
    return (*parts, words[at:])


def _penalised(params: SamplingParams) -> bool:
    return params.presence_penalty != 0.0 or params.frequency_penalty != 0.0 or params.repetition_penalty != 1.0


def _signed(word: int) -> int:
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word
