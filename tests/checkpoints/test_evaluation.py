"""Evaluation: greedy decoding continues a prompt, the summed loss leaves padding out."""

import jax
import numpy as np
import pytest

from checkpoints import evaluation, network
from checkpoints.export import Shape
from checkpoints.skills import ask

SHAPE = Shape(50, 16, 24, 1, 2, 1, 8, 64)


def test_a_prompt_ends_where_the_answer_begins():
    prompt, answer = evaluation.prompt_and_answer(ask("What is 1 + 1?", "2"))
    assert prompt == "<|endoftext|><|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n" and answer == "2"


def test_rows_do_not_depend_on_their_neighbours():
    net, params = network.make(SHAPE, 0, "xla")
    decoder = evaluation.Decoder(net, params, 2, 24)
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [11]]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        together = decoder.generate(prompts, 6)
        alone = [decoder.generate([prompt], 6)[0] for prompt in prompts]
    assert together == alone and max(map(len, together)) == 6
    with pytest.raises(ValueError, match="do not fit into 24"):
        decoder.generate([list(range(20))], 6)


def test_padding_is_left_out_of_the_loss():
    net, params = network.make(SHAPE, 0, "xla")
    windows = np.array([[0, 5, 6, 7, 8], [0, 9, 10, -1, -1]], np.int32)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        both, best = evaluation.next_token_losses(net, params, windows, 4)
        first, _ = evaluation.next_token_losses(net, params, windows[:1], 1)
        second, _ = evaluation.next_token_losses(net, params, windows[1:, :3], 1)
    assert both == pytest.approx(first + second, rel=1e-2) and best.shape == (2, 4)
    assert both == pytest.approx(6 * np.log(50), rel=0.2)
