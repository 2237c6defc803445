"""Train the embedded demo model and its draft, measure them, and write them in Hugging Face's layout.

    python -m checkpoints.train_demo --data DIR --out DIR [--minutes 8] [--state DIR] [--resume]
    python -m checkpoints.train_demo --data DIR --out DIR --polish DIR [--minutes 1.4]    # second stage, from the first stage's weights
    python -m checkpoints.train_demo --data DIR --out DIR --polish DIR --drills           # third stage: calls of tools with made-up names
    python -m checkpoints.train_demo --smoke --out DIR          # about a minute on a CPU, texts generated

Life of the data: texts -> tokenizer (unless one is given) -> windows -> steps until the minutes are over -> demo/, draft/, report.json.
The learning rate follows the share of the minutes that has passed, so a run always ends with a finished schedule on any machine.
"""

import argparse
import json
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from checkpoints import corpus, vocabulary
from checkpoints.export import DEMO, DRAFT, Shape, read_checkpoint, write_checkpoint

if TYPE_CHECKING:
    from checkpoints.learner import Learner, Recipe, State


SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Settings:
    """One run: sizes, where things are, when to stop (after `steps` when that is not 0, else after `minutes` of training)."""

    demo: Shape
    draft: Shape
    recipe: "Recipe"
    out: Path
    data: Path | None = None
    tokenizer: Path | None = None
    state: Path | None = None
    resume: bool = False
    polish: Path | None = None
    minutes: float = 8.0
    steps: int = 0
    workers: int = 0
    attention: str = "xla"
    instances: int = 400
    sample_tokens: int = 100


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with the text files that the model card lists")
    parser.add_argument("--out", type=Path, required=True, help="folder to write demo/, draft/ and report.json into")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json to use instead of training one")
    parser.add_argument("--state", type=Path, help="folder for the Orbax checkpoint (default: OUT/state)")
    parser.add_argument("--resume", action="store_true", help="continue from the Orbax checkpoint")
    parser.add_argument("--polish", type=Path, help="second stage (more skills, smaller steps) from the demo/ and draft/ in this folder")
    parser.add_argument("--drills", action="store_true", help="polish with many calls of tools with made-up names")
    parser.add_argument("--minutes", type=float, default=8.0, help="minutes of training, compiling and measuring not counted")
    parser.add_argument("--steps", type=int, default=0, help="train this many steps instead of some minutes")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare the data")
    parser.add_argument("--attention", choices=("xla", "cudnn"), default="xla", help="what jax.nn.dot_product_attention uses")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and generated texts, for tests")
    parser.add_argument("--tokenizer-only", action="store_true", help="write the tokenizer to OUT and stop")
    return parser.parse_args(arguments)


def settings_from(options: argparse.Namespace) -> Settings:
    """The settings of a command line; raises SystemExit when texts are needed and no folder is named."""
    from checkpoints.learner import DRILL, POLISH, Recipe

    if options.smoke:
        tiny = Shape(1024, 64, 128, 2, 2, 1, 32, 256)
        recipe = Recipe(4, 128, 8, 128, learning_rate=5e-3, draft_learning_rate=5e-3, chat_tokens=30_000)
        draft = replace(tiny, hidden_size=32, num_hidden_layers=1)
        run = Settings(tiny, draft, recipe, options.out, instances=2, sample_tokens=8, steps=options.steps or 40)
    elif options.data is None:
        raise SystemExit("--data DIR is needed (or --smoke, which generates its texts)")
    else:
        recipe = (DRILL if options.drills else POLISH) if options.polish else Recipe()
        run = Settings(DEMO, DRAFT, recipe, options.out, options.data, steps=options.steps)
    return replace(
        run,
        tokenizer=options.tokenizer or (options.polish and options.polish / "demo" / "tokenizer.json"),
        state=options.state or options.out / "state",
        resume=options.resume,
        polish=options.polish,
        minutes=options.minutes,
        workers=options.workers,
        attention=options.attention,
    )


def prepare(run: Settings) -> tuple[corpus.Texts, Path]:
    """The texts, and the tokenizer written to out/demo and out/draft."""
    texts = corpus.read_texts(run.data) if run.data else corpus.generated_texts(run.recipe.seed, 200)
    if run.tokenizer:
        tokenizer = Tokenizer.from_file(str(run.tokenizer))
    else:
        tokenizer = vocabulary.train_tokenizer(corpus.sample_for_tokenizer(texts, run.recipe.seed), run.demo.vocab_size)
    if tokenizer.get_vocab_size() != run.demo.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} entries, the model {run.demo.vocab_size}")
    for name in ("demo", "draft"):
        vocabulary.write_tokenizer(tokenizer, run.out / name)
    return texts, run.out / "demo" / "tokenizer.json"


def weights_of(folder: Path) -> dict[str, Any]:
    """The weights of an exported checkpoint as float32 arrays on the device."""
    import jax.numpy as jnp

    return {name: jnp.asarray(array.astype(np.float32)) for name, array in read_checkpoint(folder).items()}


def export(run: Settings, state: "State") -> None:
    """Write the weights of both networks as they are now."""
    for name, shape, params in (("demo", run.demo, state.demo), ("draft", run.draft, state.draft)):
        write_checkpoint(run.out / name, shape, {tensor: np.asarray(array) for tensor, array in params.items()})


def train(run: Settings, learner: "Learner", state: "State", pools: corpus.Pools, step: Any) -> tuple["State", dict[str, Any]]:
    """Run compiled steps until the steps or minutes are over; the last state and what a report says about the run."""
    import jax

    from checkpoints.learner import batch, restore, save

    seconds, recipe = 0.0, run.recipe
    folder = run.state or run.out / "state"
    if run.resume:
        state, seconds = restore(folder, state)
    done = first = int(state.steps)
    before, started, saved, curve = seconds, time.monotonic(), time.monotonic(), []
    print(f"{len(pools.prose)} prose windows, {len(pools.chat)} chat windows; from step {first}", flush=True)
    while True:
        seconds = before + time.monotonic() - started
        progress = done / run.steps if run.steps else seconds / (60 * run.minutes)
        if progress >= 1:
            break
        prose = batch(pools.prose, recipe.prose_rows, done, recipe.seed)
        chat = batch(pools.chat, recipe.chat_rows, done, recipe.seed)
        state, losses = step(state, prose, chat, np.float32(recipe.rate(progress)))
        done += 1
        if done % 10 == 0 or done == first + 1:
            row = {name: round(float(value), 4) for name, value in losses._asdict().items()}
            if not np.isfinite(row["prose"]):
                raise FloatingPointError(f"the loss is {row} at step {done}")
            curve.append({"step": done, "seconds": round(before + time.monotonic() - started, 1), **row})
        if done % 200 == 0:
            print(json.dumps(curve[-1]), f"{(done - first) * recipe.step_tokens / (time.monotonic() - started):.0f} tokens/s", flush=True)
        if time.monotonic() - saved > SAVE_SECONDS:
            export(run, state)
            saved = time.monotonic()
    jax.block_until_ready(state.demo)
    seconds = before + time.monotonic() - started
    save(folder, state, seconds)
    export(run, state)
    rate = (done - first) * recipe.step_tokens / max(1e-9, seconds - before)
    return state, {"steps": done, "tokens": done * recipe.step_tokens, "seconds": seconds, "tokens_per_second": rate, "curve": curve}


def evaluate(run: Settings, learner: "Learner", state: "State", texts: corpus.Texts) -> dict[str, Any]:
    """Bits per byte, the draft's agreement with the demo, accuracy per skill and samples, of the bf16 values that were exported."""
    import jax.numpy as jnp

    from checkpoints import evaluation

    tokenizer = Tokenizer.from_file(str(run.out / "demo" / "tokenizer.json"))
    demo, draft = ({name: array.astype(jnp.bfloat16) for name, array in params.items()} for params in (state.demo, state.draft))
    windows, size = corpus.held_out_windows(texts, tokenizer, run.recipe.prose_length)
    loss, best = evaluation.next_token_losses(learner.demo, demo, windows, 16)
    draft_loss, draft_best = evaluation.next_token_losses(learner.draft, draft, windows, 16)
    counted = windows[:, 1:] >= 0
    report: dict[str, Any] = {
        "bits_per_byte": loss / np.log(2) / size,
        "draft_bits_per_byte": draft_loss / np.log(2) / size,
        "draft_agreement": float((best == draft_best)[counted].mean()),
        "bytes_per_token": size / int(counted.sum()),
    }
    print(json.dumps(report), flush=True)
    length = min(512, run.demo.max_position_embeddings)
    decoder = evaluation.Decoder(learner.demo, demo, min(400, run.instances), length)
    report["samples"] = evaluation.samples(decoder, tokenizer, run.sample_tokens)
    report["skills"] = evaluation.skill_accuracy(decoder, tokenizer, run.instances)
    for name, row in report["skills"].items():
        print(f"{name:16} {row['accuracy']:7.2%} of {row['instances']}", flush=True)
    return report


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train, measure, write everything as the command line says; returns what report.json says."""
    options = parse(arguments)
    run = settings_from(options)
    if options.tokenizer_only:
        prepare(run)
        return {}
    return perform(run)


def perform(run: Settings) -> dict[str, Any]:
    """Train, measure, write everything; returns what report.json says."""
    import jax

    from checkpoints import network
    from checkpoints.learner import Learner

    texts, tokenizer_file = prepare(run)
    recipe = run.recipe
    sizes = (recipe.prose_length, recipe.chat_length, recipe.chat_tokens)
    cut = corpus.PoolSettings(*sizes, recipe.dialogue_share, run.workers, recipe.seed, recipe.drill_share)
    with ThreadPoolExecutor(1) as background, jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        began = time.monotonic()
        pools = background.submit(corpus.make_pools, texts, tokenizer_file, cut)
        demo, demo_params = network.make(run.demo, recipe.seed, run.attention)
        draft, draft_params = network.make(run.draft, recipe.seed + 1, run.attention)
        if run.polish:
            demo_params, draft_params = weights_of(run.polish / "demo"), weights_of(run.polish / "draft")
        learner = Learner(demo, draft, recipe)
        state = learner.start(demo_params, draft_params)
        step = learner.compiled(state)
        print(f"compiled after {time.monotonic() - began:.1f} s", flush=True)
        windows = pools.result()
        print(f"data ready after {time.monotonic() - began:.1f} s", flush=True)
        state, report = train(run, learner, state, windows, step)
        report |= {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "python": platform.python_version()}
        report |= {"recipe": asdict(recipe), "prose_windows": len(windows.prose), "chat_windows": len(windows.chat)}
        _write(run.out, report)
        report |= evaluate(run, learner, state, texts)
    _write(run.out, report)
    return report


def _write(out: Path, report: dict[str, Any]) -> None:
    """Write report.json."""
    (out / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
