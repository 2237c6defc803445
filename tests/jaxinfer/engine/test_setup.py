"""From settings to a ready engine: what it says about itself, and refusals that come before anything is read or compiled."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxinfer.checkpoint import audit_record
from jaxinfer.checkpoint.convert import convert
from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.config import (
    CacheConfig,
    ConfigError,
    EngineConfig,
    ExecutionConfig,
    MeshShape,
    ModelConfig,
    SchedulerConfig,
    SpeculationConfig,
)
from jaxinfer.engine import setup
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.setup import build, use_compilation_cache
from jaxinfer.models.graph import Quantization
from jaxinfer.planner import child
from jaxinfer.planner.sizing import Machine
from jaxinfer.request import Request, SamplingParams
from jaxinfer.step.bundle import Bundle, BundleMismatch
from jaxinfer.step.program import Program
from jaxinfer.tokenizer import TokenizerError
from tests.jaxinfer.conftest import settings, write_folder
from tests.quantised_files import tiny_model
from tests.weight_files import write


@pytest.fixture
def early(monkeypatch):
    """Refusals must come before a weight is read or a program compiled."""

    def late(*_, **__):
        raise AssertionError("too late: the engine reads weights or compiles already")

    monkeypatch.setattr(Program, "compile", late)
    monkeypatch.setattr(Program, "call", late)
    monkeypatch.setattr(setup, "_weights", late)
    return lambda config: build(config, lambda *report: None)


def test_kernels_that_refuse_are_named(early, folder):
    wanted = settings(folder)
    with pytest.raises(ConfigError, match=r"--implementation gpu: paged_attention cannot run .*: its kernels .*; 'auto' picks"):
        early(replace(wanted, execution=replace(wanted.execution, implementation="gpu")))


def test_what_is_running(plain, folder):
    info = plain.info
    assert (info.model, info.architecture, info.dtype, info.device, info.mesh) == (
        folder.name,
        "llama",
        "float32",
        "cpu",
        "data=1,tensor=1",
    )
    assert (info.max_model_len, info.kv_tokens, info.max_concurrency, info.device_count) == (64, 4 * 64, 4, 1)
    assert info.programs == 23
    assert info.parameters == sum(np.prod(leaf.shape) for leaf in plain.program._leaves)
    assert info.weight_bytes == 4 * info.parameters


def test_what_is_cached_in_other_numbers_is_something_else(folder):
    """Prefix caches of different KV dtypes never take each other's pages; and the pool is of the dtype that was asked for."""
    wanted = settings(folder)
    model = setup._describe(wanted)
    changed = [replace(wanted, cache=replace(wanted.cache, kv_dtype=name)) for name in ("auto", "int8", "fp8")]
    assert len({setup._prefix_index(config, model)._model for config in changed}) == 3
    placement = setup.Placement(setup._mesh(wanted))
    codes = [setup._sizing(config, model, placement).planned()[1].config.kv_specs[0] for config in changed]
    assert [jax.tree.leaves(spec)[0].dtype.name for spec in codes] == ["float32", "int8", "float8_e4m3fn"]


def test_a_mesh_counts_all_its_replicas(meshed):
    info = meshed.info
    assert (info.device_count, info.mesh, info.kv_tokens, info.max_concurrency) == (4, "data=2,tensor=2", 2 * 64, 2)
    assert info.weight_bytes < 4 * info.parameters


@pytest.mark.parametrize("name", ["plain", "meshed", pytest.param("speculating", marks=pytest.mark.ci)])
def test_a_plan_says_what_a_start_reports(name, request, folder):
    """The planner compiles few programs of the list, the engine all of them: within 3 % for programs, the same for the rest."""
    info, plan, keys = started_and_planned(request.getfixturevalue(name), folder, compile=True)
    assert plan.memory["programs"] == pytest.approx(info.program_bytes, rel=0.03)
    assert {row["name"] for row in plan.programs["compiled"]} <= keys
    assert len(plan.programs["compiled"]) + plan.programs["derived"] == info.programs


def test_a_plan_counts_a_draft_model_as_a_start_does(speculating, plain, folder):
    info, plan, _ = started_and_planned(speculating, folder, compile=False)
    assert info.weight_bytes == 2 * plain.info.weight_bytes and plan.memory["kv_token"] == 2 * plain.info.kv_bytes / (65 * 4)
    assert "--speculate auto --draft-model" in plan.command and "without drafts" in "".join(plan.notes)


def started_and_planned(engine, folder, *, compile):
    """What an engine says, a plan for the same settings, and the names of the engine's programs; weights and pool are the same."""
    info, config = engine.info, engine.program.config
    mesh, sequences = config.placement.mesh, config.max_sequences * config.pool.replicas
    values, drafts = json.loads((folder / "config.json").read_text()), config.draft is not None
    own = {"speculate": "auto", "draft_model": str(folder), "draft_tokens": 2} if drafts else {}
    asked = {
        "model": "small", "slice": f"cpu-{mesh.size}", "values": values, "compile": compile,
        "draft": {"values": values, "folder": None} if drafts else None,
        "config": {"page_size": 4, "max_step_tokens": 32, "dtype": "float32", **own}, "context": 64, "concurrency": sequences, "output": 16,
        "goal": "throughput", "price": None, "mesh": tuple(mesh.shape.values()), "all": False,
    }  # fmt: skip
    plan = child.planned(asked, lambda *_: None)
    found = plan.memory["weights"], plan.memory["kv_pool"], plan.capacity["kv_tokens"]
    assert found == (info.weight_bytes, info.kv_bytes, info.kv_tokens)
    return info, plan, {str(key) for key in config.keys}


def test_programs_that_need_more_than_was_left_shrink_the_pool(plain, folder, monkeypatch):
    """Seen first by what all of them need once they are compiled; then everything is compiled for the smaller pool."""
    sized = setup._sizing(settings(folder), setup._describe(settings(folder)), plain.program.config.placement)
    sized = replace(sized, machine=Machine("cpu", 400_000))
    memory, program = sized.planned(40_000)
    compiled = []
    monkeypatch.setattr(Program, "compile", lambda self, progress, keys=None: compiled.append(self))
    monkeypatch.setattr(Program, "bytes_beside", property(lambda self: 120_000))
    smaller, again = setup._compiled(sized, memory, program, lambda *_: None)
    assert compiled == [program, again] and again.config.pool == smaller.pool and smaller.pool.pages < memory.pool.pages
    assert smaller.programs == 120_000 and smaller.total <= smaller.limit


def from_bundle(folder, place, **execution):
    """Settings that say nothing but which model and which bundle."""
    return EngineConfig(
        ModelConfig(model=str(folder), load_format="random"),
        execution=ExecutionConfig(bundle=str(place), compilation_cache="off", **execution),
    )


def test_a_bundle_starts_an_engine_without_compiling_anything(plain, folder, bundled, monkeypatch):
    """Its settings come with it, and the tokens are those of the engine that was compiled."""
    compiled, reports = [], []
    listen = lambda event, duration_secs, **_: compiled.append(event) if event.startswith("/jax/core/compile") else None
    monkeypatch.setattr(setup, "_weights", lambda *_: plain.program._leaves)
    jax.monitoring.register_event_duration_secs_listener(listen)
    engine = Engine(from_bundle(folder, bundled), progress=lambda *report: reports.append(report))
    ask = [Request(str(n), tuple(range(1, 4 + n)), SamplingParams.of(temperature=n / 2, max_tokens=9, seed=n)) for n in range(3)]
    found = [joined_tokens(of, ask) for of in (engine, plain)]
    jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == [] and found[0] == found[1] and len(found[0]) == 3
    assert reports[0] == ("load", 0, 23) and reports[-1] == ("load", 23, 23)
    assert engine.info == plain.info and engine.metrics.compile_seconds == {} != plain.metrics.compile_seconds
    assert engine.config.cache.page_size == 4 and engine.config.execution.bundle == str(bundled)


def joined_tokens(engine, requests):
    made = {}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            made.setdefault(output.request_id, []).extend(output.token_ids)
    return made


def test_a_bundle_for_something_else_is_refused_or_compiled_by_choice(early, folder, bundled, monkeypatch, caplog):
    other = replace(from_bundle(folder, bundled), cache=CacheConfig(page_size=8))
    with pytest.raises(BundleMismatch, match="--page-size is 4 in the bundle, 8 was asked for"):
        early(other)
    real, built = setup._build, []

    def build_all(config, progress, bundle):
        if bundle is not None:
            return real(config, progress, bundle)
        built.append(config)
        raise ConfigError("it compiles now")

    monkeypatch.setattr(setup, "_build", build_all)
    with pytest.raises(ConfigError, match="it compiles now"):
        early(replace(other, execution=replace(other.execution, bundle_mismatch="compile")))
    assert [config.execution.bundle for config in built] == [None] and "--page-size is 4 in the bundle" in caplog.text
    monkeypatch.setattr(Bundle, "check_machine", lambda self: self._refuse(["jax is older"]))
    with pytest.raises(ConfigError, match="it compiles now"):
        early(replace(from_bundle(folder, bundled), execution=replace(other.execution, bundle_mismatch="compile")))
    assert (built[-1].cache.page_size, built[-1].cache.kv_tokens, built[-1].execution.bundle) == (4, None, None)


def test_another_model_or_too_little_memory_for_a_bundle(early, plain, folder, bundled, tmp_path, monkeypatch):
    with pytest.raises(BundleMismatch, match="model is llama"):
        early(from_bundle(write_folder(tmp_path, intermediate_size=64), bundled))
    config, info = settings(folder), plain.info
    asked = setup._sizing(config, setup._describe(config), plain.program.config.placement).account()
    half = asked.weights + asked.slots + info.program_bytes + info.kv_bytes // 2
    monkeypatch.setattr(setup.devices, "memory_bytes", lambda device: half * 10 // 9)
    with pytest.raises(BundleMismatch, match=r"its KV pool has 256 tokens, memory holds \d+ "):
        early(from_bundle(folder, bundled))


def test_defaults_come_from_the_models_authors(plain):
    assert plain.defaults == {"temperature": 0.5, "top_p": 1.0, "top_k": 7, "min_p": 0.0, "repetition_penalty": 1.0}


def test_weights_of_random_engines_are_the_same_each_time(plain, meshed):
    for left, right in zip(plain.program._leaves, meshed.program._leaves, strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


def test_unknown_policies_are_refused(early, folder):
    with pytest.raises(ConfigError, match="--policy 'lifo' is unknown"):
        early(settings(folder, policy="lifo"))


def test_more_devices_than_there_are(early, folder):
    with pytest.raises(ConfigError, match="--mesh data=3,tensor=4: the mesh needs 12 devices, but 8 cpu"):
        early(settings(folder, mesh=MeshShape(3, 4)))


def test_quantised_numbers_need_an_audit_if_the_user_wants_one(early, folder, tmp_path):
    model = write_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"--require-audit kl=0.02: .* with int8 has no recorded audit; run: python"):
        early(settings(model, quantize="int8", require_audit="kl=0.02"))
    audit_record.write(model, {"int8": {"weights": audit_record.fingerprint(model), "kl_mean": 0.01}})
    for passes in ({"quantize": "int8", "require_audit": "kl=0.02"}, {"require_audit": "kl=0.02"}, {"quantize": "int8"}):
        with pytest.raises(AssertionError, match="too late"):
            early(settings(model, **passes))
    wanted = settings(model, quantize="int8", require_audit="kl=0.02")
    with pytest.raises(ConfigError, match=r"with int8\+kv-fp8 has no recorded audit"):
        early(replace(wanted, cache=replace(wanted.cache, kv_dtype="fp8")))
    with pytest.raises(ConfigError, match="has an audit over it"):
        early(settings(model, quantize="int8", require_audit="kl=0.001"))


def test_longer_than_the_model_was_made_for(early, folder):
    with pytest.raises(ConfigError, match="--max-model-len 65 exceeds the 64 tokens"):
        early(settings(folder, max_model_len=65))


def test_a_pool_too_small_for_one_sequence(early, folder):
    with pytest.raises(ConfigError, match="--kv-tokens 60 holds 60 tokens, but one sequence may have 64"):
        early(replace(settings(folder), cache=CacheConfig(page_size=4, kv_tokens=60)))


def test_a_machine_too_small_for_the_model(early, folder, monkeypatch):
    monkeypatch.setattr(setup.devices, "memory_bytes", lambda device: 100_000)
    with pytest.raises(ConfigError, match="KV cache"):
        early(settings(folder))


def test_models_that_are_not_there(early, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        early(EngineConfig(ModelConfig("./nowhere")))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        early(EngineConfig(ModelConfig(str(tmp_path))))


def test_architectures_that_are_not_there(early, tmp_path):
    with pytest.raises(ConfigError, match=r"model_type 'lama' .* did you mean 'llama'"):
        early(settings(write_folder(tmp_path, model_type="lama")))


def test_a_folder_without_a_tokenizer(early, tmp_path):
    write_folder(tmp_path).joinpath("tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        early(settings(tmp_path))


@pytest.mark.parametrize("values", [{"temperature": "hot"}, {"top_p": 7}, {"top_k": 1.5}, {"repetition_penalty": -1}])
def test_recommendations_that_no_request_could_make(early, tmp_path, values):
    write_folder(tmp_path).joinpath("generation_config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=rf"generation_config\.json of .*{next(iter(values))}"):
        early(settings(tmp_path))


def test_recommendations_are_optional(tmp_path):
    assert setup._sampling_defaults(None) == {}
    assert setup._sampling_defaults(tmp_path) == {}
    tmp_path.joinpath("generation_config.json").write_text('{"temperature": null, "top_p": 0.9, "eos_token_id": 3}')
    assert setup._sampling_defaults(tmp_path) == {"top_p": 0.9}


def test_a_known_shape_needs_no_folder():
    model = setup._describe(EngineConfig(ModelConfig("smollm2-135m", load_format="random", dtype="bfloat16", max_model_len=1024)))
    assert (model.folder, model.name, model.max_tokens, model.architecture) == (None, "smollm2-135m", 1024, "llama")
    assert 130e6 < model.parameters < 140e6
    assert model.dtype == jax.numpy.bfloat16


def test_limits_follow_from_the_platform(monkeypatch):
    assert setup._limits(EngineConfig()).sequences == 64
    assert setup._limits(EngineConfig()).prefill_tokens == 512
    monkeypatch.setattr(setup.devices, "platform", lambda: "gpu")
    limits = setup._limits(EngineConfig())
    assert (limits.sequences, limits.prefill_tokens) == (256, 2048)
    given = setup._limits(EngineConfig(scheduler=SchedulerConfig(max_sequences=3, max_step_tokens=100)))
    assert (given.sequences, given.prefill_tokens, given.prefill_rows) == (3, 100, 3)


def test_the_compilation_cache_is_switched_on_and_off():
    names = (
        "jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )  # fmt: skip
    before = {name: getattr(jax.config, name) for name in names}
    try:
        use_compilation_cache("on")
        assert jax.config.jax_enable_compilation_cache
        assert jax.config.jax_compilation_cache_dir.endswith("xla")
        use_compilation_cache("off")
        assert not jax.config.jax_enable_compilation_cache
        use_compilation_cache("on")
        assert jax.config.jax_enable_compilation_cache
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_a_checkpoint_without_weights(early, tmp_path):
    with pytest.raises(CheckpointError, match="safetensors"):
        early(settings(write_folder(tmp_path), load_format="auto"))


def test_weights_that_are_quantised_already(early, tmp_path):
    folder, out = tiny_model(tmp_path / "model"), tmp_path / "out"
    convert(folder, out, Quantization.parse("int8,lm_head=keep"))
    model = setup._describe(EngineConfig(ModelConfig(str(out), dtype="float32")))
    asked = setup._describe(EngineConfig(ModelConfig(str(folder), dtype="float32", quantize="int8,lm_head=keep")))
    assert model.graph == asked.graph and model.parameters == asked.parameters
    asked_plan = {
        "model": "small", "slice": "cpu-1", "values": json.loads((out / "config.json").read_text()), "folder": str(out), "compile": False,
        "config": {"page_size": 4, "dtype": "float32"}, "context": 64, "concurrency": 4, "output": 16, "goal": "throughput", "price": None,
    }  # fmt: skip
    assert child.planned(asked_plan, lambda *_: None).memory["weights"] == model.graph.nbytes
    with pytest.raises(ConfigError, match=r"--quantize int8: the weights in .*out are quantised already; leave --quantize out"):
        early(settings(out, quantize="int8", load_format="auto"))


def drafting(folder, way, small=None, **model):
    return settings(folder, speculation=SpeculationConfig(way, small), **model)


def test_what_drafts_must_be_what_was_asked_for(early, folder, tmp_path):
    head = json.loads((folder / "config.json").read_text()) | {"draft_vocab_size": 64, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(head | {"vocab_size": 64}))
    write(tmp_path / "model.safetensors", {"norm.weight": np.ones(32, np.float32)})
    for way, small, message in (
        ("eagle", None, "--speculate eagle needs --draft-model: the model's EAGLE-3 head"),
        ("draft", None, "--speculate draft needs --draft-model: a smaller model"),
        ("draft", tmp_path, "is an EAGLE-3 head, no model of its own; use --speculate eagle"),
        ("eagle", folder, "is a model of its own, no EAGLE-3 head; use --speculate draft"),
        ("eagle", tmp_path, "made for a model of 32 features and 64 tokens, the target has 32 and 272"),
    ):
        with pytest.raises(ConfigError, match=message):
            early(drafting(folder, way, small and str(small), load_format="auto"))


def test_a_draft_vocabulary_lies_within_the_models():
    setup.check_draft_vocabulary("head", np.array([0, 1, 2]), 5)
    for offsets, vocab in (([0, 1, 2], 4), ([-1, 0, 0], 9), ([2, 1, 0], 9)):
        with pytest.raises(ConfigError, match="--draft-model head: d2t must lead from 3 draft tokens to as many of"):
            setup.check_draft_vocabulary("head", np.array(offsets), vocab)
