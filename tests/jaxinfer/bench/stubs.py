"""Just enough of torch and transformers, as source text, for the peer's script: generation appends zeros."""

TORCH = """
import contextlib
__version__, float32, bfloat16 = "0", "f32", "b16"
class tensor:
    def __init__(self, rows): self.rows = rows; self.shape = (len(rows), len(rows[0]))
def set_num_threads(n): globals().update(threads=n)
def get_num_threads(): return threads
inference_mode = contextlib.nullcontext
"""
TRANSFORMERS = """
import types, torch
import importlib.util
assert importlib.util.find_spec("kernels") is None, "the folder of the peer's script must not be on its path"
__version__ = "0"
logging = types.SimpleNamespace(set_verbosity_error=lambda: None, disable_progress_bar=lambda: None)
class GenerationConfig: pass
class Model:
    def eval(self): return self
    def generate(self, *, input_ids, attention_mask, do_sample, min_new_tokens, max_new_tokens, pad_token_id):
        assert (min_new_tokens, do_sample, input_ids.shape) == (max_new_tokens, False, attention_mask.shape)
        return torch.tensor([row + [0] * max_new_tokens for row in input_ids.rows])
class AutoModelForCausalLM:
    @staticmethod
    def from_pretrained(path, dtype): return Model()
"""


def install(folder):
    """Write both into a folder, to be put in front of a peer's module path."""
    for name, text in (("torch", TORCH), ("transformers", TRANSFORMERS)):
        (folder / f"{name}.py").write_text(text)
    return folder
