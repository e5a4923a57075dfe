"""The forward pass, written out with loops over clips, frames and slots.

Nothing here is shared with the package. Everything is plain differentiable torch, meant for
float64, so that gradients can be compared as well as values. Weights are a dict with the names of
the authors' checkpoint; the GRU's and the linear fusion head's names are the package's.
"""

import itertools
import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(x: Tensor, weights: Weights, name: str, eps: float = 1e-5) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    normed = (x - mean) / torch.sqrt(variance + eps)
    return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def softmax(x: Tensor, dim: int) -> Tensor:
    exps = torch.exp(x - x.max(dim, keepdim=True).values.detach())
    return exps / exps.sum(dim, keepdim=True)


def relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.zeros_like(x))


def norm(x: Tensor) -> Tensor:
    return torch.sqrt((x * x).sum(-1))


def vit_features(
    frame: Tensor, weights: Weights, *, heads: int, patch: int, pretrained_grid: int, feature: str
) -> Tensor:
    """A DINO ViT: one frame [3,H,W] to [L,D], the last block's keys or output, without CLS."""
    rows, columns = frame.shape[1] // patch, frame.shape[2] // patch
    kernel = weights["patch_embed.proj.weight"]
    tokens = [weights["cls_token"][0, 0]]
    for i, j in itertools.product(range(rows), range(columns)):
        pixels = frame[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
        tokens.append((kernel * pixels).sum((1, 2, 3)) + weights["patch_embed.proj.bias"])
    position = weights["pos_embed"][0]
    places = bicubic_by_scale(position[1:], pretrained_grid, rows, columns)
    x = torch.stack(tokens) + torch.cat([position[:1], places])

    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    width = x.shape[-1]
    for index in range(depth):
        block = f"blocks.{index}."
        qkv = linear(layer_norm(x, weights, block + "norm1", 1e-6), weights, block + "attn.qkv")
        q, k, v = qkv[:, :width], qkv[:, width : 2 * width], qkv[:, 2 * width :]
        if index == depth - 1 and feature == "keys":
            return k[1:]
        size = width // heads
        mixed = []
        for head in range(heads):
            of = slice(head * size, (head + 1) * size)
            attention = softmax(q[:, of] @ k[:, of].T / math.sqrt(size), -1)
            mixed.append(attention @ v[:, of])
        x = x + linear(torch.cat(mixed, -1), weights, block + "attn.proj")
        hidden = linear(layer_norm(x, weights, block + "norm2", 1e-6), weights, block + "mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(hidden, weights, block + "mlp.fc2")
    return x[1:]


def bicubic_by_scale(values: Tensor, side: int, rows: int, columns: int) -> Tensor:
    """[side², D] to [rows·columns, D]: bicubic (a = -0.75), borders repeated, with the scale
    (w0 + 0.1) / side of the authors' code.
    """
    if rows == columns == side:
        return values

    def taps(target: int, count: int) -> list[tuple[int, float]]:
        place = (target + 0.5) / ((count + 0.1) / side) - 0.5
        first = math.floor(place) - 1
        weighted = []
        for source in range(first, first + 4):
            d = abs(place - source)
            near = 1.25 * d**3 - 2.25 * d**2 + 1
            far = -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            weighted.append((min(max(source, 0), side - 1), near if d <= 1 else far))
        return weighted

    out = []
    for i, j in itertools.product(range(rows), range(columns)):
        out.append(
            sum(
                wi * wj * values[si * side + sj]
                for si, wi in taps(i, rows)
                for sj, wj in taps(j, columns)
            )
        )
    return torch.stack(out)


def bilinear(values: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """[h·w, D] to [H·W, D], align_corners=False, no antialias."""

    def taps(index: int, size: int, wanted: int) -> list[tuple[int, float]]:
        place = max((index + 0.5) * size / wanted - 0.5, 0.0)
        low = math.floor(place)
        return [(low, 1 - (place - low)), (min(low + 1, size - 1), place - low)]

    out = []
    for i, j in itertools.product(range(target[0]), range(target[1])):
        out.append(
            sum(
                wi * wj * values[si * grid[1] + sj]
                for si, wi in taps(i, grid[0], target[0])
                for sj, wj in taps(j, grid[1], target[1])
            )
        )
    return torch.stack(out)


def forward(
    features: Tensor,
    weights: Weights,
    *,
    grid: tuple[int, int],
    training_grid: tuple[int, int],
    noise: Tensor,
    reference: Tensor | None,
    iterations: int = 3,
    fusion_head: str,
    update: str,
    gradient: str,
    semantic_mask: str,
    sampling: str,
    embedding: str,
    correlation_scale: float = 1.0,
) -> dict[str, Tensor]:
    """Features [B,T,L,D] to slots, logits and embeddings, named as `smtc.Output` names them.

    noise [B,T,N,P,D]; reference frames [B,T], None: the previous one, cyclically.
    """
    clips, frames = features.shape[:2]
    collected: dict[str, list[list[Tensor]]] = {}
    for b in range(clips):
        rows: dict[str, list[Tensor]] = {}
        for t in range(frames):
            j = (t - 1) % frames if reference is None else int(reference[b, t])
            other = features[b, j]
            if grid != training_grid:
                other = bilinear(other, grid, training_grid)
            correlation = correlation_scale * (features[b, t] @ other.T)
            fused = correlation @ weights["transport_proj.weight"][:, :, 0].T
            fused = fused + weights["transport_proj.bias"]
            head = features[b, t]
            if fusion_head == "linear":
                head = linear(head, weights, "fusion")
            frame = _frame(
                fused + head,
                weights,
                noise[b, t],
                iterations=iterations,
                update=update,
                gradient=gradient,
                semantic_mask=semantic_mask,
                sampling=sampling,
                embedding=embedding,
            )
            for name, value in frame.items():
                rows.setdefault(name, []).append(value)
        for name, values in rows.items():
            collected.setdefault(name, []).append(torch.stack(values))
    return {name: torch.stack(values) for name, values in collected.items()}


def _frame(
    fused: Tensor,
    weights: Weights,
    noise: Tensor,
    *,
    iterations: int,
    update: str,
    gradient: str,
    semantic_mask: str,
    sampling: str,
    embedding: str,
) -> dict[str, Tensor]:
    """Both slot-attention stages for one frame: fused [L,D], noise [N,P,D]."""
    x = layer_norm(fused, weights, "slot_attention.norm_input")
    keys = linear(x, weights, "slot_attention.project_k")
    values = linear(x, weights, "slot_attention.project_v")
    how = {"iterations": iterations, "update": update, "gradient": gradient}

    mu = weights["slot_attention.slots_mu"][0, :, 0]
    sigma = torch.exp(weights["slot_attention.slots_sigma"][0, :, 0])
    semantic_slots, semantic_logits = _attend(mu, keys, values, None, weights, **how)
    masks = {
        "softmax>0.5": softmax(semantic_logits, 0) > 0.5,
        "logits>0.3": semantic_logits > 0.3,
    }[semantic_mask].to(fused.dtype)

    instance_slots, instance_logits = [], []
    for n in range(mu.shape[0]):
        start = torch.stack([mu[n] + sigma[n] * z for z in noise[n]])
        if sampling == "detached":
            start = start.detach()
        slots, logits = _attend(start, keys, values, masks[n], weights, **how)
        instance_slots.append(slots)
        instance_logits.append(logits)
    instances = torch.stack(instance_slots)

    embeddings = instances
    if embedding == "mlp":
        hidden = relu(linear(instances, weights, "mlp_slot.0"))
        raw = linear(hidden, weights, "mlp_slot.2")
        embeddings = raw / norm(raw)[..., None]
    return {
        "semantic_slots": semantic_slots,
        "semantic_logits": semantic_logits,
        "instance_slots": instances,
        "instance_logits": torch.stack(instance_logits),
        "embeddings": embeddings,
    }


def _attend(
    start: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    weights: Weights,
    *,
    iterations: int,
    update: str,
    gradient: str,
) -> tuple[Tensor, Tensor]:
    """Competing slots [S,D], from `start`, over the positions of one frame; mask [L] of 0 and 1."""
    slots = start
    for iteration in range(iterations):
        if gradient == "straight_through" and iteration == iterations - 1:
            slots = slots.detach() - start.detach() + start
        normed = layer_norm(slots, weights, "slot_attention.norm_slots")
        queries = linear(normed, weights, "slot_attention.project_q")
        logits = torch.stack([keys @ query for query in queries]) / math.sqrt(keys.shape[-1])
        attention = softmax(logits, 0) + 1e-8
        updated = []
        for s in range(slots.shape[0]):
            if mask is None:
                share = attention[s] / attention[s].sum()
            else:
                share = attention[s] * mask / ((attention[s] * mask).sum() + 1e-8)
            received = share @ values
            new = slots[s] + received if update == "residual" else _gru(received, slots[s], weights)
            hidden = layer_norm(new, weights, "slot_attention.norm_pre_ff")
            hidden = relu(linear(hidden, weights, "slot_attention.mlp.0"))
            updated.append(new + linear(hidden, weights, "slot_attention.mlp.2"))
        slots = torch.stack(updated)
    return slots, logits


def _gru(received: Tensor, state: Tensor, weights: Weights) -> Tensor:
    prefix = "slot_attention.gru."
    into = weights[prefix + "weight_ih"] @ received + weights[prefix + "bias_ih"]
    back = weights[prefix + "weight_hh"] @ state + weights[prefix + "bias_hh"]
    d = state.shape[-1]
    reset = torch.sigmoid(into[:d] + back[:d])
    keep = torch.sigmoid(into[d : 2 * d] + back[d : 2 * d])
    candidate = torch.tanh(into[2 * d :] + reset * back[2 * d :])
    return (1 - keep) * candidate + keep * state
