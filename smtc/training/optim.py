"""AdamW's parameter groups and the learning-rate schedule."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from smtc.config import OptimConfig
from smtc.training.apex import counts_by_group, fused_adam, gated_step

Moments = dict[str, dict[str, Tensor]]

# At least two-dimensional, yet no weights of a linear map.
_EMBEDDINGS = ("slots_mu", "slots_sigma", "pos_embed", "cls_token")


def build_optimizer(
    parameters: dict[str, nn.Parameter],
    config: OptimConfig,
    *,
    capturable: bool = False,
    moments: Moments | None = None,
) -> torch.optim.Optimizer:
    """AdamW over named parameters: matrices decay, the rest does not; the encoder's groups are
    marked.

    Each group keeps its parameters' names, so that a state can be saved and restored by name.
    `capturable`: the rates are tensors on the device, which a CUDA graph reads anew each time.
    `moments`: what `load_optimizer_state` will be given, for optimisers that count steps by group.
    """
    apex = config.impl == "apex"
    members: dict[tuple[bool, bool, int], list[str]] = {}
    for name, parameter in parameters.items():
        decays = parameter.ndim >= 2 and (
            config.decay_embeddings or name.rpartition(".")[2] not in _EMBEDDINGS
        )
        done = int((moments or {})[name]["step"]) if apex and name in (moments or {}) else 0
        members.setdefault((name.startswith("encoder."), decays, done), []).append(name)
    groups: list[dict[str, Any]] = [
        {
            "params": [parameters[name] for name in names],
            "names": names,
            "encoder": encoder,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (encoder, decays, _), names in members.items()
    ]
    if apex or capturable:
        for group in groups:  # one each: groups without their own would share it
            group["lr"] = torch.full((), config.lr, device=group["params"][0].device)
    if apex:
        return fused_adam(groups, config)
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
        capturable=capturable,
    )


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The head's rate at `step` of exactly `steps`: a linear rise, then half a cosine to `final_lr
    * lr`.
    """
    warmup = config.warmup_steps if config.schedule == "warmup_cosine" else 0
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    floor = config.final_lr * config.lr
    return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(
    optimizer: torch.optim.Optimizer, step: int, steps: int, config: OptimConfig
) -> float:
    """Set every group's rate for `step`; returns the head's."""
    rate = learning_rate(step, steps, config)
    frozen = config.encoder_from_step < 0 or step < config.encoder_from_step
    encoder_rate = 0.0 if frozen else rate * config.encoder_lr
    for group in optimizer.param_groups:
        own = encoder_rate if group["encoder"] else rate
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = own
    return rate


def optimizer_state(optimizer: torch.optim.Optimizer) -> Moments:
    """Moments and step counts by parameter name; parameters that never had a gradient have none."""
    found = {}
    for group in optimizer.param_groups:
        # apex counts the steps of a group.
        shared = {"step": group["step"].float().reshape(())} if "step" in group else {}
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if parameter in optimizer.state:
                found[name] = shared | optimizer.state[parameter]
    return found


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Moments) -> None:
    """Take over the moments of the parameters that `state` names; the others start afresh."""
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if name not in state:
                continue
            # The step count stays where fused AdamW keeps it: on the parameter's device, fp32.
            moments = {k: v.clone().to(parameter.device) for k, v in state[name].items()}
            if counts_by_group(optimizer):
                group["step"] = moments.pop("step").int().reshape(1)
            optimizer.state[parameter] = moments


class Update:
    """One optimiser step that leaves everything as it is where a gradient is not finite.

    The decision stays on the device. For fp16 the loss is scaled, and a step that overflows only
    halves the scale.
    """

    def __init__(self, device: torch.device, *, scaled: bool, clip_norm: float | None) -> None:
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        self._clip_norm = clip_norm

    def step(self, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Tensor]:
        """Apply the gradients; returns their norms (whole, encoder, head) and whether they were
        left out (bool `[]`).
        """
        self.scaler.unscale_(optimizer)  # nothing unless fp16
        norms = _gradient_norms(optimizer)
        total = norms["gradient_norm"]
        skipped = ~total.isfinite()
        if self._clip_norm is not None:
            gradients = [p.grad for g in optimizer.param_groups for p in g["params"]]
            found = [gradient for gradient in gradients if gradient is not None]
            torch._foreach_mul_(found, (self._clip_norm / (total + 1e-6)).clamp(max=1.0))
        # Not the scaler's own step: apex would divide by the scale a second time.
        gated_step(optimizer, skipped)
        self.scaler.update()  # nothing unless fp16
        return norms, skipped

    def state_dict(self) -> dict[str, Tensor]:
        """The scale and how long it has held; empty unless fp16."""
        return {k: torch.tensor(v) for k, v in self.scaler.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        if self.scaler.is_enabled() and state:
            self.scaler.load_state_dict({k: v.item() for k, v in state.items()})


def _gradient_norms(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Norms over all gradients, over the encoder's and over the others', where there are any."""
    parts: dict[str, list[Tensor]] = {"encoder": [], "head": []}
    for group in optimizer.param_groups:
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        parts["encoder" if group["encoder"] else "head"] += torch._foreach_norm(gradients)
    norms = {
        f"gradient_norm/{name}": torch.stack(found).norm() for name, found in parts.items() if found
    }
    return {"gradient_norm": torch.stack(list(norms.values())).norm(), **norms}
