"""The strict bench: every test runs with strict dtype and rank promotion, 8 CPU devices, and shapes checked at run time.

Types are checked as Python means them: an int is a float (PEP 484). The plain-Python core stands outside: it has no shapes, its checks
are given bad values on purpose, and the random walks call it a million times. Nothing here reaches an accelerator, the network or
the user's cache folder.
"""

import atexit
import os
import shutil
import tempfile
from importlib import import_module

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAXINFER_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxinfer-tests-")
atexit.register(shutil.rmtree, os.environ["JAXINFER_CACHE_DIR"], ignore_errors=True)

PLAIN = ("config", "request", "batch", "cache.pages", "engine.policies", "engine.scheduler", "step.buckets")
for name in PLAIN:
    import_module(f"jaxinfer.{name}")

from jaxtyping import install_import_hook

install_import_hook(["jaxinfer", "pallas_kernels"], "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
