"""The peer of `throughput`: Hugging Face `generate` with torch, run as a script by the interpreter that `--peer` names.

It stands alone (that interpreter has torch and transformers, not jaxinfer) and talks JSON lines: on stdin first
{"model", "threads", "dtypes"}, answered with {"versions"}; then jobs {"dtype", "prompts", "outputs", "batch"}, each answered with
{"seconds", "tokens"}. Prompts (token ids) run in static batches of `batch`, in the order given, padded on the left; a batch runs until
its longest output is done, and only the tokens that were asked for count. The end of stdin ends it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def batches(job: dict[str, Any], pad: int) -> Iterator[tuple[list[list[int]], list[list[int]], int]]:
    """Left-padded ids, attention mask and new tokens of each static batch."""
    for first in range(0, len(job["prompts"]), job["batch"]):
        prompts = job["prompts"][first : first + job["batch"]]
        width = max(map(len, prompts))
        ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        yield ids, mask, max(job["outputs"][first : first + job["batch"]])


def measure(model: Any, job: dict[str, Any], pad: int) -> dict[str, Any]:
    """Run one job and time it."""
    import torch

    start = time.perf_counter()
    for ids, mask, length in batches(job, pad):
        made = model.generate(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), do_sample=False, min_new_tokens=length, max_new_tokens=length,
            pad_token_id=pad,
        )  # fmt: skip
        if made.shape[1] != len(ids[0]) + length:
            raise RuntimeError(f"generate made {made.shape[1] - len(ids[0])} tokens instead of {length}")
    return {"seconds": time.perf_counter() - start, "tokens": sum(job["outputs"])}


def main() -> None:
    """Serve jobs from stdin."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]  # the files beside this one are not the peer's modules
    import torch
    import transformers

    setup = json.loads(sys.stdin.readline())
    torch.set_num_threads(setup["threads"])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    models: dict[str, Any] = {}
    for dtype in setup["dtypes"]:
        models[dtype] = transformers.AutoModelForCausalLM.from_pretrained(setup["model"], dtype=getattr(torch, dtype)).eval()
        models[dtype].generation_config = transformers.GenerationConfig()  # greedy, nothing of the model's own defaults
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()}
    print(json.dumps({"versions": versions}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        with torch.inference_mode():
            print(json.dumps(measure(models[job["dtype"]], job, setup.get("pad", 0))), flush=True)


if __name__ == "__main__":
    main()
