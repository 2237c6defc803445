"""Windows: each begins with a document, nothing of a held-out book is lost or counted twice."""

import json
import lzma
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from checkpoints import corpus
from checkpoints.conversations import TOKEN
from checkpoints.vocabulary import BOS_ID

FILE = Path(__file__).parents[2] / "checkpoints" / "demo" / "tokenizer.json"


def test_every_window_begins_with_a_document():
    texts = corpus.generated_texts(0, 40)
    pools = corpus.make_pools(texts, FILE, corpus.PoolSettings(64, 48, 8000, 0.3, 0, 1))
    assert pools.prose.shape[1:] == (65,) and pools.chat.shape[1:] == (49,)
    for windows in (pools.prose, pools.chat):
        assert windows.dtype == np.uint16 and len(windows) > 20
        assert ((windows[:, 0] & TOKEN) == BOS_ID).all()


def test_packing_cuts_the_last_document_and_says_when_there_is_too_little():
    documents = [np.array([0, 1, 2, 3], np.uint16), np.array([0, 4, 5, 6], np.uint16)]
    part = (np.concatenate(documents), np.array([4, 4]))
    (window,) = corpus.pack([part], 5, 0)
    assert window.tolist() in ([0, 1, 2, 3, 0, 4], [0, 4, 5, 6, 0, 1])
    with pytest.raises(ValueError, match="8 tokens"):
        corpus.pack([part], 20, 0)


def test_held_out_windows_hold_every_token_once():
    texts = corpus.generated_texts(1, 10)
    tokenizer = Tokenizer.from_file(str(FILE))
    windows, size = corpus.held_out_windows(texts, tokenizer, 32)
    kept = windows[:, 1:][windows[:, 1:] >= 0]
    assert tokenizer.decode(kept.tolist()) == texts.held_out[0]
    assert size == len(texts.held_out[0].encode()) and (windows[:, 0] == BOS_ID).all()


def test_texts_are_read_from_their_files(tmp_path: Path):
    for name, text in (("prose", "Book one.\fBook two."), ("prose_heldout", "Kept."), ("stories", "Title\n\nOne line\nbroken.\f")):
        (tmp_path / f"{name}.txt.xz").write_bytes(lzma.compress(text.encode()))
    (tmp_path / "dialogues.jsonl.xz").write_bytes(lzma.compress((json.dumps(["Hi.", "Ho."]) + "\n").encode()))
    texts = corpus.read_texts(tmp_path)
    assert texts.books == ["Book one.", "Book two."] and texts.held_out == ["Kept."]
    assert texts.stories == ["Title\n\nOne line broken."] and texts.dialogues == [["Hi.", "Ho."]]
