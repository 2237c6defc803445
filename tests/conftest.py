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
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # most of the suite's time is compiling
os.environ.setdefault("XLA_FLAGS", FAST)  # `XLA_FLAGS= pytest` tests programs as they are optimised for users
os.environ["JAXINFER_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxinfer-tests-")
atexit.register(shutil.rmtree, os.environ["JAXINFER_CACHE_DIR"], ignore_errors=True)

PLAIN = (
    "errors", "grammar", "config", "request", "batch", "cache.prefix", "cache.pages", "engine.policies", "engine.sequence", "engine.line",
    "engine.scheduler", "selftest.device", "selftest.machine", "selftest.mutations", "step.buckets",
    "engine.allowance", "engine.costs", "engine.guesses", "engine.history", "engine.pace", "engine.resting", "engine.speculation",
    "engine.thoughts", "engine.proposers.draft", "engine.proposers.eagle", "engine.proposers.lookup", "engine.proposers.proposal",
)  # fmt: skip
for name in PLAIN:
    import_module(f"jaxinfer.{name}")

from jaxtyping import install_import_hook

install_import_hook(["jaxinfer", "pallas_kernels"], "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("steady", derandomize=True)  # a red suite says something about the change
hypothesis.settings.load_profile("steady")

ENGINES = tuple(f"tests/jaxinfer/{name}.py" for name in (
    "bench/test_forced", "bench/test_speculation", "engine/test_engine", "engine/test_setup", "engine/test_speculation",
    "engine/test_timing", "planner/test_bundling", "selftest/test_r5", "step/test_bundle", "step/test_executable", "step/test_keys",
    "step/test_program", "step/test_propose", "train/test_acceptance",
))  # fmt: skip
SCHOOL = tuple(f"tests/jaxinfer/train/test_{name}.py" for name in ("distill", "draft", "learner", "student"))
LONG = tuple(f"tests/{name}.py" for name in ("notebooks/test_run", "checkpoints/test_train_demo", "e2e/test_serve"))  # begun first
APART = ("tests/notebooks/test_run.py", *(f"tests/pallas_kernels/{op}_attention/test_gpu.py" for op in ("paged", "flash")))

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests run on one worker, and so do files that share what the conftests have compiled; tests of some files share nothing.
    What takes long is begun first, so that no worker ends long before the others."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            shared = {"engines": ENGINES, "school": SCHOOL}
            return nodeid if file in APART else next((name for name, files in shared.items() if file in files), file)

        def _assign_work_unit(self, node):
            for scope in [scope for scope in reversed(self.workqueue) if scope.startswith(LONG)]:
                self.workqueue.move_to_end(scope, last=False)
            super()._assign_work_unit(node)

    return Scheduling(config, log)
