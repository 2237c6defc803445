"""State of running sequences that stays on the device: settings of the sampler, last tokens, how often each token occurred.

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
from jaxinfer.request import MAX_ALLOWED_TOKENS, MAX_BAD_WORDS, MAX_LOGIT_BIAS, MAX_STOP_TOKENS, SamplingParams
from jaxinfer.sampling import RowSettings, pytree, unchecked

HELD = 2 * MAX_STOP_TOKENS
BANNED, BANNED_LENGTH = 2 * MAX_BAD_WORDS, 8  # token sequences (a word has one inside and one between words), tokens of each
RECENT = BANNED_LENGTH - 1
NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
INTEGERS = ("slot", "prompt_length", "min_position", "top_k", "logprobs", "seed_low", "seed_high", "last_token")
NO_TOKEN = np.int32(2**31 - 1)  # an index past any vocabulary: scatters drop it
ANY_TOKEN = np.int32(-1)  # in front of a banned sequence that is shorter than the table's


@pytree
@dataclass(frozen=True)
class Slots:
    """Per-slot state; tokens are padded with `NO_TOKEN`.

    held_tokens: excluded below `min_position`. banned: token sequences, right-aligned behind `ANY_TOKEN`; the last token of each is
    excluded where the others are the latest of the output. recent: the output's latest tokens, right-aligned. allowed: the only tokens
    that may be drawn, if there are any. rejected: drafts that did not stand in the slot's latest step with drafts.
    """

    last_token: Int[Array, " slots"]
    rejected: Int[Array, " slots"]
    counts: Int[Array, "slots vocab"]
    in_prompt: Bool[Array, "slots vocab"]
    numbers: Float[Array, "slots numbers"]
    integers: Int[Array, "slots integers"]
    bias_tokens: Int[Array, "slots bias"]
    bias_values: Float[Array, "slots bias"]
    held_tokens: Int[Array, "slots held"]
    recent: Int[Array, "slots recent"]
    banned: Int[Array, "slots banned length"]
    allowed: Int[Array, "slots allowed"]


def describe(slots: int, vocab: int) -> Slots:
    """Shapes and dtypes of the state for so many slots (the spare one included)."""
    shape = jax.ShapeDtypeStruct
    return unchecked(Slots, {
        "last_token": shape((slots,), jnp.int32),
        "rejected": shape((slots,), jnp.int32),
        "counts": shape((slots, vocab), jnp.int32),
        "in_prompt": shape((slots, vocab), jnp.bool_),
        "numbers": shape((slots, len(NUMBERS)), jnp.float32),
        "integers": shape((slots, len(INTEGERS)), jnp.int32),
        "bias_tokens": shape((slots, MAX_LOGIT_BIAS), jnp.int32),
        "bias_values": shape((slots, MAX_LOGIT_BIAS), jnp.float32),
        "held_tokens": shape((slots, HELD), jnp.int32),
        "recent": shape((slots, RECENT), jnp.int32),
        "banned": shape((slots, BANNED, BANNED_LENGTH), jnp.int32),
        "allowed": shape((slots, MAX_ALLOWED_TOKENS), jnp.int32),
    })  # fmt: skip


def neutral(slots: int, vocab: int) -> Slots:
    """The state of slots that nobody uses, on the host: padding rows read it, and must not wake the sampler's optional work."""
    state = jax.tree.map(lambda spec: np.zeros(spec.shape, spec.dtype), describe(slots, vocab))
    state.numbers[:, NUMBERS.index("top_p")] = state.numbers[:, NUMBERS.index("repetition_penalty")] = 1.0
    state.integers[:, INTEGERS.index("logprobs")] = -1
    for tokens in (state.bias_tokens, state.held_tokens, state.recent, state.banned, state.allowed):
        tokens.fill(NO_TOKEN)
    return state


@dataclass(frozen=True)
class Draws:
    """What the engine derives from a request for its draws.

    seed: 64 bits, signed or not. held: token ids that may not end the output yet. banned: token sequences that it may not hold, at most
    `BANNED` of at most `BANNED_LENGTH` tokens each.
    """

    seed: int
    held: Sequence[int] = ()
    banned: Sequence[Sequence[int]] = ()


_PARTS = {
    "numbers": len(NUMBERS), "bias_tokens": MAX_LOGIT_BIAS, "bias_values": MAX_LOGIT_BIAS, "held_tokens": HELD, "recent": RECENT,
    "banned": BANNED * BANNED_LENGTH, "allowed": MAX_ALLOWED_TOKENS,
}  # fmt: skip


def admission_words(max_tokens: int) -> int:
    """Length of an admission buffer for sequences of at most `max_tokens` tokens."""
    return len(INTEGERS) + sum(_PARTS.values()) + max_tokens


def pack_admission(admission: Admission, draws: Draws, max_tokens: int) -> np.ndarray:
    """One sequence's settings and (where a penalty needs them) its tokens as int32 words."""
    request, params = admission.request, admission.request.params
    prompt, generated = request.ids, admission.generated
    integers = {
        "slot": admission.slot, "min_position": len(prompt) + params.min_tokens, "top_k": max(params.top_k, 0),
        "logprobs": -1 if params.logprobs is None else params.logprobs,
        "seed_low": _signed(draws.seed), "seed_high": _signed(draws.seed >> 32), "last_token": (generated or prompt)[-1],
    }  # fmt: skip
    words = np.zeros(admission_words(max_tokens), np.int32)
    parts, text = _cut(words)
    for tokens in (text, *(parts[name] for name in ("bias_tokens", "held_tokens", "recent", "banned", "allowed"))):
        tokens.fill(NO_TOKEN)
    parts["numbers"][:] = np.array([getattr(params, name) for name in NUMBERS], np.float32).view(np.int32)
    parts["bias_tokens"][: len(params.logit_bias)] = list(params.logit_bias)
    parts["bias_values"][: len(params.logit_bias)] = np.array(list(params.logit_bias.values()), np.float32).view(np.int32)
    parts["held_tokens"][: len(draws.held)] = draws.held
    recent, allowed = generated[-RECENT:], params.allowed_token_ids or ()
    parts["recent"][RECENT - len(recent) :] = recent
    parts["allowed"][: len(allowed)] = allowed
    for row, sequence in zip(parts["banned"].reshape(BANNED, BANNED_LENGTH), draws.banned, strict=False):
        row.fill(ANY_TOKEN)
        row[BANNED_LENGTH - len(sequence) :] = sequence
    if _penalised(params):
        integers["prompt_length"] = len(prompt)
        text[: len(prompt)], text[len(prompt) : len(prompt) + len(generated)] = prompt, generated
    words[: len(INTEGERS)] = [integers.get(name, 0) for name in INTEGERS]
    return words


def admit(slots: Slots, words: Int[Array, " words"]) -> Slots:
    """Write an admission into its slot. Donates `slots`."""
    parts, text = _cut(words)
    integers = words[: len(INTEGERS)]
    named = dict(zip(INTEGERS, integers, strict=True))
    place = jnp.arange(text.shape[0], dtype=jnp.int32)
    given, vocab = place < named["prompt_length"], slots.counts.shape[1]
    counts = jnp.zeros((vocab,), jnp.int32).at[jnp.where(given, NO_TOKEN, text)].add(1, mode="drop")
    in_prompt = jnp.zeros((vocab,), jnp.bool_).at[jnp.where(given, text, NO_TOKEN)].set(True, mode="drop")
    for name in ("numbers", "bias_values"):
        parts[name] = jax.lax.bitcast_convert_type(parts[name], jnp.float32)
    parts["banned"] = parts["banned"].reshape(BANNED, BANNED_LENGTH)
    others = {"last_token": named["last_token"], "rejected": jnp.int32(0), "counts": counts, "in_prompt": in_prompt, "integers": integers}
    new = Slots(**{name: value[None] for name, value in (parts | others).items()})
    return jax.tree.map(lambda state, value: jax.lax.dynamic_update_slice_in_dim(state, value, named["slot"], 0), slots, new)


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


def ruled(
    logits: Float[Array, "rows vocab"], slots: Slots, rows: Int[Array, " rows"], positions: Int[Array, " rows"]
) -> Float[Array, "rows vocab"]:
    """Apply each row's own rules about tokens: biases, tokens held back below `min_tokens`, banned sequences, allowed tokens."""
    index = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    logits = logits.at[index, slots.bias_tokens[rows]].add(slots.bias_values[rows], mode="drop")
    early = positions < slots.integers[rows, INTEGERS.index("min_position")]
    held = jnp.where(early[:, None], slots.held_tokens[rows], NO_TOKEN)
    logits = logits.at[index, held].set(-jnp.inf, mode="drop")
    return jax.lax.cond(_wants_limits(slots, rows), lambda: _limited(logits, slots, rows), lambda: logits)


def has_rules(slots: Slots, rows: Int[Array, " rows"]) -> Bool[Array, ""]:
    """Whether any of the rows has rules about tokens."""
    first = (slots.bias_tokens[rows, 0] != NO_TOKEN) | (slots.held_tokens[rows, 0] != NO_TOKEN)
    return jnp.any(first) | _wants_limits(slots, rows)


def record(slots: Slots, rows: Int[Array, " rows"], tokens: Int[Array, " rows"]) -> Slots:
    """Note the token that each slot drew (rows that drew none name the spare slot). Donates `slots`."""
    recent = jnp.concatenate([slots.recent[rows, 1:], tokens[:, None]], axis=1)
    return replace(
        slots, last_token=slots.last_token.at[rows].set(tokens), counts=slots.counts.at[rows, tokens].add(1),
        recent=slots.recent.at[rows].set(recent),
    )  # fmt: skip


def _wants_limits(slots: Slots, rows: Int[Array, " rows"]) -> Bool[Array, ""]:
    return jnp.any((slots.banned[rows, 0, -1] != NO_TOKEN) | (slots.allowed[rows, 0] != NO_TOKEN))


def _limited(logits: Float[Array, "rows vocab"], slots: Slots, rows: Int[Array, " rows"]) -> Float[Array, "rows vocab"]:
    """Exclude what is not among a row's allowed tokens and what would complete one of its banned sequences."""
    index = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    allowed = slots.allowed[rows]
    listed = jnp.zeros(logits.shape, jnp.bool_).at[index, allowed].set(True, mode="drop")
    logits = jnp.where(listed | (allowed[:, :1] == NO_TOKEN), logits, -jnp.inf)
    begin, last = slots.banned[rows, :, :-1], slots.banned[rows, :, -1]
    begun = jnp.all((begin == ANY_TOKEN) | (begin == slots.recent[rows][:, None]), axis=-1)
    return logits.at[index, jnp.where(begun, last, NO_TOKEN)].set(-jnp.inf, mode="drop")


def _cut(words: np.ndarray | Array) -> tuple[dict[str, Any], Any]:
    """The parts of an admission buffer behind its integers by name, and the tokens at its end."""
    parts, at = {}, len(INTEGERS)
    for name, size in _PARTS.items():
        parts[name] = words[at : at + size]
        at += size
    return parts, words[at:]


def _penalised(params: SamplingParams) -> bool:
    return params.presence_penalty != 0.0 or params.frequency_penalty != 0.0 or params.repetition_penalty != 1.0


def _signed(word: int) -> int:
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word
