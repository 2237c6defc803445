"""A program taken apart and put together again is the program that it was: results, donation, checks, placement."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfer.checkpoint import read
from jaxinfer.config import ConfigError
from jaxinfer.engine.engine import Engine
from jaxinfer.models.layers import Placement
from jaxinfer.planner import sizing
from jaxinfer.request import Request, SamplingParams
from jaxinfer.sharding import make_mesh
from jaxinfer.step import executable
from jaxinfer.step.executable import Call, Compiler, InTurns, dump, from_json, load, to_json
from jaxinfer.step.forward import Computed
from jaxinfer.step.keys import POOL, WIPE, SamplerKey
from pallas_kernels import QuantizedKV
from tests.jaxinfer.conftest import settings


def described(shape, mesh, *spec, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


@pytest.fixture(scope="module")
def small():
    """A program that takes an array over, leaves one unused and gives back what a forward pass does."""
    mesh = make_mesh({"tensor": 2})
    kv, unused, other = described((4, 2), mesh, "tensor"), described((3,), mesh), described((2,), mesh)
    shardings = ((NamedSharding(mesh, PartitionSpec("tensor")),), NamedSharding(mesh, PartitionSpec()))
    step = lambda pools, state: ((pools[0] + state["b"][None],), state["b"] * 2.0)
    return mesh, Call(step, ((kv,), {"a": unused, "b": other}), shardings, donated=(0,))


def arrays(call):
    fill = lambda leaf: jax.device_put(np.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape), leaf.sharding)
    return jax.tree.map(fill, call.arguments)


def test_a_loaded_program_is_the_compiled_one(small):
    mesh, call = small
    made = Compiler().begin("key", call)()
    data, description = dump(made.run)
    assert isinstance(data, bytes) and description["dropped"] == [1]
    loaded = load(data, description, call.arguments, mesh)
    for _ in range(2):  # the second call takes the fast path
        results = []
        for program in (made.run, loaded):
            given = arrays(call)
            results.append(program(*given))
            assert given[0][0].is_deleted() and not given[1]["b"].is_deleted()
        assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
        for one, other in zip(*map(jax.tree.leaves, results), strict=True):
            assert one.sharding == other.sharding and one.committed == other.committed
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    with pytest.raises(TypeError, match="input pytree"):
        loaded(arrays(call)[0])


def test_what_is_alike_is_compiled_once(small, monkeypatch):
    _, call = small
    traced, lower = [], Call.lower
    monkeypatch.setattr(Call, "lower", lambda self: (traced.append(self), lower(self))[1])
    source = executable.Sharing()
    first, second = (source.begin("key", replace(call))() for _ in range(2))
    assert len(traced) == 1 and second == first
    pools, state = call.arguments
    wider = state | {"a": jax.ShapeDtypeStruct((5,), np.float32, sharding=state["a"].sharding)}
    others = (replace(call, function=lambda pools, state: call.function(pools, state)), replace(call, donated=()))
    for number, other in enumerate((*others, replace(call, arguments=(pools, wider)))):
        source.begin("key", other)()
        assert len(traced) == 2 + number
    source.begin("another", call)()
    assert len(traced) == 5


def test_engines_that_are_alike_share_programs(folder):
    config = settings(folder, sequences=1)
    config = replace(config, cache=replace(config.cache, kv_tokens=256))
    with executable.sharing():
        first, second = engines = [Engine(config) for _ in range(2)]
    try:
        known, keys = first.program.source.known, first.program.config.keys
        assert second.program.source is first.program.source and second.program.config.keys == keys
        shared = [key for key in keys if first.program.compiled(key) is second.program.compiled(key)]
        assert len(shared) > 0.7 * len(keys) and all(len(known[key]) == 1 for key in shared)  # but for those of the pool
        request = Request("a", (5, 6, 7), SamplingParams(temperature=0, max_tokens=8))
        answers = [generated(engine, request) for engine in (*engines, first)]
        assert len(answers[0]) == 8 and answers[0] == answers[1] == answers[2]
    finally:
        for engine in engines:
            engine.shutdown()
    assert type(executable.usual()) is Compiler


def generated(engine, request):
    engine.add(request)
    found = ()
    while engine.has_work:
        found += tuple(token for output in engine.step() for token in output.token_ids)
    return found


def test_programs_of_an_engine_on_a_mesh(meshed):
    program = meshed.program
    for key in (WIPE, SamplerKey(2)):
        data, description = dump(program.compiled(key))
        loaded = load(data, description, program.call(key).arguments, program.config.placement.mesh)
        assert jax.tree.leaves(loaded.output_shardings) == jax.tree.leaves(program.compiled(key).output_shardings)
        assert loaded.out_tree == program.compiled(key).out_tree and loaded.in_tree == program.compiled(key).in_tree


def test_programs_over_a_quantised_pool(folder):
    wanted = settings(folder)
    config = replace(wanted, cache=replace(wanted.cache, kv_dtype="int8"))
    described = sizing.described(read.read_config(folder), config, "cpu")
    made = sizing.Sizing(config, described, Placement(make_mesh({})), sizing.Machine("cpu", 1 << 30)).planned()[1]
    for key in (POOL, WIPE):
        compiled = made.call(key).lower().compile()
        loaded = load(*dump(compiled), made.call(key).arguments, made.config.placement.mesh)
        pools = loaded.out_tree.unflatten(range(loaded.out_tree.num_leaves))
        assert isinstance(jax.tree.flatten(pools, is_leaf=lambda node: isinstance(node, QuantizedKV))[0][0], QuantizedKV)
        assert loaded.out_tree == compiled.out_tree and loaded.in_tree == compiled.in_tree


def test_every_program_of_an_engine_that_drafts(speculating):
    program = speculating.program
    for key in program.config.keys:
        compiled = program.compiled(key)
        loaded = load(*dump(compiled), program.call(key).arguments, program.config.placement.mesh)
        assert loaded.out_tree == compiled.out_tree and loaded.in_tree == compiled.in_tree, key


def test_arguments_in_words(small):
    _, call = small
    assert list(call.inputs) == ["float32[4, 2]['tensor']", "float32[3][]", "float32[2][]"]
    with pytest.raises(NotImplementedError, match="named shardings"):
        list(Call(call.function, (jax.ShapeDtypeStruct((2,), np.int32),), None).inputs)


def test_results_as_json():
    mesh = make_mesh({"data": 2})
    leaf = described((4, 8), mesh, ("data", "tensor"), None, dtype=jax.numpy.bfloat16)
    tree = ((leaf, (leaf, leaf)), executable.unchecked(Computed, {"hidden": leaf, "logits": leaf, "rows": (leaf,)}))
    assert jax.tree.leaves(from_json(to_json(tree), mesh)) == jax.tree.leaves(tree)
    assert jax.tree.structure(from_json(to_json(tree), mesh)) == jax.tree.structure(tree)
    with pytest.raises(NotImplementedError, match="results made of dict cannot be described"):
        to_json({"a": leaf})


def test_what_a_description_does_not_hold_is_refused(small, monkeypatch):
    made = Compiler().begin("key", small[1])().run
    monkeypatch.setattr(made._executable, "_dispatch_in_layouts", ["a layout"])
    with pytest.raises(NotImplementedError, match="layouts of its own"):
        dump(made)


def test_options_that_xla_refuses(small):
    with pytest.raises(ConfigError, match=r"XLA refuses \{'no_such_option': '1'\}"):
        Compiler({"no_such_option": "1"}).begin("key", small[1])()
    with pytest.raises(ConfigError, match=r"XLA refuses \{'one': '1', 'other': '3'\}"):
        Compiler({"one": "1", "other": "2"}).begin("key", replace(small[1], options={"other": "3"}))()


def test_copies_run_in_turns():
    ran = []
    both = InTurns(lambda value: ran.append("first") or value, lambda value: ran.append("second") or -value)
    assert [both(1), both(2), both(3)] == [1, -2, 3] and ran == ["first", "second", "first"]
