"""`hypershard plan`: whether a training fits, how long it takes and what it costs, before anything is paid for."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..catalog.instances import SERVICES, spot_seen
from ..config.flags import HelpFormatter, add_settings, parse
from ..log import setup_logging
from ..models.files import available_models
from ..plan import bytes as memory
from ..plan.data_view import DataFacts, DataView, whole_tokens
from ..plan.estimate import LEVEL, Memory, Plan, as_dict, compiled_share, plan
from ..plan.scaling import compute_optimal, optimal_tokens, predicted_loss
from ..plan.traced import CannotTrace, Traced
from ..units import format_bytes, format_count, format_seconds
from . import plan_calibrate, plan_check, plan_data, plan_search, plan_serve, plan_traced, plan_window
from .plan_asked import Asked, asked

_DESCRIPTION = """\
Plan a training: memory with a verdict, time, dollars. Flags that are not listed first are flags of `hypershard train`,
and mean what they mean there. All is worked out in closed form, in an instant, without a GPU or torch (but --traced).
"""
_EPILOG = """examples:
  hypershard plan --model llama3_8b --instance ml.p5.48xlarge --nodes 4 --max_steps 10000
  hypershard plan --model llama3_8b --instance g5.12xlarge --activation_checkpointing full --traced
  hypershard plan --model llama3_8b --search --global_batch_tokens 4194304 --max_steps 10000 --deadline 24
  hypershard plan --model llama3_8b --instance p5 --max_hours 12 --num_samples 2198 --tokens_per_sample 900
  hypershard plan --model llama3_8b --serve 16 --serve_bits 4
  hypershard plan --check num_parameters=1.29e9 num_tokens=6e9 loss_nats=2.37
  hypershard plan --model mixtral_8x7b --instance p5en --nodes 2 --epochs 2 --dataset_tokens 6e9 --json
"""
_OWN = (
    "instance",
    "nodes",
    "service",
    "prices_file",
    "hours_at",
    "json",
    "check",
    "calibrate",
    "calibrations",
    "search",
    "deadline",
    "picture",
    "traced",
    "serve",
    "serve_bits",
    *plan_data.OWN,
    *plan_window.OWN,
)

_RARE = ("first block", "last backward")  # moments that seldom are the worst, shown only where they are


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hypershard plan",
        usage="hypershard plan [--model NAME | --config FILE] --instance TYPE [--nodes N] [flags of train] [--json]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--instance",
        metavar="TYPE",
        help="p5.48xlarge, ml.p5.48xlarge, or a family's word, p5; with --search several (p5,p4d), default: all",
    )
    parser.add_argument("--nodes", metavar="N", help="instances (default: 1); with --search: " + plan_search.NODES_HELP)
    parser.add_argument(
        "--service", choices=SERVICES, help="whose price; default: sagemaker for a type that begins with ml., else ec2"
    )
    parser.add_argument("--prices_file", metavar="FILE", type=Path, help="your own prices (spot, capacity blocks)")
    plan_data.add_flags(parser)
    plan_window.add_flags(parser)
    parser.add_argument(
        "--hours_at", metavar="SPEED", help="a measured speed, in tokens per second and GPU, to work the hours out from"
    )
    parser.add_argument("--calibrate", metavar="RUN", help=plan_calibrate.HELP)
    parser.add_argument("--calibrations", metavar="DIR", help=plan_calibrate.FOLDER_HELP)
    parser.add_argument("--check", nargs="+", metavar="NAME=VALUE", help=plan_check.HELP)
    parser.add_argument("--search", action="store_true", help=plan_search.HELP)
    parser.add_argument("--deadline", metavar="HOURS", help="--search: what is cheapest within so many hours")
    parser.add_argument("--picture", metavar="FILE", help="--search: draw hours against dollars as .png or .svg")
    parser.add_argument("--traced", action="store_true", help=plan_traced.HELP)
    parser.add_argument("--serve", metavar="N", help=plan_serve.HELP)
    parser.add_argument("--serve_bits", metavar="BITS", help=plan_serve.BITS_HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a page")
    parser.add_argument(
        "--model", metavar="NAME", help=f"model file: a path, or one of {', '.join(available_models())}"
    )
    parser.add_argument("--config", metavar="FILE", help="run file, as of `hypershard train`")
    add_settings(parser)
    return parser


def run(argv: Sequence[str]) -> int:
    """Print the plan; 0 whether or not it fits. Raises ConfigError for what `train` would refuse too."""
    namespace = parse(build_parser(), argv, also_known=(*_OWN, "model", "config"))
    setup_logging(rank=0)
    if namespace.serve is not None:
        return plan_serve.run(namespace)
    if namespace.traced:
        plan_traced.refuse_elsewhere(namespace)
    if namespace.check is not None:
        return plan_check.run(namespace.check)
    if namespace.search:
        return plan_search.run(namespace)
    plan_search.refuse_alone(namespace)
    plan_serve.refuse_alone(namespace)
    if namespace.calibrate is not None:
        return plan_calibrate.run(namespace)
    question = asked(plan_window.with_training_config(namespace))
    if plan_window.is_wanted(namespace, question):
        if namespace.traced:
            raise plan_traced.no_use_with("a time window's flags")
        return plan_window.run(namespace, question)
    made = plan_of_question(question)
    view = plan_data.view_of(question.facts, made.job, num_steps=made.num_steps)
    traced = plan_traced.trace(made.job) if namespace.traced else None
    if namespace.json:
        values = {**as_dict(made), "dataset": view and view.as_dict()}
        if traced is not None:
            values["memory"]["traced"] = plan_traced.as_dict(traced)
        print(json.dumps(values, indent=1))
    else:
        print("\n".join(_page(made, question, view, traced)))
    return 0


def plan_of(words: Sequence[str]) -> Plan:
    """The plan of a job with these flags, without dollars. Raises ConfigError for flags that none can be made of."""
    return plan_of_question(question_of(words, wants_price=False))


def question_of(words: Sequence[str], *, wants_price: bool) -> Asked:
    """The question in these flags. Raises as `asked` does."""
    return asked(parse(build_parser(), words, also_known=(*_OWN, "model", "config")), wants_price=wants_price)


def plan_of_question(question: Asked) -> Plan:
    """Its plan. Raises ConfigError for settings that do not go with these GPUs or their number."""
    facts, job = question.facts, question.job
    tokens = None
    if facts is not None:
        tokens = whole_tokens(facts, context_tokens=job.model.max_context_width, packing=job.data.packing)
    return plan(
        job,
        price=question.price,
        dataset_tokens=tokens,
        tokens_per_second_per_gpu=question.tokens_per_second_per_gpu,
        calibrations=question.calibrations,
    )


# --- the page


def _page(made: Plan, question: Asked, view: DataView | None, traced: Traced | CannotTrace | None) -> Iterator[str]:
    job, sizes = made.job, made.sizes
    machine = job.instance
    active = "" if sizes.active == sizes.total else f", of which a token uses {sizes.active:,}"
    beside = f", beside matrices in {job.adapters.bnb_quant_type}" if job.num_unpacked else ""
    trained = f"; {job.trained.total:,} in adapters are trained{beside}" if job.has_adapters else ""
    trained += ", against the model without them" if job.has_reference else ""
    yield f"model    {question.name} ({job.model.model_type}): {sizes.total:,} parameters{active}{trained}"
    yield (
        f"job      {job.num_nodes} x {machine.name} ({machine.num_gpus} x {machine.gpu.name}), "
        f"{job.parallel.sharding_strategy} sharding over {job.shard_degree}, {job.attention_path} attention"
    )
    yield (
        f"         a step is {job.accumulation} x {job.data.train_batch_size} x {job.model.max_context_width:,} tokens "
        f"on each of {job.num_gpus} GPUs: {job.step_tokens:,} tokens"
    )
    yield from plan_data.data_lines(view, dataset=question.dataset)
    yield ""
    yield from _memory_lines(made.memory, made, traced)
    yield ""
    yield from _time_lines(made, None if view is None else view.facts)
    yield ""
    cost = made.cost
    level = f"{_level(made)}; " if cost.dollars is not None else ""
    yield f"cost     {cost.formula or 'unknown'}   [{level}{question.service}: {cost.price or 'price unknown'}]"
    if question.service == "ec2" and made.hours is not None and (spot := spot_seen(machine)):
        low, high = (job.num_nodes * made.hours * each for each in (spot.low, spot.high))
        yield (
            f"         on spot instances ${low:,.2f} to ${high:,.2f}, if one gets them: ${spot.low:,.2f} to "
            f"${spot.high:,.2f}/h were seen ({spot.region}, {spot.date})"
        )
    kept = job.checkpoint.keep_s3_checkpoints if job.checkpoint.s3_tier_base_path is not None else 0
    storage = f"{kept} kept in S3 are ${cost.storage_dollars_per_month:,.2f} a month" if kept else "none is kept in S3"
    yield f"         a checkpoint is {format_bytes(cost.checkpoint_bytes)}; {storage}"
    yield ""
    for index, text in enumerate(made.unknown):
        yield f"{'unknown' if index == 0 else '':<8} {text}"


def _memory_lines(found: Memory, made: Plan, traced: Traced | CannotTrace | None) -> Iterator[str]:
    yield f"memory   of one GPU   [{LEVEL}, +-{memory.BAND:.0%}]"
    shown = [one.name for one in found.moments if one.name not in _RARE or one == memory.peak(found.moments)]
    moments = {moment.name: moment for moment in found.moments}
    names = dict.fromkeys(term.name for one in shown for term in moments[one].terms if term.num_bytes)
    yield f"  {'GiB':<28}" + "".join(f"{name:>17}" for name in shown)
    for name in names:
        cells = [sum(term.num_bytes for term in moments[one].terms if term.name == name) for one in shown]
        row = "".join(f"{cell / memory.GIB:>17.2f}" if cell else f"{'':>17}" for cell in cells)
        yield f"  {name:<28}{row}".rstrip()
    yield f"  {'in use':<28}" + "".join(f"{moments[one].num_bytes / memory.GIB:>17.2f}" for one in shown)
    yield f"  needed, with what the allocator and CUDA take besides: {_fit(found.gpu)}; most is {found.dominant.name}"
    parts = ", ".join(f"{term.name} {format_bytes(term.num_bytes)}" for term in found.host_terms if term.num_bytes)
    yield f"  a node's host memory: {_fit(found.host)}"
    yield f"    {parts}"
    yield from plan_traced.lines(found, traced)
    verdict = plan_traced.verdict(found, traced)
    yield f"verdict  {verdict}"
    if made.remedy is not None and verdict == "does not fit":
        yield f"         {made.remedy}"


def _fit(fit: memory.Fit) -> str:
    return f"{format_bytes(fit.needed_bytes)} of {format_bytes(fit.usable_bytes)} ({fit.of}), {fit.verdict}"


def _level(made: Plan) -> str:
    """How far the hours, and the dollars with them, can be trusted."""
    if made.step is None or made.hours_level != made.step.level:
        return made.hours_level
    return f"{made.step.level}, +-{made.step.band:.0%}"


def _time_lines(made: Plan, facts: DataFacts | None) -> Iterator[str]:
    step = made.step
    if step is not None:
        if_it = "" if made.memory.verdict != "does not fit" else ", if it fitted"
        yield f"time     {step.seconds:.3g} s a step{if_it}   [{step.level}, +-{step.band:.0%}]"
        yield (
            f"         {format_count(step.tokens_per_second_per_gpu)} tokens/s per GPU, "
            f"{format_count(step.tokens_per_second_per_gpu * step.num_gpus)} in all, MFU {step.mfu:.1%}"
        )
        shares = sorted(step.parts.items(), key=lambda part: -part[1])
        yield "         " + ", ".join(f"{name} {part / step.seconds:.0%}" for name, part in shares if part > 0)
        if (share := compiled_share(made.job)) is not None:
            yield (
                f"         --compile=1 would take a step from {step.seconds:.3g} s to {step.seconds * share:.3g} s: "
                f"one kernel unpacks NF4"
            )
    else:
        yield "time     unknown"
    if made.num_steps is not None and made.hours is not None:
        tokens = format_count(made.num_steps * made.job.step_tokens)
        duration = format_seconds(made.hours * 3600)
        steps = f"{made.num_steps:,} steps, {tokens} tokens"
        is_new = made.job.train.init_from == "scratch" and not (
            made.job.has_adapters or (facts and facts.is_fine_tuning)
        )
        if is_new and made.sizes.active == made.sizes.total:
            unique_tokens = None if facts is None else facts.num_tokens
            law = predicted_loss(
                made.sizes.total, made.num_steps * made.job.step_tokens, num_unique_tokens=unique_tokens
            )
            yield f"loss     {law} at the end, on web text by a law of dense models"
            best = compute_optimal(6.0 * made.sizes.total * made.num_steps * made.job.step_tokens)
            yield (
                f"         compute-optimal are {format_count(optimal_tokens(made.sizes.total))} tokens for this model, "
                f"and for this compute {format_count(best.num_parameters)} parameters with "
                f"{format_count(best.num_tokens)} tokens: {best.loss_nats:.2f} nats"
            )
        yield f"hours    {made.hours:,.3g} ({duration}) for {steps}   [{_level(made)}]"
    if made.window is not None:
        yield f"window   {made.window}"
        yield from (f"         assumed: {text}" for text in made.window.overheads.assumptions)
