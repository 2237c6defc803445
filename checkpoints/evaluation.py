"""Measure a trained network: bits per byte of held-out books, accuracy per skill on held-out instances, sample texts.

Life of the data: weights (as exported, bf16 values) and prompts -> greedy or sampled tokens by recomputing the whole prefix for each new
token: slow per token, but a dozen lines, and thousands of prompts go through an accelerator together. What this file does NOT know:
training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer

from checkpoints import conversations
from checkpoints.network import Network, Params
from checkpoints.skills import Exchange
from checkpoints.vocabulary import BOS, BOS_ID, END, END_ID, PAD_ID, TURN, render

COMPLETIONS = ("Once upon a time", "Once upon a time there was a little", "The old man looked at the sea and", "It was a dark night, and")
CHATS = (
    "Hello!", "Who are you?", "What is 27 + 45?", "Reverse these words: apple, moon, river", "Tell me a story.",
    "What is the capital of France?", "Have you seen any good movies lately?", "Sort these numbers: 42, 7, 19, 88",
    "What is 127 * 34?", "Why is the sky blue?", "Write a Python function that adds two numbers.",
    "Extract name and age as JSON: My name is Clara. Clara is 31 years old.",
)  # fmt: skip


@dataclass(frozen=True)
class Decoder:
    """Generates for `rows` prompts at a time in a buffer of `length` tokens."""

    network: Network
    params: Params
    rows: int
    length: int

    @cached_property
    def _next(self) -> jax.stages.Wrapped:
        """The compiled step: (params, buffer [rows, length], filled [rows], key, temperature) -> the next token of every row."""

        def choose(params: Params, buffer: jax.Array, filled: jax.Array, key: jax.Array, temperature: jax.Array) -> jax.Array:
            hidden = self.network.hidden_states(params, buffer)
            last = jnp.take_along_axis(hidden, (filled - 1)[:, None, None], axis=1)[:, 0]
            logits = self.network.logits(params, last, jnp.dtype(jnp.float32))
            sampled = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-3))
            return jnp.where(temperature > 0, sampled, jnp.argmax(logits, axis=-1))

        return jax.jit(choose)

    def generate(self, prompts: Sequence[Sequence[int]], new: int, temperature: float = 0.0) -> list[list[int]]:
        """Up to `new` tokens after each prompt (end tokens left out); raises ValueError when one does not fit into the buffer."""
        longest = max(map(len, prompts), default=0)
        if longest + new > self.length:
            raise ValueError(f"a prompt of {longest} tokens and {new} new ones do not fit into {self.length}")
        return [
            tokens
            for i in range(0, len(prompts), self.rows)
            for tokens in self._generate_rows(prompts[i : i + self.rows], new, temperature)
        ]

    def _generate_rows(self, prompts: Sequence[Sequence[int]], new: int, temperature: float) -> list[list[int]]:
        """Generate for at most `rows` prompts, stopping early when all have ended."""
        buffer = np.full((self.rows, self.length), PAD_ID, np.int32)
        filled = np.ones(self.rows, np.int32)
        for row, prompt in enumerate(prompts):
            buffer[row, : len(prompt)], filled[row] = prompt, len(prompt)
        ended = np.arange(self.rows) >= len(prompts)
        replies: list[list[int]] = [[] for _ in prompts]
        for step in range(new):
            chosen = np.asarray(self._next(self.params, buffer.copy(), filled.copy(), jax.random.key(step), np.float32(temperature)))
            ended |= (chosen == END_ID) | (chosen == BOS_ID)
            for row in np.flatnonzero(~ended):
                replies[row].append(int(chosen[row]))
                buffer[row, filled[row]] = chosen[row]
                filled[row] += 1
            if ended.all():
                break
        return replies


def prompt_and_answer(exchange: Exchange) -> tuple[str, str]:
    """The rendered prompt up to where the last assistant turn's content begins, and that content."""
    turns = render(exchange.messages, exchange.tools)
    header = f"{TURN}assistant\n"
    prompt = BOS + "".join(text for _, text in turns[:-1]) + header
    return prompt, turns[-1][1][len(header) : -len(END) - 1]


def skill_accuracy(decoder: Decoder, tokenizer: Tokenizer, number: int) -> dict[str, dict[str, object]]:
    """Per skill: the share of held-out instances whose greedy answer is exactly right, how many fit the buffer, and three failures."""
    table: dict[str, dict[str, object]] = {}
    for name in conversations.SKILLS:
        pairs = [prompt_and_answer(exchange) for exchange in conversations.held_out_exchanges(name, number)]
        prompts = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt, _ in pairs]
        new = 4 + max(len(tokenizer.encode(answer, add_special_tokens=False)) for _, answer in pairs)
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt) + new <= decoder.length]
        replies = tokenizer.decode_batch(decoder.generate([prompts[i] for i in fitting], new), skip_special_tokens=False)
        wrong = [(pairs[i], reply) for i, reply in zip(fitting, replies, strict=True) if reply != pairs[i][1]]
        failures = [{"prompt": pair[0], "expected": pair[1], "found": reply} for pair, reply in wrong[:3]]
        table[name] = {
            "accuracy": round(1 - len(wrong) / len(fitting), 4) if fitting else 0.0,
            "instances": len(fitting),
            "failures": failures,
        }
    return table


def next_token_losses(network: Network, params: Params, windows: np.ndarray, rows: int) -> tuple[float, np.ndarray]:
    """The summed loss in nats over plain windows [windows, length + 1] (targets of id -1 left out) and every position's best token."""

    @jax.jit
    def score(params: Params, block: jax.Array) -> tuple[jax.Array, jax.Array]:
        inputs, targets = jnp.maximum(block[:, :-1], 0), block[:, 1:]
        logits = network.logits(params, network.hidden_states(params, inputs), jnp.dtype(jnp.float32))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
        return jnp.sum(jnp.where(targets >= 0, losses, 0.0)), jnp.argmax(logits, axis=-1)

    padded = np.concatenate([windows, np.full((-len(windows) % rows, windows.shape[1]), -1, windows.dtype)])
    results = [score(params, padded[i : i + rows]) for i in range(0, len(padded), rows)]
    return sum(float(loss) for loss, _ in results), np.concatenate([np.asarray(best) for _, best in results])[: len(windows)]


def samples(decoder: Decoder, tokenizer: Tokenizer, new: int) -> dict[str, list[dict[str, str]]]:
    """Greedy continuations and chat replies, and the same prompts sampled at temperature 0.7: whatever comes, nothing picked."""
    chats = [BOS + render([{"role": "user", "content": text}])[0][1] + f"{TURN}assistant\n" for text in CHATS]
    texts = [*(BOS + text for text in COMPLETIONS), *chats]
    prompts = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    found: dict[str, list[dict[str, str]]] = {}
    for name, temperature in (("greedy", 0.0), ("temperature 0.7", 0.7)):
        replies = tokenizer.decode_batch(decoder.generate(prompts, new, temperature), skip_special_tokens=False)
        found[name] = [{"prompt": shown, "reply": reply} for shown, reply in zip((*COMPLETIONS, *CHATS), replies, strict=True)]
    return found
