"""Documents: what counts in the loss is what the assistant says."""

import random
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from checkpoints import conversations
from checkpoints.conversations import COUNTS, TOKEN
from checkpoints.vocabulary import END

TOKENIZER = Tokenizer.from_file(str(Path(__file__).parents[2] / "checkpoints" / "demo" / "tokenizer.json"))


def counted_text(document: np.ndarray) -> str:
    return TOKENIZER.decode((document[document >= COUNTS] & TOKEN).tolist(), skip_special_tokens=False)


def test_only_the_answer_and_its_end_count():
    messages = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
    (document,) = conversations.encode_chats(TOKENIZER, [(messages, ())], frozenset({"assistant"}))
    assert counted_text(document) == "4" + END
    assert TOKENIZER.decode((document & TOKEN).tolist(), skip_special_tokens=False).startswith("<|endoftext|><|im_start|>user\nWhat")


def test_both_sides_of_a_dialogue_count():
    messages = conversations.dialogue(random.Random(4), ["Hi.", "Hello.", "", "Bye."])
    assert [message["role"] for message in messages if message["role"] != "system"] == ["user", "assistant", "assistant"]
    (document,) = conversations.encode_chats(TOKENIZER, [(messages, ())], frozenset({"user", "assistant"}))
    assert counted_text(document) == "".join(text + END for text in ("Hi.", "Hello.", "Bye."))


def test_stories_are_told_without_their_title():
    chat = conversations.story_chat(random.Random(0), "The Fox\n\nA fox ran.\n")
    assert chat[1] == {"role": "assistant", "content": "A fox ran."}


def test_prose_counts_whole():
    (document,) = conversations.encode_texts(TOKENIZER, ["A fox ran."])
    assert counted_text(document) == "<|endoftext|>A fox ran."
