"""`hypershard plan --serve N`: what it costs an hour to serve the model, instance by instance."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

from ..catalog.instances import price
from ..errors import ConfigError
from ..plan.serving import BYTES_PER_WEIGHT, Need, Place, need_of, places_for
from ..units import format_bytes, format_count
from .plan_flags import instances_of, resolve, whole_number, with_vocabulary

HELP = (
    "price an hour of serving the model to N sequences of --max_context_width at once, on every instance that holds it "
    "or on those of --instance"
)
BITS_HELP = "--serve: bits of a weight, 16 (default), 8 or 4; embedding and output head stay in 16"


def run(namespace: argparse.Namespace) -> int:
    """Print the instances, the cheapest first. Raises ConfigError for what no model or number is."""
    _refuse_others(namespace)
    bits = whole_number("serve_bits", namespace.serve_bits or "16")
    if bits not in BYTES_PER_WEIGHT:
        raise ConfigError(f"--serve_bits={bits}: expected one of {', '.join(map(str, BYTES_PER_WEIGHT))}")
    num_sequences = whole_number("serve", namespace.serve)
    resolved, name = resolve(namespace)
    model = with_vocabulary(resolved.config, ids_of_data=None)
    need = need_of(model, bits=bits, num_sequences=num_sequences)
    rows, service = instances_of(namespace.instance, namespace.service)
    prices = [(row, price(row, service, prices_file=namespace.prices_file)) for row in rows]
    heads = model.num_key_value_heads or model.num_heads
    found = places_for(need, num_sequences=num_sequences, heads=heads, prices=prices)
    if namespace.json:
        places = [_as_dict(one) for one in found]
        print(json.dumps({"need": vars(need), "service": service, "places": places}, indent=1))
    else:
        about = f"{name}: {num_sequences} x {model.max_context_width:,} tokens at once, weights in {bits} bits"
        print("\n".join(_page(about, need, found, service=service)))
    return 0


def refuse_alone(namespace: argparse.Namespace) -> None:
    """ConfigError for a flag that acts only with --serve."""
    if namespace.serve_bits is not None:
        raise ConfigError("--serve_bits acts only with --serve; add it, or drop --serve_bits")


def _refuse_others(namespace: argparse.Namespace) -> None:
    for name in ("nodes", "search", "deadline", "picture", "traced", "calibrate", "check", "max_hours"):
        if getattr(namespace, name, None) not in (None, False):
            raise ConfigError(
                f"--serve prices serving, on one node, and --{name} does nothing there: drop one of the two"
            )


def _page(about: str, need: Need, found: list[Place], *, service: str) -> Iterator[str]:
    yield f"serve    {about}"
    yield f"         {format_bytes(need.weight_bytes)} of weights, {format_bytes(need.cache_bytes)} of keys and values"
    if not found:
        yield "         no instance holds it: give fewer sequences, a shorter --max_context_width, or --serve_bits=4"
        return
    head = f"{'copies x GPUs':>15}{'a GPU holds':>14}{'$/h':>10}{'tokens/s, at most':>20}{'$/M tokens, at least':>22}"
    yield f"  {'instance':<20}{head}"
    for one in found:
        dollars = "unknown" if one.price is None else f"{one.price.dollars_per_hour:,.2f}"
        million = "unknown" if one.dollars_per_million is None else f"{one.dollars_per_million:,.3f}"
        yield (
            f"  {one.instance.name:<20}{f'{one.num_copies} x {one.num_gpus}':>15}"
            f"{format_bytes(one.gpu_bytes):>14}{dollars:>10}{format_count(one.tokens_per_second):>20}{million:>22}"
        )
    whose = {"ec2": "EC2's, on demand", "sagemaker": "SageMaker's"}[service]
    yield f"         speed is bounded by memory's bandwidth alone; dollars are {whose}"


def _as_dict(one: Place) -> dict[str, object]:
    return {
        "instance": one.instance.name,
        "num_copies": one.num_copies,
        "num_gpus": one.num_gpus,
        "gpu_bytes": one.gpu_bytes,
        "dollars_per_hour": None if one.price is None else one.price.dollars_per_hour,
        "tokens_per_second_at_most": one.tokens_per_second,
        "dollars_per_million_tokens_at_least": one.dollars_per_million,
    }
