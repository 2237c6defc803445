# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What does quantisation cost, on your own prompts?
#
# Weights of 8 or 4 bits and an 8-bit KV cache make a model smaller and faster, and a little different. `jaxinfer audit quant` measures how
# different, on prompts of your own, before you serve it. This notebook audits `int8` on the embedded demo model and reads the report.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jaxinfer") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "git+https://github.com/{{REPOSITORY}}"], check=True)

# %% [markdown]
# ## The prompts
# A file of JSON lines: `prompt` or `messages`, and a `completion` if you have a good one. Where there is none the unquantised model's own
# greedy continuation is scored. Take a few hundred lines of what your users really send; these few are for show.

# %%
import json
import tempfile
from pathlib import Path

lines = [
    {
        "prompt": "The ferry left before it was light, and the old man stood at the rail",
        "completion": " with his collar turned up, watching the lamps of the harbour grow small behind him.",
    },
    {
        "prompt": "When the rain stopped, the children ran down to the river",
        "completion": ", where the water had risen over the stones and carried the little bridge away.",
    },
    {"prompt": "She opened the letter slowly, for she knew the hand"},
    {"messages": [{"role": "user", "content": "What is 12 plus 30?"}], "completion": "12 + 30 = 42."},
]
folder = Path(tempfile.mkdtemp())
data = folder / "prompts.jsonl"
data.write_text("".join(json.dumps(line) + "\n" for line in lines))

# %% [markdown]
# ## The audit
# The same as on the command line: `python -m jaxinfer audit quant --schemes int8 --data prompts.jsonl --json --html audit.html`. Both
# models answer every prompt, both read the same texts, and their distributions are compared at every scored token, over the whole
# vocabulary. The exit code is 0 if every scheme's mean divergence is within `--max-kl` (0.02 nats unless you say otherwise), otherwise 1.

# %%
from contextlib import redirect_stdout
from io import StringIO

from jaxinfer.__main__ import main

page, result = folder / "audit.html", StringIO()
flags = ["--schemes", "int8", "--data", str(data), "--max-tokens", "16", "--repeat", "1", "--json", "--html", str(page)]
with redirect_stdout(result):
    code = main(["audit", "quant", *flags])
report = json.loads(result.getvalue())
int8 = report["schemes"][0]
print("exit code", code)
print(f"mean KL {int8['divergence']['mean']['value']:.6f} nats per token over {int8['divergence']['tokens']} tokens")
print(f"perplexity times {int8['perplexity_ratio']['value']:.5f}, top token changed at {int8['flips']:.1%} of places")
print(f"weights {report['reference']['sizes']['weights'] >> 10} KiB -> {int8['sizes']['weights'] >> 10} KiB")

# %% [markdown]
# ## What the number means
# KL(p || q) is the sum of p (log p - log q) over all tokens: the nats that one loses per token by believing the quantised model's q when
# text comes from the unquantised model's p. Zero means equal; 0.02 is about what it takes to turn a 50 % token into a 40 % one.

# %%
import numpy as np

p, q = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.36, 0.24])
print(f"{np.sum(p * np.log(p / q)):.4f} nats")

# %% [markdown]
# Means hide rare jumps, so the report keeps the tokens at which the two models differ most.

# %%
for item in int8["worst"][:3]:
    print(f"line {item['line']}, KL {item['divergence']:.5f}: ...{item['context'][-50:]!r} -> {item['token']!r}")
    for name in ("reference", "other"):
        print(f"  {name:>9}", "  ".join(f"{it['text']!r} {it['probability']:.1%}" for it in item[name]))

# %% [markdown]
# ## The page
# Everything on one self-contained page: verdict, distributions, divergence along the text, what it buys, the worst contexts, all figures.

# %%
from html import escape

from IPython.display import HTML

HTML(f'<iframe srcdoc="{escape(page.read_text())}" style="width: 100%; height: 720px; border: 0"></iframe>')

# %% [markdown]
# ## Serve only what was audited
# `--record` keeps the figures beside the weights, with a hash of them. With `--require-audit kl=0.02` a quantised model starts only if its
# record is of these very weights and within the budget. Nobody has recorded one here, so this is refused at once, with the command to run.

# %%
from jaxinfer import LLM
from jaxinfer.config import ConfigError

try:
    LLM("demo", quantize="int8", require_audit="kl=0.02")
except ConfigError as refused:
    print(refused)
