"""A stand-in for SMTC: its semantics are colours, its instances halves of the frame."""

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn

GREY, RED, GREEN = (128, 128, 128), (255, 0, 0), (0, 255, 0)
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class Answer(NamedTuple):
    semantic_slots: torch.Tensor
    semantic_logits: torch.Tensor
    instance_slots: torch.Tensor
    instance_logits: torch.Tensor
    embeddings: torch.Tensor
    grid: tuple[int, int]


class ColourModel(nn.Module):
    """Semantics 0, 1, 2 are the tokens nearest to grey, red, green; instance 0 of each is the left
    half of the frame, instance 1 the right one. `scores[n][p]` are the cosines of their slots.
    """

    def __init__(self, scores=((1, 1), (1, 1), (1, 1)), resolution=(32, 32), sharpness=100.0):
        super().__init__()
        self.config = SimpleNamespace(
            resolution=resolution,
            slots=3,
            instances=2,
            iterations=3,
            backbone=SimpleNamespace(patch=4),
        )
        self.colours = nn.Parameter(torch.tensor([GREY, RED, GREEN]) / 255)
        self.cosines = torch.tensor(scores, dtype=torch.float32)
        self.sharpness = sharpness
        self.dropout = nn.Dropout()
        self.calls = []

    def forward(self, clip, noise=None, reference=None, *, iterations=None):
        assert not self.training and not torch.is_grad_enabled()
        self.calls.append((tuple(clip.shape), iterations))
        batch, frames, _, height, width = clip.shape
        grid = height // 4, width // 4
        tokens = self.features(clip)  # [B,T,L,3]
        distance = (tokens[:, :, None] - self.colours[:, None]).square().sum(-1)
        logits = -self.sharpness * distance  # [B,T,N,L]
        column = torch.arange(grid[0] * grid[1]) % grid[1]
        left = torch.where(column < grid[1] // 2, 20.0, -20.0)
        halves = torch.stack([left, -left]).expand(batch, frames, 3, 2, -1)
        semantic = torch.tensor([1.0, 0.0]).expand(batch, frames, 3, 2)
        sine = (1 - self.cosines**2).sqrt()
        instance = torch.stack([self.cosines, sine], -1).expand(batch, frames, 3, 2, 2)
        one_hot = torch.eye(6).view(3, 2, 6).expand(batch, frames, 3, 2, 6)
        return Answer(semantic, logits, instance, halves, one_hot, grid)

    def inference_noise(self, device, seed=0):
        return torch.zeros(3, 2, 2, device=device)

    def features(self, clip):
        pooled = nn.functional.avg_pool2d(clip.flatten(0, 1), 4).flatten(2).transpose(1, 2)
        return (pooled * STD + MEAN).unflatten(0, clip.shape[:2])

    def encode(self, clip):
        return self.features(clip), (clip.shape[3] // 4, clip.shape[4] // 4)
