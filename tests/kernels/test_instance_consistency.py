"""instance_consistency and active_negatives against the oracle, in plain torch and fused."""

import functools
import importlib

import pytest
import torch
from cases import (
    DTYPES,
    INSTANCES,
    TRITON_DTYPES,
    compare,
    difference,
    generator,
    instance_inputs,
    only_kernels,
    parity_cases,
    poisoned_memory,
    run,
    unit,
)

from smtc import kernels
from smtc.kernels import eager, launching, reference

fused = importlib.import_module("smtc.kernels.instance_consistency")
OP = "instance_consistency"
FORMS = [("cosine", "batch"), ("cosine", "clip"), ("l2_margin", "batch")]
plain = functools.partial(kernels.instance_consistency, impl="eager")
triton = functools.partial(kernels.instance_consistency, impl="triton")
# B, T, N, P, D: several tiles of frames, on both sides, with tails; chunks of D with a tail; more
# flags than one block counts
TILED = [(1, 9, 2, 2, 3), (1, 3, 1, 8, 20), (2, 5, 1, 4, 150), (1, 19, 2, 1, 4)]


def margin(form):
    return 0.3 if form == "cosine" else 2.0


def low(case, form, dtype=torch.float32, share=0.6):
    tensors = instance_inputs(case, form, share)
    return [t.to(dtype) if t.is_floating_point() else t for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", parity_cases(OP), ids=str)
def test_agrees_with_the_oracle(case, dtype):
    compare(OP, case.inputs(), case.wanted, dtype, **case.settings)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("case", parity_cases(OP), ids=str)
def test_the_kernel_agrees_with_the_oracle(case, dtype):
    compare(OP, case.inputs(), case.wanted, dtype, impl="triton", **case.settings)


@pytest.mark.parametrize(("form", "normaliser"), FORMS)
@pytest.mark.parametrize("case", TILED, ids=str)
def test_more_than_one_tile(case, form, normaliser):
    settings = {"form": form, "margin": margin(form), "normaliser": normaliser}
    inputs = instance_inputs(case, form)
    compare(OP, inputs, [0], torch.float32, impl="triton", **settings)


@pytest.mark.parametrize("form", ["cosine", "l2_margin"])
def test_embeddings_of_two_dtypes(form):
    student, teacher, *valid = low(INSTANCES[0], form)
    teacher = teacher.bfloat16()
    settings = {"form": form, "margin": margin(form)}
    expected = run(plain, [student, teacher.float(), *valid], [0], **settings)
    torch.testing.assert_close(run(triton, [student, teacher, *valid], [0], **settings), expected)


@pytest.mark.parametrize("loss", [plain, triton])
def test_margin_form_ignores_the_normaliser(loss):
    tensors = low(INSTANCES[0], "cosine")
    losses = [
        loss(*tensors, form="l2_margin", margin=1.0, normaliser=normaliser)
        for normaliser in ("batch", "clip")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("loss", [plain, triton])
def test_normalisers_differ_when_clips_have_unequal_numbers_of_valid_slots(loss):
    student, teacher, student_valid, teacher_valid = low(INSTANCES[0], "cosine")
    student_valid[0, :, 1:] = False
    tensors = [student, teacher, student_valid, teacher_valid]
    settings = {"form": "cosine", "margin": 0.5}
    by_batch, by_clip = (loss(*tensors, normaliser=n, **settings) for n in ("batch", "clip"))
    assert difference(by_batch, by_clip) > 0.01
    # Means over clips are clips' own losses, averaged.
    alone = [loss(*(t[[b]] for t in tensors), normaliser="batch", **settings) for b in range(2)]
    torch.testing.assert_close(by_clip, torch.stack(alone).mean())


@pytest.mark.parametrize("dtype", [torch.float64, *TRITON_DTYPES])
@pytest.mark.parametrize(("form", "normaliser"), FORMS)
@pytest.mark.parametrize("loss", [plain, triton, reference.instance_consistency])
def test_no_valid_instance_gives_exactly_zero(loss, form, normaliser, dtype):
    if loss is triton and dtype == torch.float64:
        return
    student, teacher, student_valid, teacher_valid = low(INSTANCES[0], form, dtype)
    tensors = [student, teacher, torch.zeros_like(student_valid), teacher_valid]
    settings = {"form": form, "margin": 0.5, "normaliser": normaliser}
    (value,), (gradient,) = run(loss, tensors, [0], **settings)
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("loss", [plain, triton, reference.instance_consistency])
def test_equal_embeddings_have_no_gradient_at_distance_zero(loss):
    student = unit(1, 2, 2, 2, 6).float()
    student = student[:, :1].expand(-1, 2, -1, -1, -1).contiguous()
    valid = torch.ones(1, 2, 2, 2, dtype=torch.bool)
    tensors = [student, student.clone(), valid, valid]
    settings = {"form": "l2_margin", "margin": 1e-3}
    (value,), (gradient,) = run(loss, tensors, [0], **settings)
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_small_distances_keep_their_precision(impl):
    student = unit(1, 2, 1, 1, 32)
    student[:, 1] = student[:, 0]
    teacher = student + 1e-5 * unit(1, 2, 1, 1, 32, seed=1)
    valid = torch.ones(1, 2, 1, 1, dtype=torch.bool)
    tensors = [student, teacher, valid, valid]
    settings = {"form": "l2_margin", "margin": 0.5, "impl": impl}
    compare(OP, tensors, [0], torch.float32, **settings)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_embeddings_of_any_length(dtype):
    """From lengths near the largest of float16 to near its smallest."""
    student, teacher, *valid = instance_inputs(INSTANCES[0], "l2_margin")
    scale = torch.tensor([3e4, 1.0, 1e-3, 1e-7]).double()[:, None, None, None]
    settings = {"form": "l2_margin", "margin": 1.0}
    inputs = [student * scale, teacher * scale.flip(0), *valid]
    compare(OP, inputs, [0], dtype, impl="triton", **settings)


@pytest.mark.parametrize("form", ["cosine", "l2_margin"])
@pytest.mark.parametrize("loss", [plain, triton])
def test_teacher_gets_no_gradient(loss, form):
    student, teacher, *valid = low(INSTANCES[0], form)
    teacher.requires_grad_()
    value = loss(student.requires_grad_(), teacher, *valid, form=form, margin=0.5)
    assert torch.autograd.grad(value, teacher, allow_unused=True) == (None,)


@pytest.mark.parametrize("loss", [plain, triton])
def test_margin_form_matches_by_cosine_not_by_length(loss):
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[None, None, None]
    # By distance slot 0 would take the short vector, by cosine it takes the long one.
    teacher = torch.tensor([[9.0, 0.0], [0.3, 0.4]])[None, None, None]
    student, teacher = (t.expand(1, 2, 1, 2, 2).contiguous() for t in (student, teacher))
    valid = torch.ones(1, 2, 1, 2, dtype=torch.bool)
    value = loss(student, teacher, valid, valid, form="l2_margin", margin=0.0)
    expected = 2 * (8.0 + (0.3**2 + 0.6**2) ** 0.5)
    assert float(value) == pytest.approx(expected)


@pytest.mark.parametrize("form", ["cosine", "l2_margin"])
@pytest.mark.parametrize("loss", [plain, triton])
def test_equal_similarities_match_the_first(loss, form):
    """All similarities alike: slot p's partner is p, and only its validity counts."""
    student = unit(1, 2, 1, 1, 8).float().expand(1, 2, 1, 4, 8)
    teacher = unit(1, 2, 1, 1, 8, seed=1).float().expand(1, 2, 1, 4, 8)
    partner_valid = torch.tensor([True, False, False, False]).expand(1, 2, 1, 4)
    for slot, expected in enumerate(partner_valid[0, 0, 0].tolist()):
        valid = torch.zeros(1, 2, 1, 4, dtype=torch.bool)
        valid[0, 0, 0, slot] = True
        # The margin lets no negative count.
        limit = 2.0 if form == "cosine" else 0.0
        value = loss(student, teacher, valid, partner_valid, form=form, margin=limit)
        assert bool(value != 0) == expected


@pytest.mark.parametrize("loss", [plain, triton])
@pytest.mark.parametrize("form", ["cosine", "l2_margin"])
def test_a_valid_embedding_that_is_not_a_number_shows(loss, form):
    student, teacher, _, _ = low(INSTANCES[0], form)
    valid = torch.ones(student.shape[:-1], dtype=torch.bool)
    student[0, 0, 0, 0, 0] = torch.nan
    assert loss(student, teacher, valid, valid, form=form, margin=0.5).isnan()
    # As a negative alone: the partner of the one that is not a number is not valid.
    student, teacher = (
        tensor[:1, :2, :1, :2].clone() for tensor in (student.nan_to_num(), teacher)
    )
    teacher[..., 0, :] = torch.nan
    valid = torch.tensor([False, True]).expand(1, 2, 1, 2)
    assert loss(student, teacher, valid, valid, form=form, margin=0.5).isnan()


@pytest.mark.parametrize("module", [eager, reference])
@pytest.mark.parametrize(("form", "normaliser"), FORMS)
def test_gradcheck(module, form, normaliser):
    student, *rest = instance_inputs((2, 2, 2, 3, 4))
    limit = 0.3 if form == "cosine" else 1.2
    assert torch.autograd.gradcheck(
        lambda x: module.instance_consistency(
            x, *rest, form=form, margin=limit, normaliser=normaliser
        ),
        [student.requires_grad_()],
    )


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_active_negatives_are_counted(impl):
    student, teacher, valid, _ = low(INSTANCES[0], "cosine")
    active = total = 0
    for b, t, j, n in torch.cartesian_prod(*map(torch.arange, (2, 4, 4, 3))).tolist():
        if t == j:
            continue
        matching = reference.assignment(-student[b, t, n] @ teacher[b, j, n].T).tolist()
        for p in range(4):
            for q in range(4):
                if valid[b, t, n, p] and q != matching[p]:
                    total += 1
                    active += int((student[b, t, n, p] - teacher[b, j, n, q]).norm() < 1.3)
    assert 0 < active < total
    share = kernels.active_negatives(
        student.requires_grad_(), teacher, valid, margin=1.3, impl=impl
    )
    assert float(share) == pytest.approx(active / total)
    assert not share.requires_grad


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("case", [*INSTANCES, *TILED[1:3]], ids=str)
def test_active_negatives_of_the_kernel(case, dtype):
    student, teacher, valid, _ = low(case, "l2_margin", dtype)
    expected = kernels.active_negatives(
        student.double(), teacher.double(), valid, margin=2.0, impl="eager"
    )
    with poisoned_memory(), only_kernels() as launches:
        share = kernels.active_negatives(student, teacher, valid, margin=2.0, impl="triton")
    assert launches
    assert share.dtype == torch.float32
    torch.testing.assert_close(share.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("case", [INSTANCES[2], INSTANCES[3]], ids=["one slot", "one frame"])
def test_no_negatives_are_no_active_ones(case, impl):
    student, teacher, valid, _ = low(case, "cosine", share=1)
    assert kernels.active_negatives(student, teacher, valid, margin=9.0, impl=impl) == 0


@pytest.mark.parametrize(("form", "normaliser"), FORMS)
def test_views_are_read_where_they_lie(form, normaliser):
    tensors = low((2, 3, 3, 4, 24), form)
    settings = {"form": form, "margin": margin(form), "normaliser": normaliser}
    student, teacher, student_valid, teacher_valid = tensors
    views = [
        student.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([teacher, teacher], -1)[..., 0],
        student_valid.transpose(0, 3).contiguous().transpose(0, 3),
        teacher_valid.transpose(1, 2).contiguous().transpose(1, 2),
    ]
    assert not any(view.is_contiguous() for view in views)

    def both(inputs):
        leaf = inputs[0].detach().requires_grad_()
        value = triton(leaf, *inputs[1:], **settings)
        return value.detach(), *torch.autograd.grad(value, leaf)

    value, gradient = both(views)
    torch.testing.assert_close((value, gradient), both(tensors), rtol=0, atol=0)
    assert kernels.active_negatives(
        *views[:3], margin=2.0, impl="triton"
    ) == kernels.active_negatives(*tensors[:3], margin=2.0, impl="triton")


@pytest.mark.parametrize("form", ["cosine", "l2_margin"])
def test_an_expanded_student_gets_its_summed_gradient(form):
    student, teacher, student_valid, teacher_valid = low((2, 3, 2, 3, 8), form)

    def shared(loss):
        return run(
            lambda x: loss(
                x.expand(2, -1, -1, -1, -1),
                teacher[:1].expand(2, -1, -1, -1, -1),
                student_valid,
                teacher_valid,
                form=form,
                margin=margin(form),
            ),
            [student[:1]],
            [0],
        )

    torch.testing.assert_close(shared(triton), shared(plain))


@pytest.mark.parametrize(("form", "normaliser"), FORMS)
@pytest.mark.parametrize("clips", [0, 1])
def test_small_batches(clips, form, normaliser):
    tensors = [t[:clips] for t in low((1, 3, 2, 4, 8), form)]
    with poisoned_memory():
        value, coefficients = fused._forward(*tensors, form, 0.3, normaliser, True)
        own = tensors[0] if form == "l2_margin" else None
        gradient = fused._backward(torch.ones(()), coefficients, own, tensors[1], torch.float32)
        share = fused._nearer(*tensors[:3], 1.0)
    assert gradient.shape == tensors[0].shape
    if clips == 0:
        assert value == 0
        assert share == 0
        return
    settings = {"form": form, "margin": 0.3, "normaliser": normaliser}
    leaf = tensors[0].requires_grad_()
    expected = plain(*tensors, **settings)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected, leaf))


@pytest.mark.parametrize("form", ["cosine", "l2_margin"])
def test_a_loss_scale_comes_before_the_gradient_is_rounded(form):
    """Gradients below float16's smallest number, which mixed precision scales by 2¹⁶."""
    student, teacher, *_ = low((2, 4, 3, 4, 24), form, torch.float16)
    valid = torch.ones(student.shape[:-1], dtype=torch.bool)

    def gradient(loss, inputs):
        leaf = inputs[0].detach().requires_grad_()
        value = 1e-5 * loss(leaf, *inputs[1:], valid, valid, form=form, margin=0.3)
        return torch.autograd.grad(2**16 * value, leaf)[0]

    expected = gradient(reference.instance_consistency, [student.double(), teacher.double()])
    assert difference(gradient(triton, [student, teacher]), expected) < 2e-3


def test_two_runs_are_equal_to_the_bit():
    tensors = low((1, 5, 1, 4, 40), "cosine", torch.bfloat16)
    for form, normaliser in FORMS:
        settings = {"form": form, "margin": margin(form), "normaliser": normaliser}
        first, second = (run(triton, tensors, [0], **settings) for _ in range(2))
        assert torch.equal(first[0][0], second[0][0])
        assert torch.equal(first[1][0], second[1][0])


@pytest.mark.parametrize("form", ["cosine", "l2_margin"])
@pytest.mark.parametrize("axis", [0, 1])
def test_offsets_past_two_to_the_31st(form, axis):
    """Clips, or frames, so far apart that 32-bit offsets would wrap; only the pages that are
    touched exist.
    """
    tensors = low((2, 3, 1, 2, 8), form, torch.float16)
    step = 2**31 if axis == 0 else 2**30 + 64
    far = []
    for tensor in tensors[:2]:
        strides = list(tensor.stride())
        strides[axis] = step
        if axis:
            strides[0] = 64
        storage = torch.empty(step * (tensor.shape[axis] - 1) + 256, dtype=torch.float16)
        far.append(storage.as_strided(tensor.shape, strides).copy_(tensor))
    settings = {"form": form, "margin": margin(form)}

    def both(inputs):
        leaf = inputs[0].detach().requires_grad_()
        value = triton(leaf, *inputs[1:], *tensors[2:], **settings)
        return value.detach(), *torch.autograd.grad(value, leaf)

    torch.testing.assert_close(both(far), both(tensors[:2]), rtol=0, atol=0)


def test_the_next_call_after_an_error_works():
    tensors = low(INSTANCES[0], "cosine")
    settings = {"form": "cosine", "margin": 0.3}
    expected = triton(*tensors, **settings)
    with pytest.raises(ValueError, match="student_valid"):
        triton(*tensors[:2], tensors[2].float(), tensors[3], **settings)
    assert torch.equal(triton(*tensors, **settings), expected)


@pytest.mark.parametrize("form", ["cosine", "l2_margin"])
def test_backward_keeps_inputs_and_coefficients_only(form):
    student, teacher, *valid = low((2, 3, 2, 4, 24), form)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append((tensor.data_ptr(), tensor.shape)), lambda tensor: tensor
    )
    with hooks:
        triton(student.requires_grad_(), teacher, *valid, form=form, margin=0.3)
    inputs = {teacher.data_ptr(), *([student.data_ptr()] if form == "l2_margin" else [])}
    made = [shape for address, shape in kept if address not in inputs]
    assert made == [(2, 2, 12, 12)]
    assert len(kept) == 1 + len(inputs)


def test_without_a_gradient_no_coefficients_are_made():
    tensors = low(INSTANCES[0], "cosine")
    for wanted in (False, True):
        _, coefficients = fused._forward(*tensors, "cosine", 0.3, "clip", wanted)
        assert coefficients.numel() == (2 * 3 * 16 * 16 if wanted else 0)
    with torch.no_grad(), launching.watch() as launches:
        student = tensors[0].requires_grad_()
        assert torch.equal(
            triton(student, *tensors[1:], form="cosine", margin=0.3),
            triton(student.detach(), *tensors[1:], form="cosine", margin=0.3),
        )
    assert [launch.arguments[6] for launch in launches] == [None, None]


@pytest.mark.parametrize(("form", "normaliser"), FORMS)
def test_a_step_starts_few_kernels_and_copies_nothing_to_the_host(form, normaliser):
    """Tensors without values: a step that looked at one would fail."""
    student, teacher, *valid = (t.to("meta") for t in low(INSTANCES[0], form))
    names = []

    class Called(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.name())
            return function(*args, **(kwargs or {}))

    with launching.recording("sm_90") as launches, Called():
        _, coefficients = fused._forward(student, teacher, *valid, form, 0.3, normaliser, True)
        own = student if form == "l2_margin" else None
        fused._backward(teacher.new_empty(()), coefficients, own, teacher, student.dtype)
    assert [launch.name for launch in launches] == ["_match", "_student_gradient"]
    work = [name for name in names if "empty" not in name]
    assert work == ["aten::sum"] * (2 if (form, normaliser) == ("cosine", "batch") else 1)


@pytest.mark.parametrize(("form", "normaliser"), FORMS)
def test_opcheck(form, normaliser):
    tensors = low((1, 2, 1, 3, 5), form)
    tensors[0].requires_grad_()
    torch.library.opcheck(
        torch.ops.smtc.instance_consistency.default, (*tensors, form, 0.3, normaliser, True)
    )
    inputs = [t.detach() for t in tensors]
    coefficients = torch.randn(1, 1, 6, 6, generator=generator())
    own = inputs[0] if form == "l2_margin" else None
    torch.library.opcheck(
        torch.ops.smtc.instance_consistency_backward.default,
        (torch.ones(()), coefficients, own, inputs[1], torch.float32),
    )
    torch.library.opcheck(torch.ops.smtc.active_negatives.default, (*inputs[:3], 1.0))


@pytest.mark.parametrize(("form", "normaliser"), FORMS)
def test_the_forms_without_triton_agree(form, normaliser):
    tensors = low(INSTANCES[0], form)
    arguments = (*tensors, form, margin(form), normaliser, True)
    with launching.watch() as seen:
        expected = fused._plain(*arguments)
        own = tensors[0] if form == "l2_margin" else None
        backward = (torch.tensor(1.5), expected[1], own, tensors[1], torch.float32)
        expected_gradient = fused._plain_backward(*backward)
        expected_share = fused._plain_nearer(*tensors[:3], 2.0)
    assert not seen
    torch.testing.assert_close(fused._forward(*arguments), expected)
    torch.testing.assert_close(fused._backward(*backward), expected_gradient)
    torch.testing.assert_close(fused._nearer(*tensors[:3], 2.0), expected_share)
