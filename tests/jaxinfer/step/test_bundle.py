"""Bundles are read whole or refused: damage, other versions, other machines, other settings."""

import json
import shutil
from dataclasses import replace

import pytest

from jaxinfer.config import CacheConfig, ConfigError, EngineConfig, ExecutionConfig, MeshShape, ModelConfig, SpeculationConfig
from jaxinfer.sharding import make_mesh
from jaxinfer.step import bundle
from jaxinfer.step.bundle import Bundle, BundleMismatch, Loader, open_bundle
from jaxinfer.step.keys import ADMIT, COPY, WIPE
from pallas_kernels import hopper


@pytest.fixture
def opened(bundled):
    return open_bundle(bundled)


@pytest.fixture
def changed(opened):
    """The bundle with something else in its header."""

    def change(section, **values):
        own = opened.header[section]
        return Bundle(opened.folder, {**opened.header, section: {**own, **values} if isinstance(own, dict) else values[section]})

    return change


@pytest.fixture
def copied(bundled, tmp_path):
    return shutil.copytree(bundled, tmp_path / "copy")


def test_what_it_was_made_for_is_taken(opened, plain):
    opened.check_machine()
    opened.check(plain.program.config)
    assert opened.pages == plain.program.config.pool.pages and opened.needed == plain.program.bytes_beside and not opened.mosaic


def test_settings_at_their_defaults_are_the_bundles(opened):
    config = opened.adopt(EngineConfig(execution=ExecutionConfig(bundle=str(opened.folder))))
    assert (config.model.dtype, config.model.max_model_len, config.cache.page_size, config.cache.kv_tokens) == ("float32", 64, 4, 256)
    assert (config.scheduler.max_sequences, config.scheduler.max_step_tokens, config.execution.mesh) == (4, 32, MeshShape())
    assert config.model.model == "demo" and config.execution.bundle == str(opened.folder)
    assert opened.adopt(config) == config


def test_other_settings_are_refused_by_flag(opened):
    config = EngineConfig(ModelConfig(dtype="bfloat16"), CacheConfig(page_size=64), speculation=SpeculationConfig("lookup"))
    with pytest.raises(BundleMismatch, match=r"--dtype is float32 in the bundle, bfloat16 was asked for; --page-size is 4 .*--speculate"):
        opened.adopt(config)
    with pytest.raises(BundleMismatch, match="--speculate is off in the bundle, lookup was asked for"):
        opened.adopt(EngineConfig(speculation=SpeculationConfig("lookup")))


def test_where_a_draft_model_lies_is_no_difference(opened):
    recorded = {**opened.header["settings"], "speculate": "draft", "draft_model": "there"}
    drafting = replace(opened, header={**opened.header, "settings": recorded})
    assert drafting.adopt(EngineConfig()).speculation == SpeculationConfig("draft", "there")
    assert drafting.adopt(EngineConfig(speculation=SpeculationConfig("draft", "here"))).speculation.draft_model == "here"
    with pytest.raises(BundleMismatch, match="--speculate is draft in the bundle, lookup"):
        drafting.adopt(EngineConfig(speculation=SpeculationConfig("lookup")))


def test_other_machines_are_refused(changed):
    with pytest.raises(BundleMismatch, match=r"jax is 0.1 in the bundle, \d.* here; device is NVIDIA H200 in the bundle, cpu here"):
        changed("machine", jax="0.1", device="NVIDIA H200").check_machine()
    with pytest.raises(BundleMismatch, match=r"lacks amx-of-tomorrow. Make one .* \(this one: jaxinfer plan ...\), .*--bundle-mismatch"):
        changed("cpu_features", cpu_features=["amx-of-tomorrow"]).check_machine()
    with pytest.raises(BundleMismatch, match="it needs 64 devices, 8 are here"):
        changed("devices", devices=64).check_machine()


def test_other_programs_are_refused(opened, changed, plain):
    config = plain.program.config
    with pytest.raises(BundleMismatch, match=r"pages is 65 in the bundle, 66 here"):
        opened.check(replace(config, pool=replace(config.pool, pages=66)))
    with pytest.raises(BundleMismatch, match=r"model is llama \w+ in the bundle, llama \w+ here; dtype is float32 in the bundle, bfloat16"):
        opened.check(replace(config, graph=replace(config.graph, dtype=bundle.jax.numpy.dtype("bfloat16"))))
    without = {name: entry for name, entry in opened.header["programs"].items() if name != "admit"}
    with pytest.raises(BundleMismatch, match=r'lacks the programs \["admit"\]'):
        Bundle(opened.folder, {**opened.header, "programs": without}).check(config)
    with pytest.raises(BundleMismatch, match="pool has 256 tokens, memory holds 100"):
        opened.refuse_pool(100)


def test_a_program_for_other_arguments_is_refused(opened, plain):
    program = plain.program
    loader = Loader(opened, program.config.placement.mesh)
    loader.start()
    assert loader.begin(ADMIT, program.call(ADMIT))().size == program.sizes[ADMIT]
    with pytest.raises(BundleMismatch, match="copy-pages was compiled for other arguments"):
        loader.begin(COPY, program.call(WIPE))


def test_kernels_for_hopper_want_their_runtime_first(opened, monkeypatch):
    started = []
    monkeypatch.setattr(hopper, "start_runtime", lambda: started.append(True))
    Loader(Bundle(opened.folder, {**opened.header, "programs": {"a": {"mosaic": True}}}), make_mesh({})).start()
    assert started == [True]


def test_a_flipped_bit_is_refused(copied):
    program = copied / "programs" / "decode1.xla"
    data = bytearray(program.read_bytes())
    data[len(data) // 2] ^= 1
    program.write_bytes(data)
    words = r"--bundle: .*decode1.xla: expected SHA-256 .* damaged or changed; copy the bundle again"
    with pytest.raises(ConfigError, match=words) as caught:
        open_bundle(copied)
    assert not isinstance(caught.value, BundleMismatch)


def test_what_is_no_bundle(copied):
    with pytest.raises(ConfigError, match=r"no bundle.json there; name a folder that `jaxinfer plan --bundle`"):
        open_bundle(copied.parent)
    header = copied / "bundle.json"
    header.write_text(json.dumps({**json.loads(header.read_text()), "version": 9}))
    with pytest.raises(ConfigError, match=r"bundle.json: expected .* as jaxinfer_manifest.json says"):
        open_bundle(copied)
    bundle.manifest.write(copied)
    with pytest.raises(ConfigError, match="version 9 of the format"):
        open_bundle(copied)
    (copied / bundle.manifest.NAME).unlink()
    with pytest.raises(ConfigError, match=r"jaxinfer_manifest.json is missing"):
        open_bundle(copied)


def test_extensions_of_the_instruction_set(monkeypatch, tmp_path):
    for text, found in (("flags\t: fpu avx2 sse4_2 ibrs", ["avx2", "sse4_2"]), ("Features\t: asimd sve", ["asimd", "sve"]), ("", [])):
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(bundle, "Path", lambda _: tmp_path / "cpuinfo")
        assert bundle.cpu_features() == found
    monkeypatch.setattr(bundle, "Path", lambda _: tmp_path / "none")
    assert bundle.cpu_features() == []
