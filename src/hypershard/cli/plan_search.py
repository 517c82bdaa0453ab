"""`hypershard plan --search`: the fastest, the cheapest, the cheapest in time, over instances, nodes and settings."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from ..catalog.instances import price
from ..config.checks import accumulation_steps
from ..config.schema import SETTINGS, Config
from ..config.sources import Resolved
from ..errors import ConfigError
from ..plan.data_view import whole_tokens
from ..plan.estimate import num_steps_of
from ..plan.job import Job
from ..plan.search.fit import SEARCHED
from ..plan.search.result import BILLION, THAT_FITS, Candidate, SearchResult, as_dict, settings_of
from ..plan.search.search import NODE_COUNTS, Space, search
from ..storage import local_path
from ..units import format_count
from . import plan_data, plan_window
from .plan_calibrate import read_calibrations
from .plan_flags import instances_of, number, resolve, whole_number, with_vocabulary
from .plan_search_page import page, place

HELP = (
    "find the fastest, the cheapest and, with --deadline, the cheapest in time, at a fixed batch: "
    "--global_batch_tokens, or what the batch flags make on --instance and the most --nodes. Searched: instances, "
    "nodes, micro-batch, sharding, activation checkpointing, offloads; of the last three what is given stays"
)
NODES_HELP = f"a list (1,2,6), or one number: powers of two up to it, and itself; default: up to {NODE_COUNTS[-1]}"
_BATCH = ("train_batch_size", "gradient_accumulation_steps", "global_batch_tokens")
_ONLY_HERE = ("deadline", "picture")
_REFUSED = {
    "hours_at": "one measured speed is not that of all candidates; --calibrate on a run instead",
    "max_hours": "all that is searched trains on the same tokens; --deadline says until when",
    "calibrate": "measure first, then search",
    **dict.fromkeys(plan_window.OWN, "a time window is planned for one --instance and its --nodes"),
}


def refuse_alone(namespace: argparse.Namespace) -> None:
    """ConfigError for a flag that acts only with --search."""
    for name in _ONLY_HERE:
        if getattr(namespace, name) is not None:
            raise ConfigError(f"--{name} acts only with --search; add it, or drop --{name}")


def run(namespace: argparse.Namespace) -> int:
    """Search and print; 0 whatever is found. Raises ConfigError for flags that cannot act, or no batch to hold."""
    picture = None if namespace.picture is None else _picture(namespace.picture)
    resolved, name = resolve(namespace)
    _refuse_others(namespace, resolved.config)
    rows, service = instances_of(namespace.instance, namespace.service)
    space = Space(instances=rows, node_counts=_node_counts(namespace.nodes), held=_held(resolved))
    facts = plan_data.facts_of(namespace, dataset=resolved.config.data.dataset)
    model = with_vocabulary(resolved.config, ids_of_data=None if facts is None else facts.vocab_size)
    job = _template(namespace, dataclasses.replace(resolved.config, model=model), space)
    tokens = None
    if facts is not None:
        packing = resolved.config.data.packing
        tokens = whole_tokens(facts, context_tokens=model.max_context_width, packing=packing)
    result = search(
        job,
        space,
        num_steps=num_steps_of(job, tokens),
        price=lambda row: price(row, service, prices_file=namespace.prices_file),
        deadline_hours=None if namespace.deadline is None else number("deadline", namespace.deadline, minimum=0.01),
        calibrations=read_calibrations(namespace.calibrations),
    )
    flags = {role: _flags(one, namespace, resolved, service) for role, one in result.winners.items()}
    if namespace.json:
        content = as_dict(result)
        for role, words in flags.items():
            content["winners"][role]["flags"] = words
        print(json.dumps({**content, "service": service}, indent=1))
    else:
        print("\n".join(page(result, space, flags=flags, model_name=name, service=service)))
    if picture is not None:
        _draw(picture, result, model_name=name)
    return 0


def _refuse_others(namespace: argparse.Namespace, config: Config) -> None:
    for flag, why in _REFUSED.items():
        if getattr(namespace, flag, None) is not None or getattr(config.train, flag, None) is not None:
            raise ConfigError(f"--{flag} does not go with --search: {why}")


def _picture(text: str) -> Path:
    from ..report.pictures import require_picture

    path = local_path(text, flag="--picture")
    require_picture(path)
    return path


# --- what is asked


def _node_counts(text: str | None) -> tuple[int, ...]:
    """A list as it is; of one number, the powers of two up to it, and itself."""
    if text is None:
        return NODE_COUNTS
    if "," in text:
        counts = {whole_number("nodes", word.strip()) for word in text.split(",") if word.strip()}
        if not counts:
            raise ConfigError(f"--nodes={text}: found no number, expected a list such as 1,2,4")
        return tuple(sorted(counts))
    most = whole_number("nodes", text)
    return tuple(sorted({*(2**power for power in range(most.bit_length())), most}))


def _held(resolved: Resolved) -> frozenset[str]:
    """Searched settings that a flag or the run file gives: these stay."""
    return frozenset(name for name in SEARCHED if resolved.sources[name].startswith(("flag", "run file")))


def _template(namespace: argparse.Namespace, config: Config, space: Space) -> Job:
    """The training with its fixed batch. It stands on one GPU, whose one sequence divides every batch."""
    tokens = config.data.global_batch_tokens
    if tokens is None:
        num_gpus = {row.num_gpus for row in space.instances}
        if namespace.instance is None or len(num_gpus) > 1:
            raise ConfigError(
                "--search keeps the batch of a step fixed, and nothing says how large it is: give "
                "--global_batch_tokens (or one --instance, --nodes and --train_batch_size)"
            )
        world_size = num_gpus.pop() * (1 if namespace.nodes is None else space.node_counts[-1])
        context = config.model.max_context_width
        count = accumulation_steps(config.data, context_tokens=context, world_size=world_size)
        tokens = config.data.train_batch_size * context * world_size * count
    data = dataclasses.replace(
        config.data, train_batch_size=1, gradient_accumulation_steps=None, global_batch_tokens=tokens
    )
    return Job(
        model=config.model,
        data=data,
        parallel=config.parallel,
        adapters=config.adapters,
        learning=config.learning,
        checkpoint=config.checkpoint,
        train=config.train,
        instance=dataclasses.replace(space.instances[0], num_gpus=1),
        num_nodes=1,
    )


# --- what is found


def _flags(one: Candidate, namespace: argparse.Namespace, resolved: Resolved, service: str) -> list[str]:
    """Flags of `hypershard launch`, and of `hypershard plan`, that make a training this candidate."""
    row, given = one.job.instance, vars(namespace)
    words = [f"--{name}={given[name]}" for name in ("model", "config") if given[name] is not None]
    words.append(f"--instance={row.sagemaker_name if service == 'sagemaker' else row.name}")
    words.append(f"--nodes={one.job.num_nodes}")
    words += [f"--{name}={text}" for name, text in given.items() if name in SETTINGS and name not in _BATCH]
    for name, value in settings_of(one.job).items():
        if name in _BATCH or value != getattr(resolved.config.parallel, name):
            words.append(f"--{name}={int(value) if isinstance(value, bool) else value}")
    accumulation = "gradient_accumulation_steps"
    if resolved.config.data.gradient_accumulation_steps is not None and accumulation not in given:
        words.append(f"--{accumulation}=none")  # a file's, which does not go with a batch in tokens
    return words


def _draw(path: Path, result: SearchResult, *, model_name: str) -> None:
    from ..report.pictures import CostPoint, draw_costs

    def point(one: Candidate) -> CostPoint:
        hours = one.hours_per_billion if one.hours is None else one.hours
        dollars = one.dollars_per_billion if one.dollars is None else one.dollars
        assert dollars is not None
        roles = [
            role.replace("_", " ") for role, winner in result.winners.items() if winner is one and THAT_FITS not in role
        ]
        label = f"{', '.join(roles)}:\n{place(one)}" if roles else ""
        family = one.job.instance.family
        return CostPoint(hours=hours, dollars=dollars, family=family, is_tight=one.verdict == "tight", label=label)

    if not any(one.price is not None for one in result.candidates):
        raise ConfigError("--picture: nothing that runs this training has a known price; give --prices_file")
    unpriced = sorted({one.job.instance.family for one in result.candidates if one.price is None})
    left_out = f"; left out, with unknown prices: {', '.join(unpriced)}" if unpriced else ""
    draw_costs(
        path,
        [point(one) for one in result.candidates if one.price is not None],
        front=[point(one) for one in result.front],
        title=f"{model_name}: " + f"{format_count(result.num_tokens or BILLION)} tokens{left_out}",
        deadline_hours=result.deadline_hours,
    )
