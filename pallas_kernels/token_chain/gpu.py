"""A chain on Hopper GPUs: of one token in one kernel (`hopper_links`), of a few in another (`gpu_few`), of some tens in a third
(`gpu_tens`), of int8 inputs with one between two matmuls (`gpu_rows`). Refusals, sizes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from jaxtyping import Array, Float

from pallas_kernels import dispatch, hopper, hopper_counters, hopper_few_plan, hopper_folds, hopper_links, hopper_tens_plan, tuning
from pallas_kernels.hopper_folds import FLYING, SLOTS, Link, Sizes
from pallas_kernels.hopper_mail import MOST as MOST_PASSED
from pallas_kernels.hopper_token import MOST_INPUTS, THREADS
from pallas_kernels.token_chain import gpu_few, gpu_rows, gpu_tens, xla
from pallas_kernels.token_chain.api import key_of
from pallas_kernels.token_chain.reference import Form, Weight


def refusal(target: dispatch.Target, key: dispatch.Key) -> str | None:
    """Why this cannot run on a target, or for what is known of a key; None when it can."""
    reason = hopper.refusal(target, {"dtype": key.get("dtype", "bfloat16")})
    if reason is not None:
        return reason
    if key.get("activations", "float") == "int8":
        return gpu_rows.refusal(key)
    if not (hopper.interpreting() or hopper.known_cores()):
        return "its blocks wait for each other, so there may be no more than run at once, and this device does not say how many do"
    if int(key.get("tokens", 1)) != 1:
        return _planner(key).refusal(key)
    passed = sum(int(key[f"in{number}"]) for number in range(1, int(key.get("links", 0))))
    if passed > MOST_PASSED:
        return f"its links pass {passed} numbers on, and there is room for {MOST_PASSED}"
    if key.get("weight", "int8") not in ("int8", key.get("dtype")):
        return "its kernel wants weights that are all int8 with scales, or all of the token's dtype"
    link = _unfitting(key, SLOTS[0])
    if link is not None:
        wanted = f"inputs in multiples of {THREADS} up to {MOST_INPUTS} and outputs in multiples of 64"
        else_ = "of 32 or 16 where half or a quarter of a row is a multiple of 128 bytes"
        return f"its kernel takes {wanted}, or {else_}, and fewer inputs in odd multiples, not {link.inputs} and {link.outputs}"
    return None


def _planner(key: dispatch.Key) -> Any:
    """What plans the kernel of several tokens."""
    return hopper_few_plan if int(key["tokens"]) <= hopper_few_plan.MOST else hopper_tens_plan


def _unfitting(key: dispatch.Key, slot: int) -> Link | None:
    """The first link that the kernel does not take with slots of that size, if any."""
    for number in range(int(key.get("links", 0))):
        link = Link(int(key[f"in{number}"]), int(key[f"out{number}"]), gated=True)  # what is not needs less
        if link.inputs % THREADS or not hopper_folds.folds(link, key.get("weight", "int8"), slot):
            return link
    return None


def heuristic(platform: str, key: dispatch.Key) -> dict[str, int]:
    """Sizes that were never measured."""
    return candidates(platform, key)[0]


def candidates(platform: str, key: dispatch.Key) -> list[dict[str, int]]:
    """Sizes worth measuring."""
    if key.get("activations", "float") == "int8":
        return [gpu_rows.Sizes(piece)._asdict() for piece in gpu_rows.PIECES]
    if int(key.get("tokens", 1)) > 1:
        return [sizes._asdict() for sizes in _planner(key).CANDIDATES]
    fitting = [slot for slot in SLOTS if _unfitting(key, slot) is None]
    return [Sizes(slot, flying)._asdict() for slot in fitting for flying in FLYING]


def token_chain(
    x: Float[Array, "tokens in"],
    held: Float[Array, "tokens features"],
    weights: Sequence[Weight],
    norms: Sequence[Float[Array, "_"] | None],
    *,
    forms: tuple[Form, ...],
    activations: str = "float",
    counters: Any = None,
) -> tuple[Array, Array]:
    """See api.token_chain."""
    found = tuning.sizes("token_chain", "gpu", dispatch.target(), key_of(x, weights, activations))
    if activations == "int8":
        if x.shape[0] == 0:
            return xla.token_chain(x, held, weights, norms, forms=forms, activations=activations)
        return gpu_rows.run(x, held, weights, norms, forms=forms, sizes=gpu_rows.Sizes(**found))
    if x.shape[0] > 1:
        links = links_of([weight.values for weight in weights], norms, forms)
        return _several(x.shape[0], found)(x, held, weights, norms, links, counters)
    value, total, every = x.reshape(-1), held.reshape(-1), tuple(zip(weights, norms, forms, strict=True))
    for links in [(link,) for link in every] if hopper.interpreting() else [every]:
        some, some_norms, some_forms = zip(*links, strict=True)
        matrices, scales = [weight.values for weight in some], [weight.scales for weight in some]
        plan = hopper_folds.plan_of(links_of(matrices, some_norms, some_forms), x.dtype, matrices[0].dtype, Sizes(**found))
        flat = [None if scale is None else scale.reshape(-1) for scale in scales]
        shared = counters if counters is not None or len(links) == 1 else hopper_counters.made()
        value, total = hopper_links.run(value, total, matrices, flat, some_norms, shared, plan=plan)
    return value[None], held if total is None else total[None]


def _several(tokens: int, sizes: dict[str, int]) -> Callable[..., tuple[Array, Array]]:
    """The kernel of so many tokens."""
    if tokens > hopper_few_plan.MOST:
        return partial(gpu_tens.run, sizes=hopper_tens_plan.Sizes(**sizes))
    return partial(gpu_few.run, sizes=hopper_few_plan.Sizes(**sizes))


def links_of(weights: Sequence[Any], norms: Sequence[Any], forms: Sequence[Form]) -> list[Link]:
    """What the kernel has to know of each link."""
    given = zip(weights, norms, forms, strict=True)
    return [
        Link(weight.shape[1], weight.shape[0], form.gated, None if norm is None else form.epsilon, form.offset)
        for weight, norm, form in given
    ]
