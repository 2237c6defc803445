"""Block sizes for TPUs that are not there: predicted with `tensorcore_clock`, compiled by the real compiler, measured on no chip.

For each key of an op's tuning cases and each generation, candidates are ranked by the microseconds predicted for the key's cases; the first
that libtpu compiles, VMEM within the kernel's limit, becomes a row. What is predicted to differ by less than TIE keeps the candidates' own
order, in which the heuristic's sizes come first: the model is not that good. Needs libtpu, for compiling alone.
"""

from collections.abc import Iterator, Sequence
from importlib import import_module, metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import dispatch, tensorcore, tensorcore_clock, tuning
from pallas_kernels.generations import Generation

TIE = 1.02
COMPILER = "libtpu"


def rows(op: str, cases: Sequence[Any], generations: Sequence[Generation]) -> Iterator[tuning.Row]:
    """One after the other. Raises ValueError without libtpu, and where the compiler takes no candidate."""
    compiler = compiler_version()
    for key, same in tuning.by_key(cases):
        given = [described(case, generations[0]) for case in same]
        traced: dict[Any, list[tensorcore_clock.Program]] = {}
        for generation in generations:
            target = dispatch.Target("tpu", generation.kind)
            if dispatch.refusal(op, "tpu", target, key) is not None:
                continue
            guesses = []
            for sizes in import_module(f"pallas_kernels.{op}.tpu").candidates("tpu", key):
                own = (generation.cores, *sizes.values())
                if own not in traced:
                    pairs = zip(same, given, strict=True)
                    traced[own] = [each for case, inputs in pairs for each in kernels(case, inputs, sizes, generation)]
                guesses.append((1e6 * sum(tensorcore_clock.seconds(each, generation) for each in traced[own]), sizes))
            microseconds, best = accepted(ranked(guesses), list(zip(same, given, strict=True)), generation)
            yield tuning.Row(
                op, "tpu", key, best, generation.kind, jax.__version__, tuning.today(), round(microseconds, 1), tuning.MODELLED, compiler
            )


def ranked(guesses: Sequence[tuple[float, tuning.Sizes]]) -> list[tuple[float, tuning.Sizes]]:
    """The fastest first; among those within TIE of what is left's fastest, the one that was named first."""
    left, found = list(guesses), []
    while left:
        limit = TIE * min(microseconds for microseconds, _ in left)
        found.append(left.pop(next(place for place, (microseconds, _) in enumerate(left) if microseconds <= limit)))
    return found


def accepted(guesses: Sequence[tuple[float, tuning.Sizes]], cases: Sequence[Any], generation: Generation) -> tuple[float, tuning.Sizes]:
    """The first of them that compiles for all cases (and their inputs). Raises ValueError with the compiler's words where none does."""
    mesh, said = mesh_of(generation), []
    for microseconds, sizes in guesses:
        try:
            for case, inputs in cases:
                with tuning.forced(sizes):
                    compiled(case, inputs, mesh)
            return microseconds, sizes
        except jax.errors.JaxRuntimeError as error:
            said.append(f"{sizes}: {str(error).splitlines()[0]}")
    raise ValueError(f"the compiler for {generation.name} takes no candidate: {'; '.join(said)}")


def described(case: Any, generation: Generation) -> Any:
    """What the case's inputs look like; arrays of int32 (lengths, page tables) are there."""
    describe = getattr(case, "described", None)
    if describe is not None:
        return describe()
    with dispatch.assumed(dispatch.Target("tpu", generation.kind)):
        made = case.make(0, "tpu")
    return jax.tree.map(lambda x: x if x.dtype == jnp.int32 else jax.ShapeDtypeStruct(x.shape, x.dtype), made)


def kernels(case: Any, inputs: Any, sizes: tuning.Sizes, generation: Generation) -> list[tensorcore_clock.Program]:
    """The kernels that a case runs with these sizes, traced, their scalars known."""
    leaves, tree = jax.tree.flatten(inputs)

    def run(*shapes: Any) -> Any:
        own = iter(shapes)
        given = jax.tree.unflatten(tree, [x if isinstance(x, jax.Array) else next(own) for x in leaves])
        with jax.ensure_compile_time_eval():  # what follows from arrays that are there is computed
            return case.run(given, "tpu")

    target = dispatch.Target("tpu", generation.kind)
    with dispatch.assumed(target), tuning.forced(sizes), tensorcore.recorded() as found:
        jax.eval_shape(run, *(x for x in leaves if not isinstance(x, jax.Array)))
    return [tensorcore_clock.program(record) for record in found]


def mesh_of(generation: Generation) -> Mesh:
    """One device of a generation, as libtpu describes it."""
    found = topologies.get_topology_desc(platform="tpu", topology_name=generation.topology)
    return Mesh(np.array(found.devices[:1]), ("x",))


def compiled(case: Any, inputs: Any, mesh: Mesh) -> Any:
    """The case's program for the mesh's device, its pool (if it has one) donated."""
    alone = NamedSharding(mesh, PartitionSpec())
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=alone), inputs)
    kv = given.pop("kv", None)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        step = jax.jit(lambda kv, rest: case.run(rest if kv is None else rest | {"kv": kv}, "tpu"), donate_argnums=0)
        return step.lower(kv, given).compile()


def compiler_version() -> str:
    """Of libtpu. Raises ValueError with the pip line where it is not installed."""
    try:
        return f"{COMPILER} {metadata.version(COMPILER)}"
    except metadata.PackageNotFoundError as error:
        raise ValueError(f"TPUs that are not there need their compiler: pip install 'jax[tpu]=={jax.__version__}'") from error
