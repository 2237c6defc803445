"""What chat and text completions look like: the two implementations of `answer.Form`.

A form remembers for each choice what was said already (role, echoed prompt, characters written). It does not know streams or clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from jaxinfer.request import Output
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
        if not (first or output.text or tokens or output.finish_reason):
            return None
        self._begun.add(choice)
        content = output.text if first or output.text or tokens else None
        delta = wire.Delta("assistant" if first else None, content)
        reason = output.finish_reason and output.finish_reason.value
        return self._chunk([wire.ChatChunkChoice(choice, delta, tokens, reason, output.stop_reason)])

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
            )
            for index, parts in enumerate(outputs)
        ]
        return wire.ChatCompletion(self._call.id, self._call.created, self._call.model, made, usage)

    def _chunk(self, made: list[wire.ChatChunkChoice]) -> wire.ChatChunk:
        return wire.ChatChunk(self._call.id, self._call.created, self._call.model, made)

    def _logprobs(self, entries: Sequence[logprobs.TokenLogprob]) -> wire.ChatLogprobs | None:
        asked = self._call.logprobs is not None and entries
        return logprobs.chat(self._tokenizer, entries) if asked else None


class CompletionForm:
    """Text completions: with `echo` the prompt comes first, in the first chunk of each choice."""

    def __init__(self, call: Call, tokenizer: Tokenizer) -> None:
        self._call = call
        self._begun: set[int] = set()
        asked = call.logprobs is not None
        self._writers = [logprobs.CompletionWriter(tokenizer, len(call.echo_of(i))) if asked else None for i in range(len(call.sequences))]

    def chunk(self, choice: int, output: Output) -> wire.Completion | None:
        """What an output adds to a text."""
        first = choice not in self._begun
        text = (self._call.echo_of(choice) if first else "") + output.text
        if not (text or output.logprobs or output.finish_reason):
            return None
        self._begun.add(choice)
        return self._completion([self._choice(choice, text, (output,))])

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
        entries = [entry for part in parts for entry in part.logprobs]
        lists = writer.write(entries) if writer is not None and entries else None
        reason = parts[-1].finish_reason
        return wire.CompletionChoice(choice, text, lists, reason and reason.value, parts[-1].stop_reason)
