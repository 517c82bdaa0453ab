"""A run as text: a curve and the numbers a person asks for first."""

from __future__ import annotations

import datetime
import math
import textwrap
from collections.abc import Sequence

from ..units import format_bytes, format_count, format_seconds, quoted
from .read import AgainstPlan, RunSummary, Written

_ALARMS_SHOWN = 5
_TEXTS_SHOWN = 5
# Characters of a prompt's end, which is what is gone on from, and of a text; and the width of a page.
_PROMPT_SHOWN, _TEXT_SHOWN, _WIDTH = 80, 400, 100


def render(run: RunSummary) -> str:
    """The loss curve, then loss, speed, memory, checkpoints, where everything is, and texts that the model wrote."""
    lines = [draw_curve(run.steps, run.losses), ""]
    lines.append(
        f"loss       {run.losses[0]:.4f} at step {run.steps[0]}, {run.losses[-1]:.4f} at step {run.steps[-1]} "
        f"({run.losses[0] - run.losses[-1]:+.4f} nats won)"
    )
    if run.validation_losses:
        step, loss = run.validation_losses[-1]
        if run.preference_accuracy is None:
            means = f"perplexity {math.exp(min(loss, 700)):.1f}"
        else:
            means = f"the chosen answer is preferred in {run.preference_accuracy:.1%} of the pairs"
        lines.append(f"validation {loss:.4f} at step {step}, {means}")
    if run.best is not None:
        kept = "kept" if run.best.is_kept else "not kept"
        lines.append(f"best       {run.best.loss:.4f} at step {run.best.step}, {kept}")
    mfu = "" if run.mfu is None else f", MFU {run.mfu:.1%}"
    lines.append(
        f"speed      {format_count(run.tokens_per_second)} tokens/s{mfu}; {format_count(run.tokens)} tokens "
        f"in {format_seconds(run.seconds)}"
    )
    lines.append(f"memory     {format_bytes(run.memory_bytes)} at most on rank 0")
    if run.plan is not None:
        lines.append(f"plan       {_against_plan(run.plan)}")
    lines.append(f"data       {run.data_share:.1%} of the steps' time waited for it, {run.padding:.1%} padding")
    steps = ", ".join(map(str, run.checkpoint_steps)) or "none"
    lines.append(f"checkpoint steps {steps}")
    for at, text in run.alarms[-_ALARMS_SHOWN:]:
        lines.append(f"ALARM      {datetime.datetime.fromtimestamp(at):%Y-%m-%d %H:%M:%S}  {text}")
    if len(run.alarms) > _ALARMS_SHOWN:
        lines.append(f"           and {len(run.alarms) - _ALARMS_SHOWN} alarms before these, in events.jsonl")
    lines.append(f"run        {run.run_dir}")
    lines += _texts(run.texts)
    return "\n".join(lines)


def _against_plan(plan: AgainstPlan) -> str:
    planned, took = format_seconds(plan.estimated_hours * 3600), format_seconds(plan.elapsed_hours * 3600)
    came = f"{took} taken"
    if plan.expected_hours > plan.elapsed_hours:
        came += f" of {format_seconds(plan.expected_hours * 3600)} now expected"
    track = (
        "on track" if plan.is_on_track else "slower than planned" if plan.time_accuracy < 1 else "faster than planned"
    )
    parts = [f"{planned} planned, {came}: {track}, {plan.time_accuracy:.0%}"]
    if plan.planned_memory_bytes is not None:
        parts.append(f"memory {format_bytes(plan.planned_memory_bytes)} planned")
    if plan.dollars_spent is not None:
        to_come = f" + ${plan.dollars_to_come:,.2f} to come" if plan.dollars_to_come else ""
        parts.append(f"${plan.dollars_spent:,.2f}{to_come}")
    return "; ".join(parts)


def _texts(texts: Sequence[Written]) -> list[str]:
    """Each prompt, what was written after it at first, and what is now; escaped, as a model may write anything."""
    lines = []
    for text in texts[:_TEXTS_SHOWN]:
        lines += ["", f"after      {quoted(text.prompt, most=_PROMPT_SHOWN, at_start=True)}"]
        for step, written in dict.fromkeys((text.first, text.newest)):
            shown = textwrap.wrap(quoted(written, most=_TEXT_SHOWN), _WIDTH - 11)
            lines += [f"{f'step {step}' if not number else '':<11}{line}" for number, line in enumerate(shown)]
    if len(texts) > _TEXTS_SHOWN:
        lines += ["", f"           and {len(texts) - _TEXTS_SHOWN} texts more, in texts.jsonl"]
    return lines


def draw_curve(steps: Sequence[int], values: Sequence[float], *, width: int = 64, height: int = 12) -> str:
    """Plot `values` over `steps` in characters; each column shows the mean of its share of the steps."""
    finite = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    if not finite:
        return "(no finite loss to draw)"
    first, last = finite[0][0], finite[-1][0]
    buckets: dict[int, list[float]] = {}
    for step, value in finite:
        buckets.setdefault((step - first) * (width - 1) // max(1, last - first), []).append(value)
    columns = {column: sum(bucket) / len(bucket) for column, bucket in buckets.items()}
    low, high = min(columns.values()), max(columns.values())
    rows = [[" "] * width for _ in range(height)]
    for column, value in columns.items():
        rows[round((high - value) / ((high - low) or 1.0) * (height - 1))][column] = "•"
    labels = [f"{high - (high - low) * row / (height - 1):8.3f} ┤" for row in range(height)]
    plot = [label + "".join(row).rstrip() for label, row in zip(labels, rows, strict=True)]
    axis = " " * 9 + "└" + "─" * width
    return "\n".join([*plot, axis, f"{'':10}{first:<{width // 2}}{f'step {last}':>{width // 2}}"])
