"""The momentum teacher."""

import pytest
import torch
from torch import Tensor, nn

from smtc.config import TeacherConfig
from smtc.teacher import Teacher


class Student(nn.Module):
    """An encoder with batch statistics and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return scale * self.head(self.encoder(x))


def pair(**settings: object) -> tuple[Student, Teacher]:
    """A student and a teacher whose student has moved on."""
    torch.manual_seed(0)
    student = Student()
    teacher = Teacher(student, TeacherConfig(**settings))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))
    return student, teacher


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def test_it_starts_as_a_copy_of_its_own() -> None:
    student = Student()
    teacher = Teacher(student, TeacherConfig())
    for name, value in teacher.model.state_dict().items():
        assert torch.equal(value, student.state_dict()[name])
        assert value.data_ptr() != student.state_dict()[name].data_ptr()
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("momentum", [0.999, 0.9, 0.0, 1.0])
def test_the_momentum_formula(momentum: float) -> None:
    student, teacher = pair(momentum=momentum, scope="all")
    before, fixed = copied(teacher.model), copied(student)
    teacher.follow(student)
    for name, parameter in teacher.model.named_parameters():
        expected = momentum * before[name].double() + (1 - momentum) * fixed[name].double()
        torch.testing.assert_close(parameter.double(), expected, rtol=1e-5, atol=1e-6)
    for name, value in student.state_dict().items():
        assert torch.equal(value, fixed[name]), name


def test_two_steps_follow_twice() -> None:
    student, teacher = pair(momentum=0.5)
    before = teacher.model.head[0].weight.clone()
    teacher.follow(student)
    teacher.follow(student)
    expected = 0.25 * before + 0.75 * student.head[0].weight
    torch.testing.assert_close(teacher.model.head[0].weight, expected)


def test_scope_head_leaves_the_encoders_parameters() -> None:
    student, teacher = pair(momentum=0.5, scope="head")
    before = copied(teacher.model)
    teacher.follow(student)
    for name, parameter in teacher.model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("encoder."), name


def test_batch_statistics_are_copied() -> None:
    student, teacher = pair(scope="all")
    student(torch.randn(32, 4) + 3)
    teacher.follow(student)
    for own, other in zip(teacher.model.buffers(), student.buffers(), strict=True):
        assert torch.equal(own, other)


def test_scope_head_leaves_the_encoders_batch_statistics() -> None:
    student, teacher = pair(scope="head")
    before = copied(teacher.model)
    student(torch.randn(32, 4) + 3)
    teacher.follow(student)
    for name, value in teacher.model.named_buffers():
        assert torch.equal(value, before[name]) == name.startswith("encoder."), name


def test_it_stays_in_evaluation_mode() -> None:
    student, teacher = pair()
    whole = nn.ModuleDict({"student": student, "teacher": teacher})
    whole.train()
    assert student.encoder.training
    assert not any(module.training for module in teacher.model.modules())
    x = torch.randn(8, 4)
    assert torch.equal(teacher(x), teacher(x))


def test_no_gradient_and_all_arguments_pass() -> None:
    _, teacher = pair()
    x = torch.randn(8, 4, requires_grad=True)
    out = teacher(x, scale=2.0)
    assert not out.requires_grad
    torch.testing.assert_close(out, 2 * teacher(x))
