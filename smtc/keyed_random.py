"""Random numbers that depend on a key and nothing else: not on rank, worker, device, batch size or
history.

A number is a hash of (seed, sample index, stream, position), as in counter-based generators: one
vectorised expression that runs without a host copy on any device. The integers are the same
everywhere; the normals agree to rounding.
"""

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _mix(bits: Tensor) -> Tensor:
    """A bijection of 32 bits that spreads each over all (two multiply–xorshift rounds), held in
    int64.
    """
    bits = ((bits ^ (bits >> 16)) * 0x21F0AAAD) & _MASK
    bits = ((bits ^ (bits >> 15)) * 0x735A2D97) & _MASK
    return bits ^ (bits >> 15)


def keyed_bits(seed: int, index: Tensor, stream: int, count: int) -> Tensor:
    """Hashes `[B, count]` (int64 in [0, 2^32)) of sample indices `[B]` (int64)."""
    key = _mix(index & _MASK) ^ _mix((index >> 32) + 0x632BE5AB)
    for word in (seed & _MASK, (seed >> 32) & _MASK, stream):
        key = _mix((key + word * 0x9E3779B9) & _MASK)
    position = torch.arange(count, device=index.device)
    return _mix((_mix((key[:, None] + position * 0x9E3779B9) & _MASK) + key[:, None]) & _MASK)


def keyed_uniform(seed: int, index: Tensor, stream: int, count: int) -> Tensor:
    """Uniform float32 `[B, count]` in the open interval (0, 1)."""
    # 23 bits and a half step: the largest value is still below 1 in float32.
    return ((keyed_bits(seed, index, stream, count) >> 9).float() + 0.5) / 2**23


def keyed_normal(seed: int, index: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 `[B, *shape]` (Box and Muller's transform)."""
    count = math.prod(shape)
    radius, angle = keyed_uniform(seed, index, stream, 2 * count).chunk(2, dim=1)
    normal = torch.sqrt(-2 * torch.log(radius)) * torch.cos(2 * math.pi * angle)
    return normal.reshape(len(index), *shape)


def keyed_other_frame(seed: int, index: Tensor, stream: int, frames: int) -> Tensor:
    """For each of `frames` frames of a clip another frame of it, each equally likely: int64 `[B,
    frames]`.
    """
    step = keyed_bits(seed, index, stream, frames) % (frames - 1) + 1
    return (torch.arange(frames, device=index.device) + step) % frames
