"""What chat and text completions look like: the two implementations of `answer.Form`.

The call says what the client asked to see. A form remembers for each choice what was said already (role, echoed prompt, characters
written). It does not know streams or clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from msgspec import UNSET

from jaxinfer.request import Output, TokenLogprob
from jaxinfer.serve import logprobs, wire
from jaxinfer.serve.convert import Call
from jaxinfer.tokenizer import Tokenizer


class ChatForm:
    """Chat completions: a role first, then content, a finish reason last."""

    def __init__(self, call: Call, tokenizer: Tokenizer) -> None:
        self._call = call
        self._tokenizer = tokenizer
        self._begun: set[int] = set()

    def chunk(self, choice: int, output: Output) -> wire.ChatChunk | None:
        """What an output adds to a message."""
        tokens = self._logprobs(output.logprobs)
        first = choice not in self._begun
        if not (first or output.text or tokens or output.finish_reason or (self._call.token_ids and output.token_ids)):
            return None
        content = output.text if first or output.text or tokens else None
        delta = wire.Delta("assistant" if first else None, content)
        reason = output.finish_reason and output.finish_reason.value
        ids = _token_ids(self._call, (output,))
        chunk = self._chunk([wire.ChatChunkChoice(choice, delta, tokens, reason, output.stop_reason, ids)])
        if not self._begun:
            chunk.prompt_token_ids = _prompt_ids(self._call, choice)
        self._begun.add(choice)
        return chunk

    def usage_chunk(self, usage: wire.Usage) -> wire.ChatChunk:
        """The last chunk, with the usage alone."""
        chunk = self._chunk([])
        chunk.usage = usage
        return chunk

    def whole(self, outputs: Sequence[Sequence[Output]], usage: wire.Usage) -> wire.ChatCompletion:
        """The answer to a call that was not streamed."""
        made = [
            wire.ChatChoice(
                index,
                wire.ChatMessage("".join(part.text for part in parts)),
                self._logprobs(tuple(chain.from_iterable(part.logprobs for part in parts))),
                str(parts[-1].finish_reason),
                parts[-1].stop_reason,
                _token_ids(self._call, parts),
            )
            for index, parts in enumerate(outputs)
        ]
        return wire.ChatCompletion(
            self._call.id, self._call.created, self._call.model, made, usage,
            prompt_logprobs=_prompt_logprobs(self._call, self._tokenizer, outputs[0]), prompt_token_ids=_prompt_ids(self._call, 0),
        )  # fmt: skip

    def _chunk(self, made: list[wire.ChatChunkChoice]) -> wire.ChatChunk:
        return wire.ChatChunk(self._call.id, self._call.created, self._call.model, made)

    def _logprobs(self, entries: Sequence[logprobs.TokenLogprob]) -> wire.ChatLogprobs | None:
        asked = self._call.logprobs is not None and entries
        return logprobs.chat(self._tokenizer, entries) if asked else None


class CompletionForm:
    """Text completions: with `echo` the prompt comes first, in the first chunk of each choice."""

    def __init__(self, call: Call, tokenizer: Tokenizer) -> None:
        self._call = call
        self._tokenizer = tokenizer
        self._begun: set[int] = set()
        self._writers = [self._writer(choice, call.logprobs) for choice in range(len(call.sequences))]

    def chunk(self, choice: int, output: Output) -> wire.Completion | None:
        """What an output adds to a text."""
        first = choice not in self._begun
        text = (self._call.echo_of(choice) if first else "") + output.text
        if not (text or output.logprobs or output.finish_reason or (self._call.token_ids and output.token_ids)):
            return None
        self._begun.add(choice)
        made = self._choice(choice, text, (output,))
        if not first:
            made.prompt_token_ids = UNSET
        return self._completion([made])

    def usage_chunk(self, usage: wire.Usage) -> wire.Completion:
        """The last chunk, with the usage alone."""
        chunk = self._completion([])
        chunk.usage = usage
        return chunk

    def whole(self, outputs: Sequence[Sequence[Output]], usage: wire.Usage) -> wire.Completion:
        """The answer to a call that was not streamed."""
        made = [self._choice(i, self._call.echo_of(i) + "".join(part.text for part in parts), parts) for i, parts in enumerate(outputs)]
        completion = self._completion(made)
        completion.usage = usage
        return completion

    def _completion(self, made: list[wire.CompletionChoice]) -> wire.Completion:
        return wire.Completion(self._call.id, self._call.created, self._call.model, made)

    def _choice(self, choice: int, text: str, parts: Sequence[Output]) -> wire.CompletionChoice:
        writer = self._writers[choice]
        echoed = _prompt_of(parts) if self._call.echo else ()
        drawn = [entry for part in parts for entry in part.logprobs]
        tokens = [*self._call.sequences[choice].prompt[: len(echoed)], *(entry.token for entry in drawn)]
        lists = writer.write(tokens, [*echoed, *drawn]) if writer is not None and tokens else None
        reason = parts[-1].finish_reason
        return wire.CompletionChoice(
            choice, text, lists, reason and reason.value, parts[-1].stop_reason,
            prompt_logprobs=_prompt_logprobs(self._call, self._tokenizer, parts), prompt_token_ids=_prompt_ids(self._call, choice),
            token_ids=_token_ids(self._call, parts),
        )  # fmt: skip

    def _writer(self, choice: int, count: int | None) -> logprobs.CompletionWriter | None:
        if count is None:
            return None
        skipped = self._tokenizer.special_ids if self._call.sequences[choice].params.skip_special_tokens else ()
        return logprobs.CompletionWriter(self._tokenizer, count, without_text=skipped)


def _prompt_of(parts: Sequence[Output]) -> Sequence[TokenLogprob | None]:
    return next((part.prompt_logprobs for part in parts if part.prompt_logprobs), ())


def _prompt_logprobs(call: Call, tokenizer: Tokenizer, parts: Sequence[Output]) -> wire.PromptLogprobs:
    if call.prompt_logprobs is None:
        return UNSET
    return logprobs.prompt(tokenizer, _prompt_of(parts), call.prompt_logprobs)


def _prompt_ids(call: Call, choice: int) -> wire.TokenIds:
    return list(call.sequences[choice].prompt) if call.token_ids else UNSET


def _token_ids(call: Call, parts: Sequence[Output]) -> wire.TokenIds:
    return [token for part in parts for token in part.token_ids] if call.token_ids else UNSET
