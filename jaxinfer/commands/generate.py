"""`jaxinfer generate`: complete prompts given on the command line, in a JSON-lines file or on stdin.

Prompts become tasks (a prompt or a conversation and its own sampling fields); they are checked before jax is imported and the model
is loaded, run in one batch, and printed in order: text, or with `--json` one object per line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxinfer.config import ConfigError, EngineConfig, from_arguments
from jaxinfer.config import add_arguments as add_settings
from jaxinfer.console import StageBar, add_sampling_arguments, sampling_of, warn
from jaxinfer.grammar import Grammar
from jaxinfer.request import FinishReason, Output, SamplingParams, TokenLogprob

HELP = "complete prompts and print the text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    group = parser.add_argument_group("prompts", "Without any, stdin is read as one prompt.")
    group.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be repeated")
    lines = 'JSON lines ("-" for stdin): strings, or {"prompt" or "messages", "id"?, sampling fields?}'
    group.add_argument("--input", metavar="FILE", help=lines)
    group.add_argument("--chat", action="store_true", help="take each prompt as a user's message in the model's chat format")
    output = parser.add_argument_group("output", "stdout carries the result alone.")
    output.add_argument("--n", type=int, default=argparse.SUPPRESS, help="completions of each prompt")
    output.add_argument("--logprobs", type=int, default=argparse.SUPPRESS, metavar="K", help="with --json: K alternatives of each token")
    output.add_argument("--json", action="store_true", help="one JSON object per completion (with --stream: per step)")
    output.add_argument("--stream", action="store_true", help="print text as it comes (one prompt)")
    shape = output.add_mutually_exclusive_group()
    shape.add_argument("--json-schema", metavar="FILE", help="keep to the JSON schema in a file")
    shape.add_argument("--regex", metavar="PATTERN", help="keep to a regular expression")
    add_sampling_arguments(parser)
    add_settings(parser, EngineConfig)


def run(args: argparse.Namespace) -> int:
    """Generate and print; 1 if a sequence ended with an error."""
    common = {**sampling_of(args), **{name: getattr(args, name) for name in ("n", "logprobs") if hasattr(args, name)}}
    if (grammar := _grammar(args)) is not None:
        common["grammar"] = grammar
    tasks = [_task(entry, common, number) for number, entry in enumerate(_entries(args))]
    if not tasks:
        raise ConfigError("there is no prompt; give --prompt TEXT or --input FILE")
    if args.stream and (len(tasks) > 1 or (tasks[0]["sampling"].get("n", 1) > 1 and not args.json)):
        raise ConfigError("--stream prints one completion; leave it out for several, or give one prompt")

    from jaxinfer.api import LLM

    with StageBar() as bar:
        llm = LLM.build(from_arguments(EngineConfig, vars(args)), progress=bar)
    with llm:
        return _stream(llm, tasks[0], args) if args.stream else _print_all(llm, tasks, args)


def _grammar(args: argparse.Namespace) -> Grammar | None:
    if args.regex is not None:
        return Grammar.regex(args.regex)
    return None if args.json_schema is None else Grammar.json_schema(_text_of("--json-schema", args.json_schema))


def _entries(args: argparse.Namespace) -> Iterator[Any]:
    yield from args.prompt
    if args.input is not None:
        yield from _lines(args.input)
    elif not args.prompt:
        if sys.stdin.isatty():
            print("type a prompt, then Ctrl-D:", file=sys.stderr)
        text = sys.stdin.read().removesuffix("\n")
        if text:
            yield text


def _lines(name: str) -> Iterator[Any]:
    for number, line in enumerate(_text_of("--input", name).splitlines(), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ConfigError(f"--input {name}, line {number}: not JSON ({error}); write a string or an object on each line") from None


def _text_of(flag: str, name: str) -> str:
    """The text of a file that a flag names ("-" for stdin)."""
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} {name}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None


def _task(entry: Any, common: dict[str, Any], number: int) -> dict[str, Any]:
    """A prompt with its own sampling fields, checked as far as it can be without the model."""
    fields = {"prompt": entry} if isinstance(entry, str) else dict(entry) if isinstance(entry, dict) else {}
    given = [name for name in ("prompt", "messages") if fields.get(name)]
    if len(given) != 1:
        raise ConfigError(f'prompt {number}: give a string, {{"prompt": ...}} or {{"messages": [...]}}')
    own = {name: value for name, value in fields.items() if name not in ("prompt", "messages", "id")}
    task = {"id": fields.get("id", number), "prompt": fields[given[0]], "kind": given[0], "sampling": {**common, **own}}
    SamplingParams.of(**task["sampling"])
    return task


def _prompt(task: dict[str, Any], args: argparse.Namespace) -> Any:
    return [{"role": "user", "content": task["prompt"]}] if args.chat and isinstance(task["prompt"], str) else task["prompt"]


def _print_all(llm: Any, tasks: list[dict[str, Any]], args: argparse.Namespace) -> int:
    requests = [llm.request(_prompt(task, args), **task["sampling"]) for task in tasks]
    owners = [task for task, request in zip(tasks, requests, strict=True) for _ in range(request.params.n)]
    failed = 0
    for task, completion in zip(owners, llm.complete(requests), strict=True):
        if completion.finish_reason is FinishReason.ERROR:
            failed += 1
            warn(f"prompt {task['id']}: {completion.error}")
        if args.json:
            _print_json(_record(llm, task, completion))
        else:
            heading = f"==> {task['id']}{f', choice {completion.index}' if completion.index else ''} <==\n" if len(owners) > 1 else ""
            print(heading + completion.text, flush=True)
    return min(failed, 1)


def _record(llm: Any, task: dict[str, Any], completion: Any) -> dict[str, Any]:
    record = {"id": task["id"], task["kind"]: task["prompt"], "index": completion.index, "text": completion.text}
    usage = {"prompt_tokens": completion.prompt_tokens, "output_tokens": len(completion.token_ids)}
    record |= {"finish_reason": completion.finish_reason, **usage, "token_ids": completion.token_ids}
    if completion.logprobs:
        record["logprobs"] = [_logprob(llm, item) for item in completion.logprobs]
    return record | ({"error": completion.error} if completion.error else {})


def _logprob(llm: Any, item: TokenLogprob) -> dict[str, Any]:
    top = [{"token": llm.tokenizer.token_text(token), "logprob": value} for token, value in item.top]
    return {"token": llm.tokenizer.token_text(item.token), "logprob": item.logprob, "top": top}


def _stream(llm: Any, task: dict[str, Any], args: argparse.Namespace) -> int:
    failed = 0
    for output in llm.stream(_prompt(task, args), **task["sampling"]):
        if args.json:
            _print_json(_delta(llm, task, output))
        else:
            print(output.text, end="", flush=True)
        if output.finish_reason is FinishReason.ERROR:
            failed += 1
            warn(f"prompt {task['id']}: {output.error}")
    if not args.json:
        print(flush=True)
    return min(failed, 1)


def _delta(llm: Any, task: dict[str, Any], output: Output) -> dict[str, Any]:
    record = {"id": task["id"], "index": output.index, "text": output.text, "token_ids": output.token_ids}
    logprobs = {"logprobs": [_logprob(llm, item) for item in output.logprobs]} if output.logprobs else {}
    return record | logprobs | {"finish_reason": output.finish_reason}


def _print_json(record: dict[str, Any]) -> None:
    print(json.dumps(record, ensure_ascii=False), flush=True)
