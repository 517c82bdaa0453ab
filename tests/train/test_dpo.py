"""Preference tuning: loss and gradients against the published formula computed another way, and that it learns."""

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.jobs import a_job, config_of, tiny
from tests.rank_pool import RankPool
from tests.train.test_lora import bits, refusal, resumed, some_steps
from tests.train.test_numerics import assert_same_training
from transformers import AutoModelForCausalLM

from hypershard.adapters.targets import scale_of
from hypershard.data.packing import IGNORED_LABEL, Batch
from hypershard.distributed.process_group import World
from hypershard.errors import ConfigError
from hypershard.models.family import family_of
from hypershard.train.evaluate import evaluate
from hypershard.train.preference import summed_by_document, token_log_probs
from hypershard.train.setup import Job
from hypershard.train.state import Progress, advance
from hypershard.train.step import accumulate_gradients, train_step

WORDS = ("anchor", "basalt", "candle", "dahlia", "ember", "fjord", "garnet", "harbor", "ivory", "jasper")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions whose chosen answer names a colour and whose rejected one a number, of different lengths."""
    return write_pairs(tmp_path_factory.mktemp("preferences") / "pairs.jsonl")


def write_pairs(file: Path) -> Path:
    rows = [
        {
            "prompt": f"What of the {one} and the {other}?",
            "chosen": f" It is green like {other}{' and more' * (len(one) % 3)}.",
            "rejected": f" Seven times {one}, eight times {other}.",
        }
        for one, other in itertools.permutations(WORDS, 2)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def dpo(pairs: Path, **overrides: Any) -> str:
    return tiny(
        **{"dataset": pairs, "objective": "dpo", "lora_r": 8, "lr": 0.01, "max_context_width": 128, **overrides}
    )


# --- the loss


def test_log_probs_and_their_gradients_are_those_of_a_softmax() -> None:
    torch.manual_seed(1)
    hidden = torch.randn(23, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    labels = torch.randint(50, (23,))
    labels[[0, 7, 22]] = IGNORED_LABEL
    counts = torch.randn(23)
    found = token_log_probs(hidden, weight, labels, chunk_rows=5)
    own = torch.autograd.grad((found * counts).sum(), (hidden, weight))
    exact_hidden, exact_weight = hidden.double(), weight.double()
    exact = -F.cross_entropy(exact_hidden @ exact_weight.T, labels, reduction="none", ignore_index=IGNORED_LABEL)
    expected = torch.autograd.grad((exact * counts).sum(), (hidden, weight))
    torch.testing.assert_close(found, exact.float())
    torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("context", [2, 3, 4, 5, 6, 7, 8, 9])
def test_every_document_of_a_row_has_a_place(context: int) -> None:
    """As many as there can be: of two tokens each, the last of which may be a label only, or padding behind them."""
    positions = torch.arange(context).unsqueeze(0) % 2
    sums = summed_by_document(torch.ones(context), positions)
    assert sums.sum() == context and sums.shape[1] % 2 == 0
    assert sums[0, : int((positions == 0).sum())].all()


def against_the_formula(world: World, flags: str, cache_dir: Path) -> dict[str, Any]:
    """Loss, statistics and gradients of a step with adapters that are not zero, ours and `by_the_formula`."""
    with a_job(world, flags, cache_dir) as job:
        torch.manual_seed(2)
        for parameter in job.parameters.values():
            parameter.detach().to_local().normal_(std=0.05)  # type: ignore[attr-defined]
        batches = job.data.loader.step(0, accumulation=job.accumulation)
        sums, num_terms = accumulate_gradients(job, batches)
        own = {name: one.grad.to_local().clone() for name, one in job.parameters.items()}  # type: ignore[union-attr]
        job.optimizer.zero_grad()
        settings = config_of(flags, cache_dir=cache_dir).learning
        pairs = [pair for batch in batches for pair in pairs_in(batch)]
        losses, rewards, expected = by_the_formula(
            job, pairs, beta=settings.dpo_beta, smoothing=settings.dpo_label_smoothing
        )
        return {
            "pairs": (num_terms.item(), len(pairs)),
            "sums": sums.tolist(),
            "expected": [
                losses.sum().item(),
                float((rewards[:, 0] > rewards[:, 1]).sum()),
                (rewards[:, 0] - rewards[:, 1]).sum().item(),
                rewards[:, 0].sum().item(),
            ],
            "gradients": own,
            "expected_gradients": expected,
            "rows_with_padding": sum(bool(batch.num_padding_tokens) for batch in batches),
        }


def pairs_in(batch: Batch) -> list[tuple[list[tuple[int, int]], list[tuple[int, int]]]]:
    """(chosen, rejected) as lists of (input, label), taken out of the rows by walking along the positions."""
    pairs = []
    for ids, labels, positions in zip(
        batch.input_ids.tolist(), batch.labels.tolist(), batch.position_ids.tolist(), strict=True
    ):
        documents: list[list[tuple[int, int]]] = []
        for token, label, position in zip(ids, labels, positions, strict=True):
            if position == 0:
                documents.append([])
            documents[-1].append((token, label))
        answers = [one for one in documents if any(label != IGNORED_LABEL for _, label in one)]
        pairs += list(zip(answers[0::2], answers[1::2], strict=True))
    return pairs


def by_the_formula(
    job: Job, pairs: list[Any], *, beta: float, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """TRL's sigmoid loss (DPOTrainer.dpo_loss) answer by answer, by a plain model with the adapters added."""
    plain = AutoModelForCausalLM.from_config(family_of(job.model.model_type).hf_config(job.model)).float().eval()
    weights, adapters = {}, {}
    for name, parameter in job.module.hf_model.named_parameters():
        whole = parameter.full_tensor().detach().clone()  # type: ignore[attr-defined]
        (adapters if "lora_" in name else weights)[name] = whole.requires_grad_("lora_" in name)
    merged = dict(weights)
    for name, a in adapters.items():
        if name.endswith("lora_A"):
            b = adapters[name.removesuffix("A") + "B"]
            target = name.removesuffix("lora_A") + "weight"
            merged[target] = weights[target] + scale_of(job.adapters) * b @ a

    def log_prob(state: dict[str, torch.Tensor], answer: list[tuple[int, int]]) -> torch.Tensor:
        ids = torch.tensor([[token for token, _ in answer]])
        logits = torch.func.functional_call(plain, state, (ids,)).logits[0]
        counted = [(place, label) for place, (_, label) in enumerate(answer) if label != IGNORED_LABEL]
        return sum((logits[place].log_softmax(0)[label] for place, label in counted), torch.zeros(()))

    losses, rewards = [], []
    for chosen, rejected in pairs:
        policy = [log_prob(merged, answer) for answer in (chosen, rejected)]
        with torch.no_grad():
            reference = [log_prob(weights, answer) for answer in (chosen, rejected)]
        logits = (policy[0] - policy[1]) - (reference[0] - reference[1])
        losses.append(-F.logsigmoid(beta * logits) * (1 - smoothing) - F.logsigmoid(-beta * logits) * smoothing)
        rewards.append(torch.stack([beta * (mine - theirs) for mine, theirs in zip(policy, reference, strict=True)]))
    total = torch.stack(losses)
    gradients = torch.autograd.grad(total.mean(), list(adapters.values()))
    return total, torch.stack(rewards).detach(), dict(zip(adapters, gradients, strict=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradients_are_those_of_the_formula(
    pools: Callable[[int], RankPool], cache_dir: Path, pairs: Path, smoothing: float
) -> None:
    flags = dpo(pairs, train_batch_size=2, gradient_accumulation_steps=2, dpo_label_smoothing=smoothing, dpo_beta=0.3)
    found = pools(1).run(against_the_formula, flags, cache_dir)[0]
    assert found["pairs"][0] == found["pairs"][1] > 4 and found["rows_with_padding"]
    # Float32 sums in another order; log-probabilities of some hundred tokens are added and subtracted.
    assert found["sums"] == pytest.approx(found["expected"], rel=1e-4, abs=1e-4)
    for name, gradient in found["gradients"].items():
        expected = found["expected_gradients"][name]
        assert (gradient - expected).norm() <= 1e-4 * expected.norm(), name


# --- the training


def learn(world: World, flags: str, cache_dir: Path, num_steps: int) -> tuple[list[Any], dict[str, float], bool]:
    """Each step's (loss, norm, statistics); validation after; whether the frozen weights are what they were."""
    with a_job(world, flags, cache_dir) as job:
        frozen = [one for one in job.module.hf_model.parameters() if not one.requires_grad]
        before = [bits(one).clone() for one in frozen]
        progress, found = Progress(), []
        for _ in range(num_steps):
            report = train_step(job, progress, flags=tuple)
            progress = advance(progress, report, seconds=0.0)
            found.append((report.loss, report.grad_norm, dict(report.statistics)))
        frozen = [one for one in job.module.hf_model.parameters() if not one.requires_grad]
        same = all(torch.equal(bits(one), old) for one, old in zip(frozen, before, strict=True))
        return found, evaluate(job), same


@pytest.mark.parametrize("extra", ["", "--bnb_quant_type nf4 --activation_checkpointing full"])
def test_the_chosen_answers_come_to_be_preferred(
    pools: Callable[[int], RankPool], cache_dir: Path, pairs: Path, extra: str
) -> None:
    """Nothing is preferred at first, exactly; dropout acts on the policy alone."""
    flags = f"{dpo(pairs, train_batch_size=2, dpo_beta=0.5, max_steps=12)} {extra}"
    steps, validation, is_same = pools(2).run(learn, flags, cache_dir, 12)[0]
    first, last = steps[0], steps[-1]
    assert first[0] == pytest.approx(math.log(2), rel=1e-6)
    assert first[2] == {"preference_accuracy": 0.0, "reward_margin": 0.0, "chosen_reward": 0.0}
    assert last[0] < 0.1 and last[2]["preference_accuracy"] == 1.0 and last[2]["reward_margin"] > 2
    assert validation["validation_loss"] < 0.2 and validation["validation_preference_accuracy"] == 1.0
    assert is_same


@pytest.mark.parametrize(("model", "strategy"), [("tiny_llama", "full"), ("tiny_mixtral", "zero2")])
def test_one_rank_learns_as_two(
    pools: Callable[[int], RankPool], cache_dir: Path, pairs: Path, model: str, strategy: str
) -> None:
    common = f"{dpo(pairs)} --model {model} --num_layers 2"
    one = pools(1).run(learn, f"{common} --train_batch_size 4", cache_dir, 3)[0][0]
    spread = f"{common} --train_batch_size 1 --gradient_accumulation_steps 2 --sharding_strategy {strategy}"
    two = pools(2).run(learn, spread, cache_dir, 3)[0][0]
    assert_same_training([step[:2] for step in two], [step[:2] for step in one])
    assert two[2][2] == pytest.approx(one[2][2], rel=1e-3)


def reference_with_dropout(world: World, flags: str, cache_dir: Path) -> list[float]:
    """The first step's loss and margin, where only dropout tells policy and reference apart; what is on afterwards."""
    with a_job(world, flags, cache_dir) as job:
        for name, parameter in job.parameters.items():
            if name.endswith("lora_B"):
                parameter.detach().to_local().fill_(0.01)  # type: ignore[attr-defined]
        report = train_step(job, Progress(), flags=tuple)
        return [report.loss, float(job.module.hf_model.training)]


def test_the_policy_is_in_training_again_after_the_reference(
    pools: Callable[[int], RankPool], cache_dir: Path, pairs: Path
) -> None:
    plain, dropped = (
        pools(1).run(reference_with_dropout, dpo(pairs, lora_dropout=p), cache_dir)[0] for p in (0.0, 0.5)
    )
    assert plain[0] != dropped[0] and plain[1] == dropped[1] == 1.0


# --- what is refused


def test_only_preferences_teach_preferences(pools: Callable[[int], RankPool], cache_dir: Path, pairs: Path) -> None:
    with pytest.raises(AssertionError, match=r"expected.*chosen"):
        pools(1).run(learn, tiny(objective="dpo", lora_r=8), cache_dir, 1)
    with pytest.raises(AssertionError, match="--objective=dpo"):
        pools(1).run(learn, tiny(dataset=pairs), cache_dir, 1)


@pytest.mark.parametrize(
    "flags",
    [
        "--objective dpo",
        "--objective dpo --lora_r 8 --lora_init_from x",
        "--objective dpo --lora_r 8 --packing concat",
        "--objective dpo --lora_r 8 --long_documents truncate",
        "--objective dpo --lora_r 8 --document_mask 0",
        "--objective dpo --lora_r 8 --data_kind chat",
        "--dpo_beta 0.2",
        "--data_kind preference",
    ],
)
def test_what_does_not_go_with_preferences_is_refused(cache_dir: Path, flags: str) -> None:
    with pytest.raises(ConfigError, match="dpo"):
        config_of(flags, cache_dir=cache_dir)


def test_a_resumed_run_goes_on_exactly_and_with_the_same_loss_only(
    pools: Callable[[int], RankPool], cache_dir: Path, pairs: Path, tmp_path: Path
) -> None:
    flags = dpo(pairs, lora_dropout=0.1, lr_decay_style="constant")
    whole = pools(2).run(some_steps, f"{flags} --max_steps 4", cache_dir, tmp_path / "whole")[0][1]
    pools(2).run(some_steps, f"{flags} --max_steps 2", cache_dir, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "refused")
    assert pools(2).run(resumed, f"{flags} --max_steps 4", cache_dir, tmp_path / "run")[0][1] == whole[2:]
    found = pools(1).run(refusal, f"{flags} --dpo_beta 0.2", cache_dir, tmp_path / "refused")[0]
    assert "--dpo_beta=0.1 (this run: 0.2)" in found
    text = f"{flags} --dataset embedded --objective next_token --restart_data 1"
    found = pools(1).run(refusal, text, cache_dir, tmp_path / "refused")[0]
    assert "--objective=dpo (this run: next_token)" in found
