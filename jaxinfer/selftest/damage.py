"""Ways to damage a checkpoint folder, drawn by a seed: each changes a copy and says what a good message must name.

Structural damage (shapes, names, JSON) is done to folders without a manifest, so that the checks behind it are what is tested; changed
bytes in numbers or texts to folders with one, as nothing else can know of them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

MANIFEST = "jaxinfer_manifest.json"
Draw = random.Random


class Case(NamedTuple):
    """One kind of damage. kinds: of folder, to which it can be done. needs: a word of the message beside the file's name, or ""."""

    name: str
    kinds: tuple[str, ...]
    damage: Callable[[Path, Draw], str]
    needs: str = ""


def _weights(folder: Path, draw: Draw) -> Path:
    return draw.choice(sorted(folder.glob("*.safetensors")))


def _truncate(path: Path, draw: Draw) -> str:
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data))])
    return path.name


def _flip(path: Path, draw: Draw, low: int = 0, high: int | None = None) -> str:
    data = bytearray(path.read_bytes())
    data[draw.randrange(low, high or len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(data))
    return path.name


def _write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return path.name


def _append(path: Path, data: bytes) -> str:
    return _write(path, path.read_bytes() + data)


def _remove(path: Path) -> str:
    path.unlink()
    return path.name


def _to_folder(path: Path) -> str:
    path.unlink()
    path.mkdir()
    return path.name


def _flip_header(path: Path, draw: Draw) -> str:
    length = int.from_bytes(path.read_bytes()[:8], "little")
    return _flip(path, draw, 8, 8 + length)


def _header_length(path: Path, draw: Draw) -> str:
    data = path.read_bytes()
    return _write(path, draw.choice((0, 1, len(data), 1 << 40, (1 << 64) - 1)).to_bytes(8, "little") + data[8:])


def rewrite(path: Path, change: Callable[[dict[str, np.ndarray]], str]) -> str:
    """Change the tensors of a safetensors file; the tensor that was changed."""
    from jaxinfer.checkpoint.formats.safetensors import SafetensorsFile
    from jaxinfer.checkpoint.write import Planned, write_files

    opened = SafetensorsFile(path)
    tensors = {name: it.read(tuple(slice(0, size) for size in it.shape)) for name, it in opened.tensors().items()}
    opened.close()
    changed = change(tensors)
    index = path.parent / "model.safetensors.index.json"
    kept = index.read_bytes() if index.exists() else None
    path.unlink()
    made = [Planned(name, it.dtype, it.shape, lambda it=it: iter([it])) for name, it in tensors.items()]
    (path.parent / next(iter(write_files(path.parent, made)))).rename(path)
    if kept is not None:
        index.write_bytes(kept)
    return changed


def _of_tensor(change: Callable[[dict[str, Any], str, Draw], None], *endings: str) -> Callable[[Path, Draw], str]:
    def damage(folder: Path, draw: Draw) -> str:
        def chosen(tensors: dict[str, Any]) -> str:
            name = draw.choice(sorted(it for it in tensors if not endings or it.endswith(endings)))
            change(tensors, name, draw)
            return name

        return rewrite(folder / "model.safetensors", chosen)

    return damage


def _reshape(tensors: dict[str, Any], name: str, draw: Draw) -> None:
    import numpy as np

    tensors[name] = np.concatenate([tensors[name], tensors[name][:1]]) if draw.random() < 0.5 else tensors[name][None]


def _retype(tensors: dict[str, Any], name: str, _: Draw) -> None:
    import numpy as np

    tensors[name] = tensors[name].astype(np.int16 if tensors[name].dtype.itemsize != 2 or tensors[name].dtype.kind == "f" else np.int64)


def _bad_scale(tensors: dict[str, Any], name: str, draw: Draw) -> None:
    scales = tensors[name].copy()
    at = tuple(draw.randrange(size) for size in scales.shape)
    scales[at] = draw.choice((0.0, -float(scales[at]), float("nan"), float("inf")))
    tensors[name] = scales


def _config(change: Callable[[dict[str, Any], Draw], None]) -> Callable[[Path, Draw], str]:
    def damage(folder: Path, draw: Draw) -> str:
        config = json.loads((folder / "config.json").read_text())
        change(config, draw)
        (folder / "config.json").write_text(json.dumps(config))
        return ""

    return damage


def _index(change: Callable[[dict[str, Any], Draw], None]) -> Callable[[Path, Draw], str]:
    def damage(folder: Path, draw: Draw) -> str:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"], draw)
        path.write_text(json.dumps(index))
        return ""

    return damage


def _any_name(names: Mapping[str, Any], draw: Draw) -> str:
    return draw.choice(sorted(names))


def _orbax_file(folder: Path, draw: Draw) -> Path:
    return draw.choice(sorted(path for path in (folder / "orbax").rglob("*") if path.is_file() and path.stat().st_size))


def _of_group(name: str, *values: Any) -> Callable[[Path, Draw], str]:
    """Set a field of the weights of the first group of compressed-tensors."""

    def change(config: dict[str, Any], draw: Draw) -> None:
        first = next(iter(config["quantization_config"]["config_groups"].values()))
        first["weights"][name] = draw.choice(values)

    return _config(change)


def _of_method(name: str, *values: Any) -> Callable[[Path, Draw], str]:
    """Set an option of quantization_config."""
    return _config(lambda config, draw: config["quantization_config"].update({name: draw.choice(values)}))


ONE = ("int8", "int4", "w8a8", "fp8-rows", "awq", "gptq", "fp8")
GROUPED = ("int8", "int4", "w8a8", "fp8-rows")
SCALES = (".weight_scale", ".weight_scale_inv", ".scales")
WHOLE = ("sharded", *ONE)
VOUCHED = ("int8+", "int4+", "w8a8+", "fp8-rows+", "orbax")  # with a manifest

CASES = (
    Case("weights truncated", WHOLE, lambda folder, draw: _truncate(_weights(folder, draw), draw), "expected"),
    Case("bytes after the weights", WHOLE, lambda f, d: _append(_weights(f, d), bytes(d.randrange(1, 99))), "expected"),
    Case("length of the header", WHOLE, lambda folder, draw: _header_length(_weights(folder, draw), draw), "expected"),
    Case("bit of the header", WHOLE, lambda folder, draw: _flip_header(_weights(folder, draw), draw)),
    Case("weights empty", WHOLE, lambda folder, draw: _write(_weights(folder, draw), b""), "expected"),
    Case("weights zeros", WHOLE, lambda f, d: _write(path := _weights(f, d), bytes(path.stat().st_size)), "expected"),
    Case("weights a folder", WHOLE, lambda folder, draw: _to_folder(_weights(folder, draw))),
    Case("weights missing", WHOLE, lambda folder, draw: _remove(_weights(folder, draw))),
    Case("tensor missing", ONE, _of_tensor(lambda tensors, name, _: tensors.pop(name)), "tensor"),
    Case("scale missing", ONE, _of_tensor(lambda tensors, name, _: tensors.pop(name), *SCALES), "no such tensor"),
    Case("tensor renamed", ONE, _of_tensor(lambda tensors, name, _: tensors.update({name + "x": tensors.pop(name)})), "tensor"),
    Case("tensor extra", ONE, _of_tensor(lambda tensors, name, _: tensors.update({name + ".more": tensors[name]})), "only tensors"),
    Case("shape", ONE, _of_tensor(_reshape), "expected"),
    Case("dtype", ONE, _of_tensor(_retype), "expected"),
    Case("bad scale", ONE, _of_tensor(_bad_scale, *SCALES), "finite and above 0"),
    Case("bit of the weights", VOUCHED[:4], lambda f, d: _flip(path := _weights(f, d), d, path.stat().st_size // 4), "SHA-256"),
    Case("index truncated", ("sharded",), lambda folder, draw: _truncate(folder / "model.safetensors.index.json", draw)),
    Case("index to nowhere", ("sharded",), _index(lambda names, draw: names.update({_any_name(names, draw): "none.safetensors"}))),
    Case("index out of the folder", ("sharded",), _index(lambda n, d: n.update({_any_name(n, d): "../x.safetensors"})), "plain"),
    Case("index without a tensor", ("sharded",), _index(lambda names, draw: names.pop(_any_name(names, draw)))),
    Case("index with another tensor", ("sharded",), _index(lambda names, draw: names.update(more=names[_any_name(names, draw)]))),
    Case("index to numbers", ("sharded",), _index(lambda names, draw: names.update({_any_name(names, draw): 3})), "plain"),
    Case("index empty", ("sharded",), lambda folder, _: _write(folder / "model.safetensors.index.json", b"{}"), "weight_map"),
    Case("config truncated", WHOLE, lambda folder, draw: _truncate(folder / "config.json", draw)),
    Case("config not UTF-8", WHOLE, lambda folder, _: _write(folder / "config.json", b"\xff{}"), "JSON"),
    Case("config a list", WHOLE, lambda folder, _: _write(folder / "config.json", b"[]"), "object"),
    Case("config missing", WHOLE, lambda folder, _: _remove(folder / "config.json")),
    Case("another size", WHOLE, _config(lambda config, draw: config.update(hidden_size=config["hidden_size"] + draw.choice((-8, 8))))),
    Case("another depth", WHOLE, _config(lambda c, draw: c.update(num_hidden_layers=c["num_hidden_layers"] + draw.choice((-1, 1))))),
    Case("another vocabulary", WHOLE, _config(lambda config, _: config.update(vocab_size=config["vocab_size"] + 64))),
    Case("a size that is text", WHOLE, _config(lambda config, _: config.update(intermediate_size="many")), "whole number"),
    Case("another architecture", WHOLE, _config(lambda config, _: config.update(model_type="lamb"))),
    Case("no quantization_config", ONE, _config(lambda config, _: config.pop("quantization_config"))),
    Case("another quant_method", ONE, _of_method("quant_method", "hqq", None, "marlin"), "quant_method"),
    Case("an unknown option", ONE, _of_method("rotated", True), "rotated"),
    Case("another group size", ("awq", "gptq"), _of_method("group_size", 8, 32, 48, 7)),
    Case("other tiles", ("fp8",), _of_method("weight_block_size", [8, 16], [16, 8], [9], None)),
    Case("other bits", ("awq", "gptq"), _of_method("bits", 2, 3, 8), "bits"),
    Case("another strategy", ("int4", "w8a8"), _of_group("strategy", "block", "attn_head", "tensor_group"), "config.json"),
    Case("bits of a group", GROUPED, _of_group("num_bits", 2, 16, "8"), "num_bits"),
    Case("group of a group", ("int4",), _of_group("group_size", 8, 48, 0, None)),
    Case("no symmetry", ("int4", "int8"), _of_group("symmetric", False)),
    Case("tokenizer truncated", WHOLE, lambda folder, draw: _truncate(folder / "tokenizer.json", draw)),
    Case("tokenizer empty", WHOLE, lambda folder, _: _write(folder / "tokenizer.json", b"{}")),
    Case("tokenizer missing", WHOLE, lambda folder, _: _remove(folder / "tokenizer.json"), "tokenizer"),
    Case("tokenizer of another kind", WHOLE, lambda folder, _: _write(folder / "tokenizer_config.json", b"[1]"), "tokenizer_config"),
    Case("bit of the tokenizer", VOUCHED, lambda folder, draw: _flip(folder / "tokenizer.json", draw), "SHA-256"),
    Case("settings truncated", WHOLE, lambda folder, _: _write(folder / "generation_config.json", b'{"temperature":')),
    Case("settings out of range", WHOLE, lambda folder, _: _write(folder / "generation_config.json", b'{"temperature": -1}')),
    Case("bit of the manifest", VOUCHED, lambda folder, draw: _flip(folder / MANIFEST, draw)),
    Case("manifest truncated", VOUCHED, lambda folder, draw: _truncate(folder / MANIFEST, draw)),
    Case("manifest of nothing", VOUCHED, lambda folder, _: _write(folder / MANIFEST, b"{}"), "SHA-256"),
    Case("a file that is listed missing", VOUCHED, lambda folder, _: _remove(folder / "tokenizer_config.json"), "no such file"),
    Case("bit of Orbax", ("orbax",), lambda folder, draw: _flip(_orbax_file(folder, draw), draw), "SHA-256"),
    Case("Orbax truncated", ("orbax",), lambda folder, draw: _truncate(_orbax_file(folder, draw), draw)),
    Case("Orbax file missing", ("orbax",), lambda folder, draw: _remove(_orbax_file(folder, draw)), "no such file"),
    Case("Orbax without a manifest", ("orbax",), lambda folder, _: _remove(folder / MANIFEST), "manifest"),
)
