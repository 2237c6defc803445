"""The safetensors reader: every dtype, any slice, no more bytes than needed; and one clear error for every kind of damage."""

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.checkpoint.formats import safetensors
from jaxinfer.checkpoint.formats.safetensors import DTYPES, SafetensorsFile
from tests.weight_files import read_all, write

RANDOM = np.random.default_rng(0)


def tensors():
    return {"first": RANDOM.normal(size=(4, 6)).astype(np.float32), "second": np.arange(10, dtype=np.float16)}


@pytest.mark.parametrize("name", DTYPES)
def test_reads_every_dtype_bit_for_bit(name, tmp_path):
    values = (RANDOM.normal(size=(3, 5)) * 4).astype(DTYPES[name])
    found = read_all(write(tmp_path / "a.safetensors", {"x": values}))["x"]
    assert found.dtype == values.dtype and found.tobytes() == values.tobytes()


def test_scalars_empty_tensors_and_metadata(tmp_path):
    def edit(header):
        header["__metadata__"] = {"format": "pt"}

    given = {"scalar": np.asarray(3.0, np.float32), "empty": np.zeros((0, 4), np.float32), "last": np.ones(2, np.int8)}
    found = read_all(write(tmp_path / "a.safetensors", given, edit))
    assert {name: values.tolist() for name, values in found.items()} == {"scalar": 3.0, "empty": [], "last": [1, 1]}


@settings(max_examples=60, deadline=None)
@given(data=st.data(), shortest=st.sampled_from([0, 16, 1 << 20]), block=st.sampled_from([1, 64, 1 << 20]))
def test_reads_any_slice(data, shortest, block, tmp_path_factory):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    values = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    lows = [data.draw(st.integers(0, size)) for size in shape]
    index = tuple(slice(low, data.draw(st.integers(low, size))) for low, size in zip(lows, shape, strict=True))
    path = write(tmp_path_factory.mktemp("slices") / "a.safetensors", {"before": np.ones(3, np.int8), "x": values})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors, "SHORTEST_RUN", shortest)
        patch.setattr(safetensors, "BLOCK", block)
        file = SafetensorsFile(path)
        found = file.tensors()["x"].read(index)
        file.close()
    assert np.array_equal(found, values[index])


@pytest.mark.parametrize(
    ("index", "wanted"), [((slice(8, 24), slice(0, 4096)), 16 * 4096 * 4), ((slice(0, 64), slice(1024, 2048)), 64 * 1024 * 4)]
)
def test_reads_only_the_bytes_of_the_slice(index, wanted, tmp_path, monkeypatch):
    values = RANDOM.normal(size=(64, 4096)).astype(np.float32)
    file, counted, preadv = SafetensorsFile(write(tmp_path / "a.safetensors", {"x": values})), [], os.preadv

    def counting(descriptor, buffers, offset):
        counted.append(preadv(descriptor, buffers, offset))
        return counted[-1]

    monkeypatch.setattr(os, "preadv", counting)
    assert np.array_equal(file.tensors()["x"].read(index), values[index])
    assert sum(counted) == wanted
    file.close()
    file.close()


def change(name, **fields):
    return lambda header: header[name].update(fields)


def duplicate(header):
    return json.dumps(header).replace('"second"', '"first"').encode()


BROKEN_HEADERS = {
    "wrong shape": (change("first", shape=[4, 7]), "tensor 'first': expected 112 bytes for F32 [4, 7], found 96 between its data_offsets"),
    "wrong dtype": (change("first", dtype="F16"), "tensor 'first': expected 48 bytes for F16"),
    "unknown dtype": (change("first", dtype="F4"), "found F4"),
    "dtype no string": (change("first", dtype=["F32"]), "expected a dtype"),
    "negative shape": (change("first", shape=[-4, -6]), "expected a shape of whole numbers, found [-4, -6]"),
    "fractional shape": (change("first", shape=[4.0, 6]), "expected a shape"),
    "boolean shape": (change("first", shape=[True, 24]), "expected a shape"),
    "huge shape": (change("first", shape=[2**62, 2**62]), "tensor 'first': expected"),
    "overflowing shape": (change("first", shape=[2**64]), "expected a shape"),
    "shape no list": (change("first", shape="4,6"), "expected a shape"),
    "offsets reversed": (change("first", data_offsets=[96, 0]), "expected data_offsets [begin, end]"),
    "offsets negative": (change("first", data_offsets=[-96, 0]), "expected data_offsets"),
    "three offsets": (change("first", data_offsets=[0, 96, 96]), "expected data_offsets"),
    "overlap": (change("second", data_offsets=[90, 110]), "it overlaps the tensor before it"),
    "hole": (change("second", data_offsets=[100, 120]), "it leaves a hole before it"),
    "same bytes twice": (lambda h: h.update(third=dict(h["first"])), "overlaps the tensor before it"),
    "out of the file": (lambda h: h.update(third={"dtype": "I8", "shape": [9], "data_offsets": [116, 125]}), "truncated"),
    "left over bytes": (lambda h: h.pop("second"), "expected"),
    "entry no object": (lambda h: h.update(first=[1, 2]), "an entry of dtype, shape and data_offsets"),
    "field missing": (lambda h: h["first"].pop("shape"), "an entry of dtype, shape and data_offsets"),
    "field too many": (change("first", device="cuda"), "an entry of dtype, shape and data_offsets"),
    "metadata no object": (lambda h: h.update(__metadata__=[]), "__metadata__ to be an object of strings"),
    "metadata of numbers": (lambda h: h.update(__metadata__={"a": 1}), "__metadata__"),
    "header no object": (lambda h: b"[1, 2]", "a JSON object as header, found list"),
    "header no JSON": (lambda h: b"{" + b"x" * 40, "a JSON header"),
    "header not UTF-8": (lambda h: b'{"\xff\xfe": 1}', "a JSON header"),
    "header too deep": (lambda h: b"[" * 100_000, "a JSON header"),
    "name twice": (duplicate, "the name 'first' stands twice"),
    "empty header": (lambda h: b"{}", "expected"),
}


@pytest.mark.parametrize("case", BROKEN_HEADERS)
def test_a_broken_header_is_one_clear_error(case, tmp_path):
    edit, words = BROKEN_HEADERS[case]
    path = write(tmp_path / "a.safetensors", tensors(), edit)
    with pytest.raises(CheckpointError) as error:
        SafetensorsFile(path)
    assert str(error.value).startswith(str(path)) and words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 20, -1, -20, -21, -100])
def test_a_truncated_file_is_one_clear_error(keep, tmp_path):
    path = write(tmp_path / "a.safetensors", tensors())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"expected .* found"):
        SafetensorsFile(path)


@pytest.mark.parametrize("length", [0, 1, 10_000, 2**40, 2**64 - 1])
def test_a_wrong_header_length_is_one_clear_error(length, tmp_path):
    path = write(tmp_path / "a.safetensors", tensors())
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="expected a header of"):
        SafetensorsFile(path)


def test_bytes_after_the_end_are_an_error(tmp_path):
    path = write(tmp_path / "a.safetensors", tensors())
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="as the header says"):
        SafetensorsFile(path)


def test_a_file_that_shrinks_while_it_is_read_is_an_error_not_a_signal(tmp_path):
    path = write(tmp_path / "a.safetensors", tensors())
    file = SafetensorsFile(path)
    os.truncate(path, path.stat().st_size - 30)
    with pytest.raises(CheckpointError, match=r"tensor 'first': .* the file was truncated"):
        file.tensors()["first"].read((slice(0, 4), slice(0, 6)))
    file.close()


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        SafetensorsFile(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError):
        SafetensorsFile(tmp_path)
