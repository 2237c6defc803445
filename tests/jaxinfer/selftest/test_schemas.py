"""Random schemas: valid, varied, repeatable, and short to satisfy."""

import json

import jsonschema
import numpy as np

from jaxinfer.engine.grammar import Grammars
from jaxinfer.grammar import Grammar
from jaxinfer.sampling import mask_words
from jaxinfer.selftest.schemas import random_schema
from tests.fakes import byte_tokenizer

LONGEST = 600


def test_schemas_are_valid_repeatable_and_varied():
    schemas = [random_schema(seed) for seed in range(100)]
    assert schemas == [random_schema(seed) for seed in range(100)]
    assert len({json.dumps(schema) for schema in schemas}) > 95
    for schema in schemas:
        jsonschema.Draft202012Validator.check_schema(schema)


def test_even_random_tokens_come_to_a_valid_end():
    tokenizer = byte_tokenizer()
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    row = np.zeros(mask_words(tokenizer.vocab_size), np.uint32)
    for seed in range(12):
        schema, draw, tokens = random_schema(seed), np.random.default_rng(seed), []
        matcher = grammars.matcher(Grammar.json_schema(schema))
        while not matcher.finished:
            matcher.fill(row)
            tokens.append(int(draw.choice(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")))))
            matcher.accept(tokens[-1])
        jsonschema.validate(json.loads(tokenizer.decode(tokens)), schema)
        assert len(tokens) < LONGEST
    grammars.close()
