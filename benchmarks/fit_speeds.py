"""Fit plan/coefficients.json on published_speeds.json: prints the fit and its errors, --write keeps it.

Non-negative least squares of relative errors, one set of factors per generation of GPU. Judged by leaving one model
out: its rows are predicted with factors fitted on all others.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hypershard.catalog.instances import instance
from hypershard.config.schema import Config, ModelConfig
from hypershard.config.sources import Layer, read_yaml, resolve
from hypershard.models.family import family_of
from hypershard.models.files import model_file
from hypershard.plan import steps
from hypershard.plan.job import Job

ROWS = Path(__file__).parent / "published_speeds.json"
COEFFICIENTS = Path(steps.__file__).parent / "coefficients.json"
KINDS = ("products", "attention", "memory", "logits", "network")
_LEAST = (1.0, 1.0, 1.0, 1.0, 0.0)  # nothing is faster than its peak; the network may be hidden wholly
# Pulls factors of work that is small in the rows towards a plain kernel's; the weight is of one row.
_PRIOR = {"products": 1.3, "attention": 2.5, "memory": 1.3, "logits": 1.3, "network": 0.2}
_PRIOR_WEIGHT = 0.02


def rows() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(ROWS.read_text())
    return content


def job_of(row: dict[str, Any], models: dict[str, Any]) -> Job:
    """The published run as a job of ours: MPT is GPT-2's shape to all that is counted here."""
    machine = instance(row["instance"])
    if row["model"] in models:
        hidden, layers, heads = models[row["model"]]
        model = ModelConfig(
            model_type="gpt2",
            hidden_width=hidden,
            num_layers=layers,
            num_heads=heads,
            vocab_size=models["vocab_size"],
            max_context_width=row["context_tokens"],
        )
        config = Config()
    else:
        config = resolve(Layer("model file", read_yaml(model_file(row["model"]))[0])).config
        model = dataclasses.replace(config.model, max_context_width=row["context_tokens"])
    return Job(
        model=family_of(model.model_type).complete(model),
        data=dataclasses.replace(
            config.data, train_batch_size=row["batch"], gradient_accumulation_steps=row["accumulation"]
        ),
        parallel=dataclasses.replace(
            config.parallel,
            activation_checkpointing=row["checkpointing"],
            compile=row.get("compile", False),
            sharding_strategy=row.get("strategy", "full"),
        ),
        checkpoint=config.checkpoint,
        train=config.train,
        instance=machine,
        num_nodes=row["num_gpus"] // machine.num_gpus,
    )


def compute_seconds(row: dict[str, Any], job: Job) -> float:
    """What one micro-step of the published run took, less what is not fitted."""
    whole = job.step_tokens / row["num_gpus"] / row["tokens_per_second_per_gpu"]
    talking = steps.communication(job)
    rest = steps._optimizer_seconds(job) + talking.once
    return (whole - rest) / job.accumulation - talking.exposed


def fit(chosen: Sequence[dict[str, Any]], models: dict[str, Any]) -> dict[str, float]:
    """Factors that make the squares of relative errors smallest, none below _LEAST."""
    matrix, right = [], []
    for row in chosen:
        job = job_of(row, models)
        seconds = compute_seconds(row, job)
        matrix.append([value / seconds for value in vars(steps.work_of(job)).values()])
        right.append(1.0)
    for index, kind in enumerate(KINDS):
        matrix.append([_PRIOR_WEIGHT * (number == index) for number in range(len(KINDS))])
        right.append(_PRIOR_WEIGHT * _PRIOR[kind])
    a, b = np.array(matrix), np.array(right)
    factors = np.full(len(KINDS), 1.5)
    for _ in range(2000):  # coordinate descent: each factor's best value with the others as they are
        for index in range(len(KINDS)):
            column = a[:, index]
            others = b - a @ factors + column * factors[index]
            factors[index] = max(_LEAST[index], float(column @ others / (column @ column)))
    return dict(zip(KINDS, (round(float(value), 3) for value in factors), strict=True))


def predicted(row: dict[str, Any], models: dict[str, Any], factors: dict[str, float]) -> float:
    """Tokens per second and GPU with these factors."""
    job = job_of(row, models)
    computing = steps.work_of(job).seconds(factors)
    talking = steps.communication(job)
    micro = max(computing, talking.hidden) + talking.exposed
    seconds = micro * job.accumulation + talking.once + steps._optimizer_seconds(job)
    return job.step_tokens / job.num_gpus / seconds


def leave_one_model_out(content: dict[str, Any], instance_name: str) -> list[tuple[dict[str, Any], float]]:
    """Each fit row of an instance with its relative error, predicted from the other models' rows."""
    models = content["models"]
    chosen = [row for row in content["fit"] if row["instance"] == instance_name]
    errors = []
    for left in dict.fromkeys(row["model"] for row in chosen):
        factors = fit([row for row in chosen if row["model"] != left], models)
        for row in chosen:
            if row["model"] == left:
                errors.append((row, predicted(row, models, factors) / row["tokens_per_second_per_gpu"] - 1))
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the factors into plan/coefficients.json")
    args = parser.parse_args()
    content, kept = rows(), json.loads(COEFFICIENTS.read_text())
    for name, instance_name in (("hopper", "p5.48xlarge"), ("ampere", "p4de.24xlarge")):
        chosen = [row for row in content["fit"] if row["instance"] == instance_name]
        factors = fit(chosen, content["models"])
        kept["fitted"][name]["factors"] = factors
        errors = leave_one_model_out(content, instance_name)
        mean = sum(abs(error) for _, error in errors) / len(errors)
        worst, worst_error = max(errors, key=lambda one: abs(one[1]))
        print(f"{name}: {factors}")
        print(f"  {len(errors)} rows, leaving one model out: mean absolute error {mean:.1%}, worst {worst_error:+.1%}:")
        print(f"  {worst}")
        for row, error in errors:
            print(f"    {row['model']:>5} {row['context_tokens']:>6} {row['num_gpus']:>4} GPUs {error:+7.1%}")
    print("other software, not fitted:")
    for row in content["check"]:
        error = (
            predicted(row, content["models"], kept["fitted"]["hopper"]["factors"]) / row["tokens_per_second_per_gpu"]
            - 1
        )
        print(f"  {row['what']:<60} {row['num_gpus']:>4} GPUs {error:+7.1%}")
    if args.write:
        COEFFICIENTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
