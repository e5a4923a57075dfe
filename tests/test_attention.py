"""Attention: torch's against the formula, xformers' by a stand-in of its layout."""

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from commands import train_flags
from torch import Tensor
from torch.nn.attention import SDPBackend

from smtc import attention, compatibility
from smtc.attention import ORDER, attend, backend_order, load_xformers
from smtc.backbones import build_encoder
from smtc.compatibility import RULES
from smtc.config import BackboneConfig
from smtc.errors import UserError

CPU = torch.device("cpu")
VIT = BackboneConfig(architecture="vit_tiny", patch=8, drop_path=0.3)


def drawn(*shape: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(shape, generator=generator, dtype=torch.float64)


def by_loops(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`[B,M,H,K]` each, a head at a time."""
    found = torch.zeros_like(query)
    for frame in range(query.shape[0]):
        for head in range(query.shape[2]):
            q, k, v = (x[frame, :, head] for x in (query, key, value))
            weights = (q @ k.T / math.sqrt(q.shape[1])).exp()
            found[frame, :, head] = weights / weights.sum(1, keepdim=True) @ v
    return found


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Size]]:
    """A package whose attention takes [B,M,H,K]; fills with the shapes that it was given."""
    shapes: list[torch.Size] = []

    def memory_efficient_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shapes.append(query.shape)
        assert query.shape == key.shape == value.shape and query.stride(-1) == 1
        scores = torch.einsum("bmhk,bnhk->bhmn", query, key) / math.sqrt(query.shape[-1])
        return torch.einsum("bhmn,bnhk->bmhk", scores.softmax(-1), value)

    package, operators = ModuleType("xformers"), ModuleType("xformers.ops")
    operators.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    package.ops = operators  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", operators)
    load_xformers.cache_clear()
    yield shapes
    load_xformers.cache_clear()


def test_attention_is_the_formula(xformers: list[torch.Size]) -> None:
    draws = drawn(2, 7, 3, 5)
    query, key, value = (next(draws) for _ in range(3))
    expected = by_loops(query, key, value)
    torch.testing.assert_close(attend(query, key, value), expected)
    assert not xformers
    torch.testing.assert_close(attend(query, key, value, "xformers"), expected)
    assert xformers == [query.shape]


@pytest.mark.parametrize("feature", ["keys", "tokens"])
def test_xformers_gives_the_same_features_and_gradients(
    xformers: list[torch.Size], feature: str
) -> None:
    config = BackboneConfig(architecture="vit_tiny", patch=8, feature=feature)  # type: ignore[arg-type]
    found = {}
    for impl in ("sdpa", "xformers"):
        torch.manual_seed(0)
        encoder = build_encoder(config, impl).double().train()
        frames = next(drawn(3, 3, 24, 16))
        features = encoder(frames, torch.rand(3, encoder.branches, generator=torch.manual_seed(1)))
        features.square().sum().backward()
        gradients = {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
        found[impl] = features.detach(), gradients
    torch.testing.assert_close(found["xformers"], found["sdpa"])
    # A frame's 6 places and CLS, two heads of 32; the last block's keys need no attention.
    assert xformers == [torch.Size((3, 7, 2, 32))] * (2 if feature == "keys" else 3)


def test_on_a_cpu_xformers_is_one_sentence(
    safe: Callable[..., str], xformers: list[torch.Size], synthetic_data: Path, tmp_path: Path
) -> None:
    said = safe(*train_flags(synthetic_data, tmp_path / "run", "--model.attention", "xformers"))
    assert "--model.attention xformers does not go together with a CPU" in said
    assert "xformers has no kernel for CPUs; use sdpa." in said


@pytest.mark.parametrize("broken", ["missing", "without attention"])
def test_without_the_package_it_is_one_sentence(
    safe: Callable[..., str],
    xformers: list[torch.Size],
    synthetic_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
) -> None:
    kept = tuple(rule for rule in RULES if rule.other != ("train.device", "cpu"))
    monkeypatch.setattr(compatibility, "RULES", kept)
    operators = None if broken == "missing" else ModuleType("xformers.ops")
    monkeypatch.setitem(sys.modules, "xformers.ops", operators)
    said = safe(*train_flags(synthetic_data, tmp_path / "run", "--model.attention", "xformers"))
    assert "--model.attention xformers: the package cannot be imported" in said
    assert "pip install xformers in a version for this torch, or use sdpa." in said


def test_a_model_says_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    load_xformers.cache_clear()
    with pytest.raises(UserError, match="pip install xformers"):
        build_encoder(VIT, "xformers")(torch.randn(1, 3, 16, 16))


# The order of torch's backends.


def order_within(device: torch.device) -> list[SDPBackend]:
    from torch.nn.attention import _cur_sdpa_kernel_backends

    with backend_order(device):
        return _cur_sdpa_kernel_backends(with_priority=True)


def test_on_hopper_the_chosen_order_holds_within_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    device, before = torch.device("cuda"), order_within(CPU)
    for capability, expected in (((8, 0), before), ((9, 0), list(ORDER)), ((10, 0), list(ORDER))):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert order_within(device) == expected
        assert order_within(CPU) == before
    assert ORDER[0] == SDPBackend.CUDNN_ATTENTION and ORDER[-1] == SDPBackend.MATH


def test_within_the_order_a_cpu_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: attention.HOPPER)
    draws = drawn(2, 7, 3, 5)
    query, key, value = (next(draws) for _ in range(3))
    with backend_order(torch.device("cuda")):
        found = attend(query, key, value)
    torch.testing.assert_close(found, by_loops(query, key, value))
