"""A state comes back bit for bit; what is not of this run, or not whole, is refused or passed over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.train.learner import State
from jaxinfer.train.state import Run

SETTINGS = {"target": "a", "recipe": {"steps": 3}}


def state_of(number):
    values = jax.random.normal(jax.random.key(number), (3, 4))
    return State({"w": values}, ({"w": values + 1},), jnp.zeros(5), jnp.int32(number))


def equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_the_last_whole_state_comes_back(tmp_path):
    run, first = Run(tmp_path / "run", SETTINGS), state_of(0)
    assert run.restore(first) is first
    for number in (1, 2):
        run.save(state_of(number))
    (tmp_path / "run" / "step-00000009.orbax-checkpoint-tmp").mkdir()  # what a kill leaves
    assert equal(Run(tmp_path / "run", SETTINGS).restore(first), state_of(2))
    assert (tmp_path / "run" / "step-00000002").is_dir() and not (tmp_path / "run" / "step-00000001").exists()
    run.save(state_of(3))
    assert equal(run.restore(first), state_of(3)) and [path.name for path in (tmp_path / "run").glob("step-*")] == ["step-00000003"]
    for path in (tmp_path / "run" / "step-00000003").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="begin anew"):
        run.restore(first)
    run.remove()
    assert not (tmp_path / "run").exists()


def test_another_run_does_not_go_on(tmp_path):
    Run(tmp_path, SETTINGS).note("before", {"share": 0.5})
    assert Run(tmp_path, SETTINGS).noted("before") == {"share": 0.5} and Run(tmp_path, SETTINGS).noted("after") is None
    with pytest.raises(CheckpointError, match=r"a run with another recipe was begun here \(was recipe {'steps': 3}\)"):
        Run(tmp_path, SETTINGS | {"recipe": {"steps": 4}})


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis").write_text("mine")
    with pytest.raises(CheckpointError, match="found other files"):
        Run(tmp_path, SETTINGS)
