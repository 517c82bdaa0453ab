"""AdamW with two parameter groups; its state exists from the start.

State made at the first step would make the first step, and a resume, need memory that the check before
training did not see; and a checkpoint restored into missing state restores nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..config.schema import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_adamw(
    parameters: Mapping[str, torch.Tensor], *, decayed: Iterable[str], optim: OptimConfig
) -> torch.optim.AdamW:
    """AdamW over `parameters` (name -> parameter); only those named in `decayed` feel weight decay."""
    decayed = set(decayed)
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    groups = [
        {"params": [p for name, p in trained.items() if name in decayed], "weight_decay": optim.weight_decay},
        {"params": [p for name, p in trained.items() if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.adam_epsilon,
        fused=True,
    )
    for parameter in trained.values():
        state = optimizer.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(parameter)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def set_step_count(optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    """Tell AdamW how many updates its moments have seen (for bias correction after a restore)."""
    for state in optimizer.state.values():
        state["step"].fill_(float(num_steps))
