"""JAX/XLA inference for large language models on TPUs and GPUs: `generate`, `LLM`, `SamplingParams`, `Grammar` and `plan`.

The names are found on first use (PEP 562), so that `import jaxinfer` neither imports jax nor touches a device: the command line
answers `--help` at once, and a program may still choose its platform after the import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxinfer.api import LLM, Completion, generate
    from jaxinfer.grammar import Grammar
    from jaxinfer.planner.planning import plan
    from jaxinfer.request import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "Grammar", "SamplingParams", "__version__", "generate", "plan"]

_HOME = {
    "LLM": "jaxinfer.api", "Completion": "jaxinfer.api", "generate": "jaxinfer.api", "SamplingParams": "jaxinfer.request",
    "Grammar": "jaxinfer.grammar", "plan": "jaxinfer.planner.planning",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it.

    Raises:
        AttributeError: the package has no such name.
    """
    if name not in _HOME:
        raise AttributeError(f"module 'jaxinfer' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
