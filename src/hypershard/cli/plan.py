"""`hypershard plan`: whether a training fits, how long it takes and what it costs, before anything is paid for."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..catalog.instances import SERVICES, instance, price
from ..config.flags import HelpFormatter, add_settings, parse
from ..config.schema import Config, ModelConfig
from ..data.embedded import VOCAB_SIZE
from ..errors import ConfigError
from ..log import setup_logging
from ..models.files import available_models
from ..plan import bytes as memory
from ..plan.estimate import LEVEL, Memory, Plan, as_dict, plan
from ..plan.job import Job
from ..plan.scaling import predicted_loss
from ..units import format_bytes, format_count, format_seconds
from . import plan_check
from .train import resolve_arguments

_DESCRIPTION = """\
Plan a training: memory with a verdict, time, dollars. Flags that are not listed first are flags of `hypershard train`,
and mean what they mean there. Everything is worked out in closed form, in an instant, without a GPU or torch.
"""
_EPILOG = """examples:
  hypershard plan --model llama3_8b --instance ml.p5.48xlarge --nodes 4 --max_steps 10000
  hypershard plan --model llama3_8b --instance g5.12xlarge --activation_checkpointing full
  hypershard plan --check num_parameters=1.29e9 num_tokens=6e9 loss_nats=2.37
  hypershard plan --model mixtral_8x7b --instance p5en --nodes 2 --epochs 2 --dataset_tokens 6e9 --json
"""
_OWN = ("instance", "nodes", "service", "prices_file", "dataset_tokens", "hours_at", "json", "check")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hypershard plan",
        usage="hypershard plan --model NAME --instance TYPE [--nodes N] [flags of hypershard train] [--json]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--instance", metavar="TYPE", help="p5.48xlarge, ml.p5.48xlarge, or a family's word, p5")
    parser.add_argument("--nodes", metavar="N", default="1", help="instances (default: 1)")
    parser.add_argument(
        "--service", choices=SERVICES, help="whose price; default: sagemaker for a type that begins with ml., else ec2"
    )
    parser.add_argument("--prices_file", metavar="FILE", type=Path, help="your own prices (spot, capacity blocks)")
    parser.add_argument("--dataset_tokens", metavar="N", help="tokens of one pass over the data, for --epochs")
    parser.add_argument(
        "--hours_at", metavar="SPEED", help="a measured speed, in tokens per second and GPU, to work the hours out from"
    )
    parser.add_argument("--check", nargs="+", metavar="NAME=VALUE", help=plan_check.HELP)
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
    if namespace.check is not None:
        return plan_check.run(namespace.check)
    made, name, service = _made(namespace)
    if namespace.json:
        print(json.dumps(as_dict(made), indent=1))
    else:
        print("\n".join(_page(made, name=name, service=service)))
    return 0


def most_hours(words: Sequence[str]) -> float | None:
    """Hours that a job with these flags takes, its band added; None where nothing says how many steps it has.

    Raises ConfigError for flags that no plan can be made of.
    """
    made, _, _ = _made(parse(build_parser(), words, also_known=(*_OWN, "model", "config")))
    return None if made.hours is None or made.step is None else made.hours * (1 + made.step.band)


def _made(namespace: argparse.Namespace) -> tuple[Plan, str, str]:
    """The plan, the model's name, and whose price it is."""
    if namespace.instance is None:
        raise ConfigError("--instance is missing: say on what, for example --instance=p5.48xlarge")
    machine = instance(namespace.instance)
    service = namespace.service or ("sagemaker" if namespace.instance.startswith("ml.") else "ec2")
    tokens = None if namespace.dataset_tokens is None else int(_number("dataset_tokens", namespace.dataset_tokens))
    speed = None if namespace.hours_at is None else _number("hours_at", namespace.hours_at)
    num_nodes = _number("nodes", namespace.nodes)
    if num_nodes != int(num_nodes):
        raise ConfigError(f"--nodes={namespace.nodes}: expected a whole number of at least 1")
    config, name = _resolve(namespace)
    job = Job(
        model=_with_vocabulary(config),
        data=config.data,
        parallel=config.parallel,
        checkpoint=config.checkpoint,
        train=config.train,
        instance=machine,
        num_nodes=int(num_nodes),
    )
    made = plan(
        job,
        price=price(machine, service, prices_file=namespace.prices_file),
        dataset_tokens=tokens,
        tokens_per_second_per_gpu=speed,
    )
    return made, name, service


def _number(flag: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < float("inf"):
        raise ConfigError(f"--{flag}={text}: expected a number of at least 1")
    return value


def _resolve(namespace: argparse.Namespace) -> tuple[Config, str]:
    flags = {name: value for name, value in vars(namespace).items() if name not in _OWN}
    resolved, name = resolve_arguments(argparse.Namespace(**flags))
    return resolved.config, name


def _with_vocabulary(config: Config) -> ModelConfig:
    """The model with its vocabulary, which the embedded tokenizer decides where nothing else is said."""
    model = config.model
    if model.vocab_size is not None:
        return model
    if config.data.dataset != "embedded" or config.data.tokenizer is not None:
        raise ConfigError("--vocab_size is open and planning reads no tokenizer: give --vocab_size, its number of ids")
    return dataclasses.replace(model, vocab_size=VOCAB_SIZE)


# --- the page


def _page(made: Plan, *, name: str, service: str) -> Iterator[str]:
    job, sizes = made.job, made.sizes
    machine = job.instance
    active = "" if sizes.active == sizes.total else f", of which a token uses {sizes.active:,}"
    yield f"model    {name} ({job.model.model_type}): {sizes.total:,} parameters{active}"
    yield (
        f"job      {job.num_nodes} x {machine.name} ({machine.num_gpus} x {machine.gpu.name}), "
        f"{job.parallel.sharding_strategy} sharding over {job.shard_degree}, {job.attention_path} attention"
    )
    yield (
        f"         a step is {job.accumulation} x {job.data.train_batch_size} x {job.model.max_context_width:,} tokens "
        f"on each of {job.num_gpus} GPUs: {job.step_tokens:,} tokens"
    )
    yield ""
    yield from _memory_lines(made.memory, made)
    yield ""
    yield from _time_lines(made)
    yield ""
    cost = made.cost
    level = f"{_level(made)}; " if cost.dollars is not None else ""
    yield f"cost     {cost.formula or 'unknown'}   [{level}{service}: {cost.price or 'price unknown'}]"
    kept = job.checkpoint.keep_s3_checkpoints if job.checkpoint.s3_tier_base_path is not None else 0
    storage = f"{kept} kept in S3 are ${cost.storage_dollars_per_month:,.2f} a month" if kept else "none is kept in S3"
    yield f"         a checkpoint is {format_bytes(cost.checkpoint_bytes)}; {storage}"
    yield ""
    for index, text in enumerate(made.unknown):
        yield f"{'unknown' if index == 0 else '':<8} {text}"


def _memory_lines(found: Memory, made: Plan) -> Iterator[str]:
    yield f"memory   of one GPU   [{LEVEL}, +-{memory.BAND:.0%}]"
    shown = ("start", "end of forward", "backward", "end of backward", "first save", "resume")
    moments = {moment.name: moment for moment in found.moments}
    names = dict.fromkeys(term.name for moment in found.moments for term in moment.terms if term.num_bytes)
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
    yield f"verdict  {found.verdict}"
    if made.remedy is not None:
        flags = " ".join(str(change) for change in made.remedy.changes)
        yield f"         it fits with {flags}" if flags else "         no change of flags makes it fit"
        if made.remedy.num_nodes is not None:
            yield f"         it fits with --nodes={made.remedy.num_nodes} as it is"


def _fit(fit: memory.Fit) -> str:
    return f"{format_bytes(fit.needed_bytes)} of {format_bytes(fit.usable_bytes)} ({fit.of}), {fit.verdict}"


def _level(made: Plan) -> str:
    """How far the hours, and the dollars with them, can be trusted."""
    if made.hours_level != LEVEL or made.step is None:
        return made.hours_level
    return f"{LEVEL}, +-{made.step.band:.0%}"


def _time_lines(made: Plan) -> Iterator[str]:
    step = made.step
    if step is not None:
        if_it = "" if made.memory.verdict != "does not fit" else ", if it fitted"
        yield f"time     {step.seconds:.3g} s a step{if_it}   [{LEVEL}, +-{step.band:.0%}]"
        yield (
            f"         {format_count(step.tokens_per_second_per_gpu)} tokens/s per GPU, "
            f"{format_count(step.tokens_per_second_per_gpu * step.num_gpus)} in all, MFU {step.mfu:.1%}"
        )
        shares = sorted(step.parts.items(), key=lambda part: -part[1])
        yield "         " + ", ".join(f"{name} {part / step.seconds:.0%}" for name, part in shares if part > 0)
    else:
        yield "time     unknown"
    if made.num_steps is not None and made.hours is not None:
        tokens = format_count(made.num_steps * made.job.step_tokens)
        duration = format_seconds(made.hours * 3600)
        steps = f"{made.num_steps:,} steps, {tokens} tokens"
        if made.job.train.init_from == "scratch" and made.sizes.active == made.sizes.total:
            law = predicted_loss(made.sizes.total, made.num_steps * made.job.step_tokens)
            yield f"loss     {law} at the end, on web text by a law of dense models"
        yield f"hours    {made.hours:,.3g} ({duration}) for {steps}   [{_level(made)}]"
