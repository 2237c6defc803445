# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Generate text with jaxinfer
#
# jaxinfer runs large language models with JAX on TPUs, GPUs and CPUs. A small demo model comes with it, so everything here works
# offline and in seconds; `model="OWNER/NAME"` loads any supported model from Hugging Face instead.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jaxinfer") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "git+https://github.com/{{REPOSITORY}}"], check=True)

# %% [markdown]
# The last section shards a model over several devices. A machine with only a CPU can show as many virtual ones as we like, if it is told
# before jax is first used (elsewhere this setting changes nothing).

# %%
import jax

jax.config.update("jax_num_cpu_devices", 2)

# %% [markdown]
# ## One line
# The first call loads the model and compiles its programs; the next ones start at once.

# %%
from jaxinfer import generate

print(generate("Once upon a time", max_tokens=40, temperature=0).text)

# %% [markdown]
# Several prompts run in one batch, results in the same order. With `n` each prompt gets several completions; a `seed` makes samples
# repeatable.

# %%
for completion in generate(["The old man", "The little boat"], n=2, seed=7, max_tokens=24):
    print(completion.index, completion.finish_reason, repr(completion.text))

# %% [markdown]
# ## Keep a model: stream and chat
# An `LLM` holds a model with settings of its own. A smaller engine (fewer sequences at once) compiles faster.

# %%
from jaxinfer import LLM

llm = LLM(max_sequences=2, max_step_tokens=64)
for piece in llm.stream("It was a dark night and", max_tokens=40, temperature=0.7, seed=1):
    print(piece.text, end="", flush=True)

# %%
messages = [{"role": "user", "content": "What is 12 plus 30?"}]
answer = llm.chat(messages, max_tokens=40, temperature=0)
print(answer.text, f"({answer.prompt_tokens} tokens in, {len(answer.token_ids)} out)")

# %% [markdown]
# ## How sure is the model?
# `logprobs=k` reports the log probability of every token and of the `k` most likely ones. Here the colour of a token shows how likely it
# was; hover to see what else the model thought of.

# %%
from html import escape
from math import exp

from IPython.display import HTML


def colour(token, tokenizer):
    """One token as a span: green when it was likely, red when it was not."""
    others = ", ".join(f"{tokenizer.token_text(other)!r} {exp(value):.0%}" for other, value in token.top)
    hue = f"hsl({120 * exp(token.logprob):.0f} 70% 85%)"
    return f'<span style="background:{hue};color:#000" title="{escape(others)}">{escape(tokenizer.token_text(token.token))}</span>'


sure = llm.generate("The sun rises in the", max_tokens=24, temperature=0, logprobs=3)
HTML("<pre style='white-space:pre-wrap'>" + "".join(colour(token, llm.tokenizer) for token in sure.logprobs) + "</pre>")

# %% [markdown]
# ## A mesh
# `mesh="tensor=2"` shards weights and KV cache over two devices, `data=2` doubles the batch. In float32 the greedy tokens are the same.

# %%
with LLM(mesh="tensor=2", max_sequences=1, max_step_tokens=32, dtype="float32") as sharded:
    print(sharded.engine.info.mesh, "on", sharded.engine.info.device)
    print(sharded.generate("Once upon a time", max_tokens=40, temperature=0).text)

# %%
llm.close()
