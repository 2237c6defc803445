"""`jaxinfer quantize`: quantise a model once into a folder that `serve --model` and `generate --model` start from."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from jaxinfer.config import ConfigError
from jaxinfer.console import StageBar

HELP = "quantise a model into a folder that can be served"
FORMATS = ("safetensors", "orbax")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--model", required=True, help="folder, Hugging Face repository or 'demo'; unquantised")
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face repository")
    rules = "as for --quantize: int8, or int8,lm_head=keep, or layers.*.mlp.*=int4"
    parser.add_argument("--scheme", required=True, metavar="RULES", help=rules)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the new folder")
    layout = "safetensors in the layout of compressed-tensors, which other tools read, or an Orbax checkpoint of our own arrays"
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help=f"{layout} [{FORMATS[0]}]")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in --out")
    lines = 'JSON lines, {"prompt" or "messages", "completion"?}: with w8a8, balance inputs and weights by the activations seen on them'
    parser.add_argument("--calibrate", metavar="FILE", help=lines)


def run(args: argparse.Namespace) -> int:
    """Quantise and print what came of it, as one JSON object."""
    from jaxinfer.quant.rules import Quantization

    quantization = Quantization.parse(args.scheme)
    if args.calibrate is not None and "w8a8" not in (quantization.scheme, *(scheme for _, scheme in quantization.rules)):
        raise ConfigError(f"--calibrate is of use with w8a8 alone, --scheme is {args.scheme}; leave --calibrate out")

    from jaxinfer.checkpoint import calibrate, convert, hub

    begun = time.perf_counter()
    source = hub.resolve(args.model, args.revision)
    with StageBar() as bar:
        factors = None if args.calibrate is None else calibrate.factors(source, Path(args.calibrate), quantization, progress=bar)
        made = convert.convert(
            source, args.out, quantization, kind=args.format, overwrite=args.overwrite, factors=factors,
            progress=lambda done, total: bar("write", done, total),
        )  # fmt: skip
    found = {"out": str(args.out), "scheme": str(quantization), "format": args.format, **made._asdict()}
    print(json.dumps(found | {"seconds": round(time.perf_counter() - begun, 2)}))
    return 0
