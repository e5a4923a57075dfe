"""Slot attention's switches, seen from outside: where gradients go and what empty masks do."""

import pytest
import torch
from torch import Tensor

from smtc.config import ModelConfig
from smtc.slots import SlotAttention, slot_similarity

FRAMES, POSITIONS, WIDTH, SLOTS, INSTANCES = 3, 20, 16, 4, 2


def build(**changes: object) -> SlotAttention:
    torch.manual_seed(0)
    settings = {"slots": SLOTS, "instances": INSTANCES, "semantic_mask": "logits>0.3"}
    return SlotAttention(ModelConfig(**(settings | changes)), WIDTH)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    fused = torch.randn(FRAMES, POSITIONS, WIDTH, generator=generator)
    noise = torch.randn(FRAMES, SLOTS, INSTANCES, WIDTH, generator=generator)
    return fused, noise


def gradients(attention: SlotAttention, outputs: list[Tensor]) -> dict[str, Tensor | None]:
    """Of a fixed random projection of the outputs, by parameter."""
    generator = torch.Generator().manual_seed(2)
    total = sum((torch.randn(x.shape, generator=generator) * x).sum() for x in outputs)
    parameters = dict(attention.named_parameters())
    grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, grads, strict=True))


def test_shapes_and_normalised_masks() -> None:
    attention = build()
    slots, logits, instances, instance_logits = attention(*inputs(), iterations=3)
    assert slots.shape == (FRAMES, SLOTS, WIDTH)
    assert logits.shape == (FRAMES, SLOTS, POSITIONS)
    assert instances.shape == (FRAMES, SLOTS, INSTANCES, WIDTH)
    assert instance_logits.shape == (FRAMES, SLOTS, INSTANCES, POSITIONS)
    assert logits.dtype == instance_logits.dtype == torch.float32


def test_straight_through_changes_gradients_and_no_values() -> None:
    through, full = build(gradient="straight_through"), build(gradient="full")
    got, expected = through(*inputs(), 3), full(*inputs(), 3)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    one, other = gradients(through, list(got)), gradients(full, list(expected))
    for name in ("project_k.weight", "slots_mu", "mlp.0.weight"):
        difference = (one[name] - other[name]).norm() / other[name].norm()
        assert difference > 0.05, name


def test_with_one_iteration_both_gradients_are_the_same() -> None:
    through, full = build(gradient="straight_through"), build(gradient="full")
    one = gradients(through, list(through(*inputs(), 1)))
    other = gradients(full, list(full(*inputs(), 1)))
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name])


def test_straight_through_is_one_iteration_from_where_the_earlier_ones_ended() -> None:
    attention = build(gradient="straight_through")
    fused, noise = (x[:1] for x in inputs())
    iterated = gradients(attention, list(attention(fused, noise, 3)[:2]))

    with torch.no_grad():
        reached = attention(fused, noise, 2)[0]
        attention.slots_mu.copy_(reached.view(1, SLOTS, 1, WIDTH))
    last_only = gradients(attention, list(attention(fused, noise, 1)[:2]))
    for name, gradient in iterated.items():
        if gradient is None:
            assert last_only[name] is None, name
        else:
            torch.testing.assert_close(gradient, last_only[name], rtol=1e-4, atol=1e-4)


def test_straight_through_keeps_no_graph_of_the_earlier_iterations() -> None:
    def saved(gradient: str, iterations: int) -> int:
        count = [0]

        def pack(tensor: Tensor) -> Tensor:
            count[0] += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            build(gradient=gradient)(*inputs(), iterations)
        return count[0]

    assert saved("straight_through", 5) == saved("straight_through", 2)
    assert saved("full", 5) > saved("full", 2)


@pytest.mark.parametrize("gradient", ["straight_through", "full"])
def test_detached_sampling_sends_nothing_to_mean_and_sigma(gradient: str) -> None:
    attention = build(sampling="detached", gradient=gradient)
    _, _, instances, logits = attention(*inputs(), 3)
    found = gradients(attention, [instances, logits])
    assert found["slots_mu"] is None or not found["slots_mu"].any()
    assert found["slots_sigma"] is None or not found["slots_sigma"].any()
    assert found["project_v.weight"].any()


@pytest.mark.parametrize("gradient", ["straight_through", "full"])
def test_reparameterised_sampling_reaches_mean_and_sigma(gradient: str) -> None:
    attention = build(sampling="reparameterised", gradient=gradient)
    _, _, instances, logits = attention(*inputs(), 3)
    found = gradients(attention, [instances, logits])
    assert found["slots_mu"].any() and found["slots_sigma"].any()


def test_instances_start_at_the_mean_plus_sigma_times_noise() -> None:
    # Nothing to see and no MLP: slots stay where they start.
    attention = build(semantic_mask="softmax>0.5")
    with torch.no_grad():
        attention.mlp[2].weight.zero_()
        attention.mlp[2].bias.zero_()
        attention.project_q.weight.zero_()
        attention.slots_sigma.normal_()
    fused, noise = inputs()
    _, _, instances, _ = attention(fused, noise, 3)
    expected = attention.slots_mu + attention.slots_sigma.exp() * noise
    torch.testing.assert_close(instances, expected)


@pytest.mark.parametrize("update", ["residual", "gru"])
def test_an_empty_mask_is_finite_and_hides_the_frame(update: str) -> None:
    # Equal logits: no softmax over four slots exceeds one half.
    attention = build(semantic_mask="softmax>0.5", update=update)
    with torch.no_grad():
        attention.project_q.weight.zero_()
        attention.project_q.bias.zero_()
    fused, noise = inputs()
    outputs = attention(fused, noise, 3)
    assert not attention.semantic_mask(outputs[1]).any()
    assert all(x.isfinite().all() for x in outputs)
    assert all(g is None or g.isfinite().all() for g in gradients(attention, outputs).values())
    other = attention(fused + torch.randn_like(fused), noise, 3)
    torch.testing.assert_close(outputs[2], other[2])
    assert (outputs[0] - other[0]).abs().max() > 0.01


def test_instances_do_not_see_what_the_mask_hides() -> None:
    attention = build()
    fused, noise = inputs()
    _, logits, before, _ = attention(fused, noise, 1)
    seen = attention.semantic_mask(logits)[0]  # [N,L]
    # A position that some semantics see and others do not, before and after it changes.
    position = int(((seen.any(0)) & (~seen).any(0)).nonzero()[0])
    changed = fused.clone()
    changed[0, position] += 0.1 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
    _, new_logits, after, _ = attention(changed, noise, 1)
    assert torch.equal(attention.semantic_mask(new_logits)[0], seen)
    for n in range(SLOTS):
        moved = (before[0, n] - after[0, n]).abs().max()
        assert moved > 1e-4 if seen[n, position] else moved < 1e-6


def test_masks_by_logits_may_overlap_and_those_by_softmax_may_not() -> None:
    logits = torch.tensor([[[1.0, 3.0, 0.31], [0.9, -1.0, 0.29], [-2.0, 0.0, -5.0]]])
    by_logits = build(semantic_mask="logits>0.3").semantic_mask(logits)
    by_softmax = build(semantic_mask="softmax>0.5").semantic_mask(logits)
    assert by_logits.int().tolist() == [[[1, 1, 1], [1, 0, 0], [0, 0, 0]]]
    assert by_softmax.int().tolist() == [[[1, 1, 1], [0, 0, 0], [0, 0, 0]]]
    assert by_logits.dtype == by_softmax.dtype == torch.bool


def test_the_gru_keeps_a_slot_when_its_gate_says_so() -> None:
    attention = build(update="gru")
    with torch.no_grad():
        attention.mlp[2].weight.zero_()
        attention.mlp[2].bias.zero_()
        attention.gru.bias_ih[WIDTH : 2 * WIDTH] = 100.0
    slots, *_ = attention(*inputs(), 3)
    start = attention.slots_mu[:, :, 0].expand(FRAMES, -1, -1)
    torch.testing.assert_close(slots, start)
    with torch.no_grad():
        attention.gru.bias_ih[WIDTH : 2 * WIDTH] = -100.0
    slots, *_ = attention(*inputs(), 3)
    assert slots.abs().max() <= 1 and (slots - start).abs().max() > 0.5


def test_only_the_gru_update_has_a_gru() -> None:
    assert "gru.weight_ih" in build(update="gru").state_dict()
    assert not any("gru" in name for name in build(update="residual").state_dict())


def test_the_order_of_positions_does_not_matter() -> None:
    attention = build()
    fused, noise = inputs()
    order = torch.randperm(POSITIONS)
    slots, logits, instances, instance_logits = attention(fused, noise, 3)
    moved = attention(fused[:, order], noise, 3)
    torch.testing.assert_close(moved[0], slots, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved[1], logits[..., order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved[2], instances, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved[3], instance_logits[..., order], rtol=1e-4, atol=1e-5)


def test_slot_similarity() -> None:
    semantic = torch.tensor([3.0, 0.0]).view(1, 1, 1, 2)
    instances = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0], [1.0, 1.0]]).view(1, 1, 1, 4, 2)
    torch.testing.assert_close(
        slot_similarity(semantic, instances), torch.tensor([[[[1.0, 0.0, -1.0, 0.5**0.5]]]])
    )


@pytest.mark.parametrize("update", ["residual", "gru"])
def test_the_state_stays_fp32_under_autocast(update: str) -> None:
    """In each iteration, and the GRU computes in fp32 (CUDA's autocast would have it in bf16)."""
    attention = build(update=update)
    states: list[torch.dtype] = []
    inside: list[bool] = []
    attention.norm_slots.register_forward_pre_hook(lambda _, given: states.append(given[0].dtype))
    if attention.gru is not None:
        attention.gru.register_forward_hook(
            lambda *_: inside.append(torch.is_autocast_enabled("cpu"))
        )
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        outputs = attention(*inputs(), iterations=3)
    assert states == [torch.float32] * 6  # three iterations of both stages
    assert all(output.dtype == torch.float32 for output in outputs)
    assert inside == ([False] * 6 if update == "gru" else [])
