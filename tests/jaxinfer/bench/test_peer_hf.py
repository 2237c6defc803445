"""The peer's script speaks JSON lines; static batches are padded on the left."""

import json
import subprocess
import sys

from jaxinfer.bench import peer_hf
from tests.jaxinfer.bench import stubs


def test_batches_are_padded_on_the_left():
    job = {"prompts": [[5], [6, 7], [8, 9, 10]], "outputs": [1, 4, 2], "batch": 2}
    assert list(peer_hf.batches(job, pad=3)) == [
        ([[3, 5], [6, 7]], [[0, 1], [1, 1]], 4),
        ([[8, 9, 10]], [[1, 1, 1]], 2),
    ]


def test_jobs_over_stdin(tmp_path):
    setup = {"model": "m", "threads": 2, "dtypes": ["float32"]}
    job = {"dtype": "float32", "prompts": [[1, 2], [3]], "outputs": [3, 5], "batch": 1}
    text = "".join(json.dumps(line) + "\n" for line in (setup, job, job))
    command = [sys.executable, "-B", peer_hf.__file__]
    path = {"PYTHONPATH": str(stubs.install(tmp_path))}
    answers = subprocess.run(command, input=text, capture_output=True, text=True, check=True, env=path)
    first, *rest = map(json.loads, answers.stdout.splitlines())
    assert first == {"versions": {"torch": "0", "transformers": "0", "threads": 2}}
    assert [answer["tokens"] for answer in rest] == [8, 8] and all(answer["seconds"] >= 0 for answer in rest)
