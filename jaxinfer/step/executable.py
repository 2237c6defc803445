"""One compiled program: what it is before it is traced, where it comes from, and as bytes that another process can run.

A `Call` names a function and describes its arguments. A `Source` makes it run: `Compiler` traces and compiles it, a bundle (bundle.py)
loads what was compiled elsewhere. `dump` takes the runtime's bytes of a compiled program and a description of its results in JSON; `load`
makes of both, and of the arguments that we describe ourselves, the same thing that jax makes when it compiles: dispatch, donation and
checks are jax's own. Nothing is pickled. The only file that knows how jax keeps its executables inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from itertools import cycle
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer.config import ConfigError
from jaxinfer.sampling import Sampled, unchecked
from jaxinfer.step.forward import Computed, DraftRows, RowInputs
from jaxinfer.step.score import Scored
from jaxinfer.step.sizes import ProgramSize
from jaxinfer.step.slots import Slots
from jaxinfer.step.verify import Verified
from pallas_kernels import QuantizedKV

# what results are made of, beside plain tuples
NODES: dict[str, Any] = {cls.__name__: cls for cls in (Computed, DraftRows, QuantizedKV, RowInputs, Sampled, Scored, Slots, Verified)}


@dataclass(frozen=True)
class Call:
    """A function with descriptions of its arguments (each with its sharding). donated: which of them it takes over. keep_unused: also
    those that it does not read, which are memory for results of the same shapes. options: of XLA, by name, for this program alone."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    out_shardings: Any
    donated: tuple[int, ...] = ()
    keep_unused: bool = False
    options: Mapping[str, str | bool] = field(default_factory=dict)

    def lower(self) -> Any:
        """Trace it."""
        made = jax.jit(self.function, donate_argnums=self.donated, out_shardings=self.out_shardings, keep_unused=self.keep_unused)
        return made.lower(*self.arguments)

    @property
    def inputs(self) -> Iterator[str]:
        """Each argument array in words: what a program must have been compiled for to be called so."""
        return (_words(leaf) for leaf in jax.tree.leaves(self.arguments))


@dataclass(frozen=True)
class InPlace:
    """A function with one argument more, the last: memory for its results, so that these lie where they lay before."""

    function: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        """The function of all but the last."""
        return self.function(*arguments[:-1])


class Made(NamedTuple):
    """A program that runs, and what it takes on a device."""

    run: Any
    size: ProgramSize


@runtime_checkable
class Source(Protocol):
    """Where programs come from."""

    @property
    def stage(self) -> str:
        """What making them is called in reports of progress."""
        ...

    def begin(self, key: Any, call: Call) -> Callable[[], Made]:
        """Do what one thread must do, and return what any other may do meanwhile."""
        ...


@dataclass(frozen=True)
class Compiler:
    """Programs are traced and compiled here. options: of XLA, by name, for all programs; a program's own come on top."""

    options: Mapping[str, str | bool] | None = None
    stage: str = "compile"

    def begin(self, key: Any, call: Call) -> Callable[[], Made]:
        """Trace; the returned function compiles, and raises ConfigError where XLA refuses with the options."""
        lowered, options = call.lower(), {**(self.options or {}), **call.options}

        def compiled() -> Made:
            made = self._with_options(lowered, options) if options else lowered.compile()
            return Made(made, ProgramSize.of(made))

        return compiled

    def _with_options(self, lowered: Any, options: dict[str, str | bool]) -> Any:
        try:
            return lowered.compile(options)
        except jax.errors.JaxRuntimeError as error:
            raise ConfigError(f"XLA refuses {options}: {str(error)[:1000]}") from None


@dataclass(frozen=True)
class Sharing(Compiler):
    """As `Compiler`, but a program that is like one compiled before is that one. known: calls by key, and what came of them."""

    known: dict[Any, list[tuple[Call, Made]]] = field(default_factory=dict)

    def begin(self, key: Any, call: Call) -> Callable[[], Made]:
        """Trace what is new; the returned function compiles it, or says what is known."""
        known = next((made for other, made in self.known.get(key, ()) if other == call), None)
        if known is not None:
            return lambda: known
        compiled = super().begin(key, call)

        def kept() -> Made:
            made = compiled()
            self.known.setdefault(key, []).append((call, made))
            return made

        return kept


_usual: ContextVar[Source | None] = ContextVar("jaxinfer_usual_source", default=None)


@contextmanager
def sharing() -> Iterator[None]:
    """Inside, several engines compile what they have in common once. They may not be at work at the same time: on a GPU a program's
    launches are kept with it."""
    token = _usual.set(Sharing())
    try:
        yield
    finally:
        _usual.reset(token)


def usual() -> Source:
    """Where programs come from, unless somebody says."""
    return _usual.get() or Compiler()


class Dumped(NamedTuple):
    """A compiled program as the runtime's bytes and a description of the rest, ready for JSON."""

    data: bytes
    description: dict[str, Any]


def dump(compiled: Any) -> Dumped:
    """Take a compiled program apart.

    Raises:
        NotImplementedError: it has something that a description does not hold: constants beside it, or layouts other than the default.
    """
    inside = compiled._executable
    if compiled._params.const_args or any(layout is not None for layout in inside._dispatch_in_layouts):
        raise NotImplementedError("a program with constants beside it or with layouts of its own cannot be kept in a bundle")
    shardings = jax.tree.leaves(compiled.output_shardings)
    results = [jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=at) for aval, at in zip(inside.out_avals, shardings, strict=True)]
    dropped = sorted(set(range(len(jax.tree.leaves(compiled.args_info)))) - set(inside._kept_var_idx))
    outputs = to_json(jax.tree.unflatten(compiled.out_tree, results))
    description = {"name": inside._unloaded_executable.name, "dropped": dropped, "outputs": outputs}
    return Dumped(compiled.runtime_executable().serialize(), description)


def load(data: bytes, description: Mapping[str, Any], arguments: tuple[Any, ...], mesh: Mesh) -> jax.stages.Compiled:
    """Put a program together on the mesh's devices, to be called with arguments as described; those it does not use were `dropped`."""
    from jax._src import core, stages
    from jax._src.interpreters import pxla
    from jax._src.lib import xla_client  # pyright: ignore[reportPrivateImportUsage]

    found, client = xla_client.DeviceList(tuple(mesh.devices.flat)), mesh.devices.flat[0].client
    flat = jax.tree.leaves(arguments)
    kept = set(range(len(flat))) - set(description["dropped"])
    inputs = [leaf for number, leaf in enumerate(flat) if number in kept]
    outputs, out_tree = jax.tree.flatten(from_json(description["outputs"], mesh))

    def aval(leaf: Any) -> Any:
        return core.ShapedArray(leaf.shape, leaf.dtype)

    default: list[None] = [None] * len(inputs)
    unloaded = pxla.UnloadedMeshExecutable(
        xla_executable=client.deserialize_executable(data, executable_devices=found), device_list=found, backend=client,
        input_avals=[aval(leaf) for leaf in inputs], input_shardings=[leaf.sharding for leaf in inputs],
        output_avals=[aval(leaf) for leaf in outputs], output_shardings=[leaf.sharding for leaf in outputs],
        committed=True, name=description["name"], unordered_effects=[], ordered_effects=[], keepalive=[], host_callbacks=[],
        kept_var_idx=kept, mut=None, xla_in_layouts=default, dispatch_in_layouts=default, xla_out_layouts=[None] * len(outputs),
        all_args_info=None, pgle_profiler=None,
    )  # fmt: skip
    described = stages.make_args_info(jax.tree.structure((arguments, {})), (jax.tree.map(aval, arguments), {}), ())
    return jax.stages.Compiled(unloaded.load(), [], described, out_tree, no_kwargs=True)


class InTurns:
    """Copies of a program that run in turns. XLA launches a program on a GPU as a command buffer, and before each launch writes anew what
    deals with arrays that lie elsewhere than at the one before. Two steps are in the air at a time, so what a step makes lies where it lay
    two steps earlier: each of two copies finds all in its place, and its own command buffer is not running."""

    def __init__(self, *runs: Callable[..., Any]) -> None:
        self._runs = cycle(runs)

    def __call__(self, *arguments: Any) -> Any:
        """What the copy whose turn it is makes of them."""
        return next(self._runs)(*arguments)


def twin(compiled: Any, call: Call, mesh: Mesh) -> jax.stages.Compiled:
    """A second copy of a program on the mesh's devices."""
    data, description = dump(compiled)
    return load(data, description, call.arguments, mesh)


def to_json(tree: Any) -> Any:
    """Described results (tuples and `NODES` of ShapeDtypeStructs) as JSON.

    Raises:
        NotImplementedError: results made of something else.
    """
    if isinstance(tree, jax.ShapeDtypeStruct):
        return {"shape": list(tree.shape), "dtype": tree.dtype.name, "spec": _spec(tree.sharding)}
    if type(tree) is tuple:
        return [to_json(part) for part in tree]
    name = type(tree).__name__
    if NODES.get(name) is not type(tree):
        raise NotImplementedError(f"results made of {name} cannot be described in a bundle; add it to NODES in {__name__}")
    names = getattr(tree, "_fields", None) or [field.name for field in fields(tree)]
    return {"node": name, "fields": {field: to_json(getattr(tree, field)) for field in names}}


def from_json(value: Any, mesh: Mesh) -> Any:
    """The inverse of `to_json`, on a mesh."""
    if isinstance(value, list):
        return tuple(from_json(part, mesh) for part in value)
    if "node" in value:
        cls, parts = NODES[value["node"]], {name: from_json(part, mesh) for name, part in value["fields"].items()}
        return cls(**parts) if issubclass(cls, tuple) else unchecked(cls, parts)
    spec = PartitionSpec(*(tuple(axis) if isinstance(axis, list) else axis for axis in value["spec"]))
    return jax.ShapeDtypeStruct(tuple(value["shape"]), jnp.dtype(value["dtype"]), sharding=NamedSharding(mesh, spec))


def _words(leaf: Any) -> str:
    return f"{leaf.dtype.name}{list(leaf.shape)}{_spec(leaf.sharding)}"


def _spec(sharding: Any) -> list[Any]:
    if not isinstance(sharding, NamedSharding):
        raise NotImplementedError(f"arrays of a bundle's programs have named shardings, found {sharding}")
    return [list(axis) if isinstance(axis, tuple) else axis for axis in sharding.spec]
