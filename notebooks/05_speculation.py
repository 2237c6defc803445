# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Several tokens in one step: speculative decoding
#
# A model that writes one token reads all its weights for it. If somebody guesses the next few tokens, it can check all of them while it
# reads the weights once. jaxinfer keeps a guess only if it is exactly the token that it would have drawn there, so the text is the same
# with and without guesses; only the number of steps differs. This notebook shows that, and when it pays.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jaxinfer") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "git+https://github.com/{{REPOSITORY}}"], check=True)

# %% [markdown]
# ## Two engines
# One without guesses, and one that looks them up: what followed the same words the last time, in the prompt or in its own output.

# %%
from jaxinfer import LLM

settings = {"max_sequences": 1, "max_step_tokens": 64, "max_model_len": 512}
plain = LLM("demo", **settings)
lookup = LLM("demo", speculate="lookup", draft_tokens=4, **settings)

# %% [markdown]
# Copying is the best case: everything that follows stands in the prompt already.

# %%
words = "river stone garden yellow window seven apple cloud"
requests = {"copying": f"Repeat after me: {words} {words}", "a story": "Tell me a short story about a little dog."}


def run(llm, text, **sampling):
    before = llm.engine.metrics.steps_total
    answer = llm.chat([{"role": "user", "content": text}], max_tokens=40, ignore_eos=True, **sampling)
    return answer.token_ids, llm.engine.metrics.steps_total - before


for name, text in requests.items():
    for sampling in ({"temperature": 0}, {"temperature": 0.8, "top_p": 0.9, "seed": 7}):
        one, other = (run(llm, text, **sampling) for llm in (plain, lookup))
        print(f"{name}, temperature {sampling['temperature']}: the same tokens: {one[0] == other[0]}; {one[1]} and {other[1]} steps")

# %% [markdown]
# The same with a temperature: each token is drawn with noise that belongs to the request and the position, so the draw at a place is the
# same whoever guessed before it. How many guesses stood:

# %%
counts = lookup.engine.metrics
print(f"{counts.accepted_tokens} of {counts.draft_tokens} drafts stood, in {counts.drafts} steps; by place: {dict(counts.accepted_at)}")

# %% [markdown]
# ## Only when it pays
# Checking five tokens costs more than writing one. The engine measures both when it starts, keeps a history of how often guesses come true,
# and makes none where they would not pay: `speculate="auto"` also asks a small draft model where there is one.

# %%
for (way, rows), seconds in sorted(lookup.engine.speculator.costs.table().items()):
    print(f"{way!s:>8} step, {rows} row(s): {seconds * 1000:.2f} ms")
