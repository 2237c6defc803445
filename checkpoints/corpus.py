"""From texts and generators to two pools of training windows: long ones of prose, shorter ones of conversations.

Life of the data: tasks (a slice of a book, some dialogues, a seed for skills) are turned into documents by worker processes, documents
are packed one after the other into windows that always begin with a document; the last document of a window is cut. Without a data
folder everything is generated. What this file does NOT know: the model; it never imports jax, so that workers start fast.
"""

import json
import lzma
import multiprocessing
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from checkpoints import conversations, skills, words
from checkpoints.vocabulary import BOS_ID

EVERYONE = frozenset({"user", "assistant"})
ASSISTANT = frozenset({"assistant"})
STORY_COPIES = 2
CONVERSATION_TOKENS = 105  # about what one generated conversation comes to


@dataclass(frozen=True)
class Texts:
    """The raw texts: whole books, dialogues as lists of turns, stories, and the held-out books."""

    books: list[str]
    dialogues: list[list[str]]
    stories: list[str]
    held_out: list[str]


@dataclass(frozen=True)
class Pools:
    """Training windows as uint16 [windows, length + 1] (see conversations.COUNTS): prose and chat."""

    prose: np.ndarray
    chat: np.ndarray


def _unpack(path: Path) -> str:
    """The text of an .xz file."""
    return lzma.open(path, "rt", encoding="utf-8").read()


def unwrapped(story: str) -> str:
    """A story whose lines were broken to fit a page, with one line per paragraph."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in story.strip().split("\n\n") if paragraph.strip())


def read_texts(folder: Path) -> Texts:
    """Read the four files that the model card lists; raises FileNotFoundError naming the one that is missing."""
    split = partial(str.split, sep="\f")
    books, held_out, stories = (
        [part.strip() for part in split(_unpack(folder / f"{name}.txt.xz")) if part.strip()]
        for name in ("prose", "prose_heldout", "stories")
    )
    dialogues = [json.loads(line) for line in _unpack(folder / "dialogues.jsonl.xz").splitlines()]
    return Texts(books, dialogues, [unwrapped(story) for story in stories], held_out)


def generated_story(rng: random.Random) -> str:
    """A title and a few simple sentences: stands in for texts where there are none (tests, the smoke run)."""
    name, noun = rng.choice(words.NAMES), rng.choice(words.NOUNS)
    opening = f"Once upon a time there was a {rng.choice(words.ADJECTIVES)} {noun} called {name}."
    sentences = [skills.sentence(rng) for _ in range(rng.randint(3, 8))]
    return f"{name} and the {noun}\n\n{opening} " + " ".join(text[0].upper() + text[1:] + "." for text in sentences)


def generated_texts(seed: int, number: int) -> Texts:
    """`number` generated stories as books, stories and held-out books, and dialogues of generated sentences."""
    rng = random.Random(seed)
    stories = [generated_story(rng) for _ in range(number)]
    books = ["\n\n".join(generated_story(rng) for _ in range(20)) for _ in range(number // 10 + 1)]
    dialogues = [[skills.sentence(rng) for _ in range(6)] for _ in range(number)]
    return Texts(books, dialogues, stories, ["\n\n".join(generated_story(rng) for _ in range(10))])


def sample_for_tokenizer(texts: Texts, seed: int) -> Iterator[str]:
    """What the tokenizer learns from: every fourth slice of the books, a third of the dialogues, all stories, some skills."""
    for book in texts.books:
        yield from (book[i : i + 4000] for i in range(0, len(book), 16000))
    yield from ("\n".join(turns) for turns in texts.dialogues[::3])
    yield from texts.stories
    rng = random.Random(seed)
    for _ in range(30 * len(texts.stories)):
        messages, tools = conversations.conversation(rng)
        yield "\n".join(f"{message['role']}\n{message.get('content', '')}" for message in messages)
        yield "\n".join(json.dumps(tool["function"]) for tool in tools)


# --- tasks: each returns one flat array and the lengths of its documents, which travels between processes cheaply ---

Task = partial[list[np.ndarray]]
_TOKENIZER: list[Tokenizer] = []


def _start_worker(path: str) -> None:
    """Load the tokenizer once per process; workers stay single-threaded."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _TOKENIZER[:] = [Tokenizer.from_file(path)]


def _book_documents(text: str, length: int) -> list[np.ndarray]:
    """A book cut into documents of `length` tokens, each behind a begin token."""
    (book,) = conversations.encode_texts(_TOKENIZER[0], [text])
    body = book[1:]
    begin = np.array([BOS_ID], np.uint16) | conversations.COUNTS
    return [np.concatenate([begin, body[i : i + length]]) for i in range(0, len(body), length)]


def _story_documents(stories: Sequence[str]) -> list[np.ndarray]:
    """Every story STORY_COPIES times: once with its title, then without."""
    bodies = [story.strip().partition("\n")[2].strip() or story for story in stories]
    return list(conversations.encode_texts(_TOKENIZER[0], [*stories, *bodies * (STORY_COPIES - 1)]))


def _dialogue_documents(dialogues: Sequence[Sequence[str]], stories: Sequence[str], seed: int) -> list[np.ndarray]:
    """Dialogues, and stories that are asked for, with roles, spans and wordings drawn from the seed."""
    rng = random.Random(seed)
    talks = [(conversations.dialogue(rng, turns), ()) for turns in dialogues]
    told = [(conversations.story_chat(rng, story), ()) for story in stories]
    encode = partial(conversations.encode_chats, _TOKENIZER[0])
    return [*encode(talks, EVERYONE), *encode(told, ASSISTANT)]


def _skill_documents(number: int, seed: int, drills: float) -> list[np.ndarray]:
    """`number` conversations of generated skills."""
    rng = random.Random(seed)
    return list(conversations.encode_chats(_TOKENIZER[0], [conversations.conversation(rng, drills) for _ in range(number)], ASSISTANT))


def prose_tasks(texts: Texts, length: int) -> list[Task]:
    """One task per book, one for all stories."""
    return [*(partial(_book_documents, book, length) for book in texts.books), partial(_story_documents, texts.stories)]


def chat_tasks(texts: Texts, settings: "PoolSettings") -> list[Task]:
    """Tasks that make about the wanted number of tokens: passes over the dialogues for their share, the rest skills."""
    tokens, share, seed = settings.chat_tokens, settings.dialogue_share, settings.seed
    slices = [(texts.dialogues[i : i + 1500], texts.stories[i // 1500 :: 16]) for i in range(0, len(texts.dialogues), 1500)]
    per_pass = max(1, sum(len(turn) for turns in texts.dialogues for turn in turns) // 4 + 8 * sum(map(len, texts.dialogues)))
    passes = max(1, round(tokens * share / (0.75 * per_pass)))
    talks = [partial(_dialogue_documents, *part, seed + 1000 * i + j) for i in range(passes) for j, part in enumerate(slices)]
    conversations_needed = int(tokens * (1 - share) / CONVERSATION_TOKENS)
    size = min(5000, conversations_needed)
    skill_seeds = range(seed + 10**6, seed + 10**6 + conversations_needed // size)
    return [*talks, *(partial(_skill_documents, size, one, settings.drill_share) for one in skill_seeds)]


def _run(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Run a task; the documents as one flat array with their lengths."""
    documents = task()
    return np.concatenate(documents), np.array([len(document) for document in documents])


def pack(parts: Iterable[tuple[np.ndarray, np.ndarray]], length: int, seed: int) -> np.ndarray:
    """Pack shuffled documents into windows [windows, length + 1]: each begins with a document, its last document is cut to fit."""
    documents = [piece for flat, lengths in parts for piece in np.split(flat, np.cumsum(lengths)[:-1])]
    np.random.default_rng(seed).shuffle(documents)  # pyright: ignore[reportArgumentType, reportCallIssue]
    sizes = np.array([len(document) for document in documents])
    windows: list[np.ndarray] = []
    start, ends = 0, np.cumsum(sizes)
    while start < len(documents):
        before = ends[start] - sizes[start]
        stop = int(np.searchsorted(ends, before + length + 1)) + 1
        window = np.concatenate(documents[start:stop])[: length + 1]
        if len(window) == length + 1:
            windows.append(window)
        start = stop
    if not windows:
        raise ValueError(f"{int(sizes.sum())} tokens do not fill one window of {length + 1}")
    return np.stack(windows)


@dataclass(frozen=True)
class PoolSettings:
    """How the pools are cut: tokens per window, chat tokens to make, dialogues' share, processes (0: this one), seed, drills' share."""

    prose_length: int
    chat_length: int
    chat_tokens: int
    dialogue_share: float
    workers: int
    seed: int
    drill_share: float = 0.0


def make_pools(texts: Texts, tokenizer_file: Path, settings: PoolSettings) -> Pools:
    """Tokenise and generate everything and pack it; runs in `settings.workers` processes when that is not 0."""
    prose, chat = prose_tasks(texts, settings.prose_length), chat_tasks(texts, settings)
    if settings.workers == 0:
        _start_worker(str(tokenizer_file))
        parts = [_run(task) for task in prose + chat]
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(settings.workers, context, _start_worker, (str(tokenizer_file),)) as pool:
            futures: list[Future[tuple[np.ndarray, np.ndarray]]] = [pool.submit(_run, task) for task in prose + chat]
            parts = [future.result() for future in futures]
    return Pools(
        pack(parts[: len(prose)], settings.prose_length, settings.seed),
        pack(parts[len(prose) :], settings.chat_length, settings.seed + 1),
    )


def held_out_windows(texts: Texts, tokenizer: Tokenizer, length: int) -> tuple[np.ndarray, int]:
    """The held-out books as plain ids int32 [windows, length + 1], padded with the begin token, and their size in UTF-8 bytes.

    Every window begins with the begin token, and no token of a book is counted twice or left out: what follows the end of a book within
    its last window is marked by id -1, which a loss must leave out.
    """
    rows: list[np.ndarray] = []
    for book in texts.held_out:
        ids = np.array(tokenizer.encode(book, add_special_tokens=False).ids, np.int32)
        for i in range(0, len(ids), length):
            body = ids[i : i + length]
            rows.append(np.concatenate([[BOS_ID], body, np.full(length - len(body), -1)]).astype(np.int32))
    return np.stack(rows), sum(len(book.encode()) for book in texts.held_out)
