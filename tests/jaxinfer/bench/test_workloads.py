"""Workloads are the same each time and fit whatever context there is."""

import pytest

from jaxinfer.bench.workloads import DEFAULT, GOALS, NAMES, workloads


def common(prompts):
    """How many tokens all of them begin with."""
    return next(at for at, column in enumerate(zip(*prompts, strict=False)) if len(set(column)) > 1)


def test_they_are_fixed():
    full = workloads(NAMES, 8192, 2048)
    assert [work.name for work in full] == list(NAMES) and full == workloads(NAMES, 8192, 2048)
    assert [(len(work.prompts), work.tokens) for work in full[:2]] == [(1, 128), (16, 2048)]
    assert len(set(map(len, full[2].prompts))) > 30 and len(set(full[2].outputs)) > 30
    assert full[0].prompts[0][:4] == (2041, 782, 5531, 5891)  # as in the results that are kept
    assert set(GOALS) == {work.name for work in full if work.batches}


def test_one_of_them_is_the_same_alone():
    for work in workloads(NAMES, 300, 2048):
        assert workloads([work.name], 300, 2048) == (work,)
    assert "batch-512" not in DEFAULT


def test_the_shared_beginning():
    (work,) = workloads(["shared-64"], 8192)
    tails = [len(prompt) - 1024 for prompt in work.prompts]
    assert len(work.prompts) == 64 and common(work.prompts) == 1024 and len(set(work.prompts)) == 64
    assert min(*tails, *work.outputs) >= 16 and max(*tails, *work.outputs) <= 64 and len(set(tails)) > 20
    (cut,) = workloads(["shared-64"], 8192, 512)
    assert common(cut.prompts) == 512 - 64 - max(cut.outputs)


def test_the_large_batch():
    (work,) = workloads(["batch-512"], 8192)
    assert {len(prompt) for prompt in work.prompts} == {1024} and work.outputs == (256,) * 512 and work.longest == 1280
    assert common(work.prompts) == 0 and workloads(["batch-512"], 8192, 1280) == (work,)
    (cut,) = workloads(["batch-512"], 8192, 1000)
    assert (len(cut.prompts[0]), cut.outputs[0]) == (744, 256)


@pytest.mark.parametrize("length", [2, 3, 64, 160, 1000])
@pytest.mark.parametrize("scale", [0.001, 1.0])
def test_they_are_cut_to_the_context(length, scale):
    for work in workloads(NAMES, 8192, length, scale):
        assert work.longest <= length and all(work.prompts) and min(work.outputs) >= 1


def test_what_fits_is_not_cut():
    for work in workloads(NAMES, 8192):
        assert workloads([work.name], 8192, work.longest if work.name != "shared-64" else 1024 + 64 + 64) == (work,)
