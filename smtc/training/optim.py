"""AdamW's parameter groups and the learning-rate schedule."""

import math

import torch
from torch import Tensor, nn

from smtc.config import OptimConfig

# At least two-dimensional, yet no weights of a linear map.
_EMBEDDINGS = ("slots_mu", "slots_sigma", "pos_embed", "cls_token")


def build_optimizer(
    parameters: dict[str, nn.Parameter], config: OptimConfig
) -> torch.optim.Optimizer:
    """AdamW over named parameters: matrices decay, the rest does not; the encoder's groups are
    marked.

    Each group keeps its parameters' names, so that a state can be saved and restored by name.
    """
    members: dict[tuple[bool, bool], list[str]] = {}
    for name, parameter in parameters.items():
        decays = parameter.ndim >= 2 and (
            config.decay_embeddings or name.rpartition(".")[2] not in _EMBEDDINGS
        )
        members.setdefault((name.startswith("encoder."), decays), []).append(name)
    groups = [
        {
            "params": [parameters[name] for name in names],
            "names": names,
            "encoder": encoder,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (encoder, decays), names in members.items()
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


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
        group["lr"] = encoder_rate if group["encoder"] else rate
    return rate


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """Moments by parameter name; parameters that never had a gradient have none."""
    return {
        name: optimizer.state[parameter]
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        if parameter in optimizer.state
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, state: dict[str, dict[str, torch.Tensor]]
) -> None:
    """Take over the moments of the parameters that `state` names; the others start afresh."""
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if name in state:
                moments = {k: v.clone() for k, v in state[name].items()}
                # The step count stays where fused AdamW keeps it: on the parameter's device, fp32.
                optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in moments.items()}


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
        if self.scaler.is_enabled():
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            # The same switch that the scaler uses: a fused optimiser reads it on the device.
            optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
            optimizer.step()
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
