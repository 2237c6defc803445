# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Where would a 70B model fit, and how fast would it be?
#
# Before you rent a slice you can ask what it would do: `jaxinfer plan` needs the model's config.json and no accelerator. This notebook
# plans Llama 3.1 70B with int8 weights for eight TPU v5e, four v6e and one H200, and draws one picture.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jaxinfer") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "git+https://github.com/{{REPOSITORY}}", "matplotlib"], check=True)

# %% [markdown]
# ## The plans
# The plans that lie beside the notebook in `plans/` were made with the real compilers of TPUs and GPUs on a machine that has neither
# (`pip install 'jax[tpu]'` for TPUs, the CUDA plugin for NVIDIA): minutes for 80 layers on two cores; the command that made each stands
# in it. A slice without a kept plan is planned here by arithmetic alone (`compile=False`), in seconds: what programs need beside weights
# and cache is then a guess. Leave the argument out and the compiler is asked.

# %%
import json
from pathlib import Path

import jaxinfer
from jaxinfer.planner.outcome import Plan

SLICES = ("v5e-8", "v6e-4", "h200x1")


def planned(name):
    kept = Path("plans") / f"llama-3.1-70b-int8-{name}.json"
    if kept.exists():
        return Plan(**json.loads(kept.read_text())["plan"])
    return jaxinfer.plan("llama-3.1-70b", name, quantize="int8", context="8k", compile=False)


plans = {name: planned(name) for name in SLICES}

# %%
for name, plan in plans.items():
    verdict = "fits" if plan.fits else f"does not fit: {plan.memory['lacking'] / 2**30:.1f} GiB a device too much"
    print(f"{name}: {plan.target['devices']} x {plan.target['chip']}, {verdict}")
    print(f"  mesh {plan.settings['mesh']}, {plan.capacity['concurrency']} sequences of {plan.settings['context']} tokens at once")
    print(f"  {plan.speed['itl'] * 1e3:.0f} ms between tokens, {plan.speed['tokens_per_second']:,.0f} tokens/s in all")
    print(f"  a decode step is bound by {plan.phases['decode']['bound']}, a prompt by {plan.phases['prefill']['bound']}")

# %% [markdown]
# ## One picture
# On the left what a device's memory is spent on, on the right what a decode step's time is. The memory is arithmetic over described arrays,
# and for programs what the compiler says;
# the times are predictions, from efficiencies that were measured on an H200 and are assumptions for TPUs (`plan.notes` says which).

# %%
import matplotlib.pyplot as plt

GIB = 2**30
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
for axes, parts, values in (
    (left, ("weights", "programs", "slots", "kv_pool"), {name: plan.memory for name, plan in plans.items()}),
    (right, ("matmul", "attention", "small", "communication"), {name: plan.phases["decode"] for name, plan in plans.items()}),
):
    below = dict.fromkeys(plans, 0.0)
    for part in parts:
        heights = [values[name][part] / GIB if axes is left else values[name][part] * 1e3 for name in plans]
        axes.bar(list(plans), heights, bottom=list(below.values()), label=part.replace("kv_pool", "KV pool"))
        below = {name: below[name] + height for name, height in zip(plans, heights, strict=True)}
    axes.set_ylim(0, 1.45 * max(below.values()))
    axes.legend(fontsize=8, loc="upper left", ncols=2)
for place, plan in enumerate(plans.values()):
    left.hlines(plan.target["device_memory"] / GIB, place - 0.4, place + 0.4, color="black", linewidth=1)
left.set(title="Memory of a device (line: what arrays may use)", ylabel="GiB")
running = ", ".join(f"{plan.capacity['running']} on {name}" for name, plan in plans.items())
right.set(title="Time of a decode step", ylabel="ms", xlabel=f"sequences at once: {running}")
plt.show()

# %% [markdown]
# ## What to change next
# Every plan ends with what would help most, weighed by the same arithmetic, and with the command that starts the server.

# %%
for name, plan in plans.items():
    print(name, *(f"  {each['change']}: {each['effect']}" for each in plan.advice), f"  {plan.command}", sep="\n")
