"""Orbax checkpoints of our own arrays: joined and quantised as the model takes them, restored straight onto the mesh.

config.json says `"quantization_config": {"quant_method": "jaxinfer", "scheme": ...}`; the scheme tells the description of every array.
The arrays lie in `orbax/00000`, `orbax/00001`, ...: each a checkpoint that Orbax alone can read, of as many weights as fit a limit, so
that neither writing nor reading holds more than one of them on the host. Orbax does not notice a changed byte in the numbers; the manifest
(manifest.py) must be there and is compared before anything is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from jaxinfer.checkpoint import manifest
from jaxinfer.checkpoint.errors import CheckpointError, broken
from jaxinfer.checkpoint.formats.find import FIELD
from jaxinfer.checkpoint.formats.quantised import Options
from jaxinfer.models.graph import Graph, Quantization, Spec, Weight, arrays_of
from jaxinfer.quant.qarray import FIELDS, QSpec
from jaxinfer.sharding import ArraySpec, Rules, named

QUANT_METHOD = "jaxinfer"
FOLDER = "orbax"
PART_BYTES = 1 << 28
PLAIN = "array"  # the one array of a weight that is not quantised
VERSION = 1

Tree = dict[str, dict[str, Any]]


def written_here(config: Mapping[str, Any]) -> bool:
    """Whether a config.json belongs to an Orbax checkpoint of this package."""
    options = config.get(FIELD)
    return isinstance(options, dict) and options.get("quant_method") == QUANT_METHOD


def quantization_config(quantization: Quantization) -> dict[str, Any]:
    """What config.json says of the weights."""
    return {"quant_method": QUANT_METHOD, "version": VERSION, "scheme": str(quantization)}


def quantization(config: Mapping[str, Any], file: Path) -> Quantization:
    """The rules by which the weights were quantised.

    Raises:
        CheckpointError: config.json does not say them, or says more. ConfigError: a scheme that does not exist.
    """
    options = Options(config[FIELD], file)
    options.one_of("version", (VERSION,), remedy="use the version of jaxinfer that wrote it")
    options.finish("quant_method version scheme")
    scheme = options.values.get("scheme")
    if not isinstance(scheme, str):
        raise broken(file, f"{FIELD}.scheme, such as 'int8'", scheme)
    return Quantization.parse(scheme)


def save(folder: Path, graph: Graph, weights: Iterable[Weight]) -> int:
    """Write weights, which come in the graph's order, as one part after another; the bytes of all arrays."""
    tree: Tree = {}
    size, total, parts = 0, 0, 0

    def flush() -> None:
        nonlocal tree, size, parts
        if tree:
            _save_part(folder / FOLDER / f"{parts:05d}", tree)
            tree, size, parts = {}, 0, parts + 1

    for name, spec, weight in zip(graph.names, graph.specs, weights, strict=True):
        if size + spec.nbytes > PART_BYTES:
            flush()
        tree[name] = dict(zip(_keys(spec), jax.tree.leaves(weight), strict=True))
        size, total = size + spec.nbytes, total + spec.nbytes
    flush()
    return total


def load(
    folder: Path, graph: Graph, mesh: Mesh, rules: Rules, *, progress: Callable[[int, int], None] | None = None
) -> dict[str, Weight]:
    """The weights on the mesh; each device reads its shards.

    Raises:
        CheckpointError: no manifest, a file that is not what it was, arrays that are not the graph's.
    """
    manifest.require(folder)
    manifest.verify(folder, weights=True)
    specs = dict(zip(graph.names, graph.specs, strict=True))
    found: dict[str, Weight] = {}
    done = 0
    for part, shapes in _described(folder, graph):
        for name, weight in _load_part(part, shapes, specs, mesh, rules).items():
            found[name] = weight
            done += specs[name].nbytes
            if progress is not None:
                progress(done, graph.nbytes)
    return {name: found[name] for name in graph.names}


def verify(folder: Path) -> None:
    """Check that every file of the manifest is there in its size, without reading any.

    Raises:
        CheckpointError: one is not, or there is no manifest.
    """
    manifest.require(folder)
    manifest.verify(folder, weights=True, hashes=False)


def _keys(spec: Spec) -> Sequence[str]:
    return [name for name in FIELDS if getattr(spec, name) is not None] if isinstance(spec, QSpec) else [PLAIN]


def _save_part(path: Path, tree: Tree) -> None:
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), tree)


def _described(folder: Path, graph: Graph) -> Iterator[tuple[Path, Tree]]:
    """Each part and the shapes and dtypes in it, compared with the graph."""
    import orbax.checkpoint as ocp

    parts = sorted((folder / FOLDER).iterdir()) if (folder / FOLDER).is_dir() else []
    described = []
    with ocp.PyTreeCheckpointer() as checkpointer:
        for part in parts:
            try:
                described.append((part, checkpointer.metadata(part.absolute()).item_metadata.tree))
            except Exception as error:
                raise _unreadable(part, error) from None
    specs = dict(zip(graph.names, graph.specs, strict=True))
    there = {name: (part, arrays) for part, tree in described for name, arrays in tree.items()}
    for name, spec in specs.items():
        if name not in there:
            raise broken(folder / FOLDER, f"shape {list(spec.shape)} as config.json asks for", "no such weight", tensor=name)
        _check(name, spec, *there[name])
    extra = sorted(set(there) - set(specs))
    if extra:
        raise broken(there[extra[0]][0], "only weights that the model uses", "one that config.json does not ask for", tensor=extra[0])
    yield from described


def _check(name: str, spec: Spec, part: Path, arrays: Mapping[str, Any]) -> None:
    if set(arrays) != set(_keys(spec)):
        raise broken(part, f"{' and '.join(_keys(spec))} as config.json asks for", " and ".join(sorted(arrays)), tensor=name)
    for key, array in zip(_keys(spec), arrays_of(spec), strict=True):
        shape, dtype = tuple(arrays[key].shape), np.dtype(arrays[key].dtype)
        wanted = "a floating dtype" if key == PLAIN else array.dtype.name
        fits = jnp.issubdtype(dtype, np.floating) if key == PLAIN else dtype == array.dtype
        if shape != array.shape or not fits:
            expected, found = f"shape {list(array.shape)} and {wanted} as config.json asks for", f"{list(shape)} and {dtype.name}"
            raise broken(part, expected, found, tensor=f"{name}.{key}")


def _load_part(part: Path, tree: Tree, specs: Mapping[str, Spec], mesh: Mesh, rules: Rules) -> dict[str, Weight]:
    import orbax.checkpoint as ocp

    def asked(name: str) -> dict[str, Any]:
        arrays = zip(_keys(specs[name]), arrays_of(specs[name]), strict=True)
        return {key: ocp.ArrayRestoreArgs(sharding=named(array, mesh, rules)) for key, array in arrays}

    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore(part.absolute(), restore_args={name: asked(name) for name in tree})
    except Exception as error:
        raise _unreadable(part, error) from None
    return {name: _weight(part, name, specs[name], restored[name]) for name in tree}


def _weight(part: Path, name: str, spec: Spec, arrays: Mapping[str, Array]) -> Weight:
    if isinstance(spec, QSpec):
        return spec.make([arrays[key] for key in _keys(spec)])
    return _cast(part, name, spec, arrays[PLAIN])


def _cast(part: Path, name: str, spec: ArraySpec, array: Array) -> Array:
    cast = array.astype(spec.dtype)
    if jnp.finfo(spec.dtype).max < jnp.finfo(array.dtype).max and bool(jnp.isfinite(array).all() & ~jnp.isfinite(cast).all()):
        raise broken(part, f"numbers that {spec.dtype.name} can hold", "larger ones", tensor=name, remedy="use --dtype bfloat16")
    return cast


def _unreadable(part: Path, error: Exception) -> CheckpointError:
    lines = str(error).splitlines() or [""]
    return broken(part, "an Orbax checkpoint", f"{type(error).__name__}: {lines[0]}", remedy=manifest.REMEDY)
