"""The strict bench: every test runs with strict dtype and rank promotion, 8 CPU devices, and shapes checked at run time.

Nothing here reaches an accelerator, the network or the user's cache folder.
"""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAXINFER_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxinfer-tests-")

from jaxtyping import install_import_hook

install_import_hook(["jaxinfer", "pallas_kernels"], "beartype.beartype")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
