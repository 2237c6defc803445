"""Put skills, dialogues and stories together into training documents: token ids with one bit that says where the loss counts.

Life of the data: exchanges, two-person dialogues and stories become messages, messages become turns of text (the chat template's), turns
become tokens. A document is a uint16 array: the low 15 bits are the token id, `COUNTS` marks a token whose prediction is trained. In a
skill only the assistant's turns count, in a dialogue every turn, in prose everything. What this file does NOT know: files, windows.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from checkpoints.drills import DRILLS
from checkpoints.skills import PLAIN_SKILLS, Exchange, Message, Skill, is_held_out
from checkpoints.structured import STRUCTURED_SKILLS, TOOLS
from checkpoints.vocabulary import BOS_ID, TURN, render

COUNTS = np.uint16(1 << 15)
TOKEN = np.uint16((1 << 15) - 1)
SKILLS: dict[str, tuple[Skill, float]] = PLAIN_SKILLS | STRUCTURED_SKILLS
SYSTEMS = (
    "You are a helpful assistant.", "You are demo, a small language model.", "Answer briefly.", "You are a friendly assistant.",
    "Be helpful and short.", "You are a helpful AI assistant. Answer the user's questions.", "Answer the question.",
)  # fmt: skip
STORY_REQUESTS = (
    "Tell me a story.", "Tell me a short story.", "Can you tell me a story?", "Write a story for children.", "I want to hear a story.",
    "Tell me a story about {title}.", "Write a short story called {title}.", "Please tell me the story of {title}.",
)  # fmt: skip


def train_exchange(rng: random.Random, table: dict[str, tuple[Skill, float]]) -> Exchange:
    """One exchange that is not held out, its skill drawn by the table's weights."""
    skills = list(table.values())
    while True:
        (skill,) = rng.choices([skill for skill, _ in skills], [weight for _, weight in skills])
        exchange = skill(rng)
        if not is_held_out(exchange):
            return exchange


def held_out_exchanges(name: str, number: int, seed: int = 0) -> list[Exchange]:
    """Up to `number` different held-out exchanges of one skill; skills with few instances give as many as turn up in 400 draws each."""
    rng = random.Random(f"{name} {seed}")
    found: dict[tuple[Any, ...], Exchange] = {}
    for _ in range(400 * number):
        exchange = SKILLS[name][0](rng)
        if is_held_out(exchange):
            found.setdefault((str(exchange.messages), str(exchange.tools)), exchange)
            if len(found) == number:
                break
    return list(found.values())


def conversation(rng: random.Random, drills: float = 0.0) -> tuple[list[Message], Sequence[dict[str, Any]]]:
    """Messages of one to four exchanges and the tools on offer; the first may be structured (a share: a drill), the others are plain."""
    first = train_exchange(rng, DRILLS if drills and rng.random() < drills else SKILLS)
    messages, tools = list(first.messages), first.tools
    if not tools and rng.random() < 0.05:
        tools = tuple(tool.spec() for tool in rng.sample(TOOLS, rng.randint(1, 3)))
    for _ in range(rng.choice((0, 0, 0, 0, 0, 1, 1, 2, 3))):
        messages += train_exchange(rng, PLAIN_SKILLS).messages
    if messages[0]["role"] != "system" and rng.random() < 0.25:
        messages.insert(0, {"role": "system", "content": rng.choice(SYSTEMS)})
    return messages, tools


def dialogue(rng: random.Random, turns: Sequence[str]) -> list[Message]:
    """A two-person dialogue, or a part of it, as user and assistant; which of the two begins as the user changes."""
    start = rng.randrange(max(1, len(turns) - 4)) if rng.random() < 0.6 else 0
    messages: list[Message] = [
        {"role": ("user", "assistant")[i % 2], "content": turn.strip()} for i, turn in enumerate(turns[start:]) if turn.strip()
    ]
    if rng.random() < 0.15:
        messages.insert(0, {"role": "system", "content": rng.choice(SYSTEMS)})
    return messages


def story_chat(rng: random.Random, story: str) -> list[Message]:
    """A request for a story and the story; its title is the first line."""
    title, _, body = story.strip().partition("\n")
    request = rng.choice(STORY_REQUESTS).format(title=title.strip())
    return [{"role": "user", "content": request}, {"role": "assistant", "content": body.strip() or title}]


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[np.ndarray]:
    """One document per text: the begin token and the text, every prediction counting."""
    for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False):
        yield np.array([BOS_ID, *encoding.ids], np.uint16) | COUNTS


def encode_chats(
    tokenizer: Tokenizer, chats: Sequence[tuple[list[Message], Sequence[dict[str, Any]]]], counting: frozenset[str]
) -> Iterator[np.ndarray]:
    """One document per (messages, tools); only the content and the end mark of turns whose role is in `counting` count."""
    turns = [render(messages, tools) for messages, tools in chats]
    encodings = iter(tokenizer.encode_batch_fast([text for chat in turns for _, text in chat], add_special_tokens=False))
    headers = {role: len(tokenizer.encode(f"{TURN}{role}\n", add_special_tokens=False)) for role in ("system", "user", "assistant", "tool")}
    for chat in turns:
        pieces = [np.array([BOS_ID], np.uint16)]
        for role, _ in chat:
            ids = np.array(next(encodings).ids, np.uint16)
            if role in counting:
                ids[headers[role] : -1] |= COUNTS
            pieces.append(ids)
        yield np.concatenate(pieces)
