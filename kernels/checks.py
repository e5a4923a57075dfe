"""Argument checks: a `ValueError` names the argument, what was expected and what came."""

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Arguments:
    """The arguments of one call, checked in turn; a letter stands for one size in all shapes."""

    def __init__(self, op: str) -> None:
        self.op = op
        self.sizes: dict[str, int] = {}
        self._device: torch.device | None = None

    def tensor(
        self, name: str, value: Tensor, shape: str, dtypes: Sequence[torch.dtype] = FLOATS
    ) -> None:
        """Check `value` against `shape`, spaced letters such as "B L D", or "... P P"."""
        if not isinstance(value, Tensor):
            self.fail(name, f"a tensor [{shape.replace(' ', ', ')}]", type(value).__name__)
        letters, sizes = shape.split(), list(value.shape)
        if letters[0] == "...":
            leading = range(len(sizes) - len(letters) + 1)
            letters = [*(f"batch{axis}" for axis in leading), *letters[1:]]
        expected = f"shape {self._described(letters)} with no size 0 but the batch"
        if len(sizes) != len(letters):
            self.fail(name, expected, sizes)
        for letter, size in zip(letters, sizes, strict=True):
            if size < 1 and letter[0] not in "Bb":
                self.fail(name, expected, sizes)
            if self.sizes.setdefault(letter, size) != size:
                self.fail(name, expected, sizes)
        if value.dtype not in dtypes:
            self.fail(name, f"dtype {' or '.join(_short(d) for d in dtypes)}", _short(value.dtype))
        if self._device is None:
            self._device = value.device
        if value.device != self._device:
            self.fail(name, f"device {self._device}, where the first tensor is", value.device)

    def at_most(self, name: str, letter: str, limit: int) -> None:
        """Check the size that `letter` stands for, an axis of tensor `name`."""
        if self.sizes[letter] > limit:
            self.fail(name, f"{letter} of at most {limit}", self.sizes[letter])

    def number(self, name: str, value: float, *, above: float = -math.inf) -> None:
        """Check that `value` is finite and greater than `above`."""
        if not above < value < math.inf:  # which NaN fails
            self.fail(
                name, "a finite number" + (f" > {above:g}" if above > -math.inf else ""), value
            )

    def not_negative(self, name: str, value: float) -> None:
        """Check that `value` is finite and not below 0."""
        if not 0 <= value < math.inf:
            self.fail(name, "a finite number >= 0", value)

    def count(self, name: str, value: int) -> None:
        """Check that `value` is a whole number of at least 1."""
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.fail(name, "a whole number of at least 1", value)

    def choice(self, name: str, value: str, choices: Sequence[str]) -> None:
        """Check that `value` is one of `choices`."""
        if value not in choices:
            self.fail(name, f"one of {', '.join(choices)}", repr(value))

    def constant(self, name: str, value: Tensor) -> None:
        """Check that no gradient is asked for with respect to `value`."""
        if value.requires_grad:
            self.fail(
                name,
                "a tensor without requires_grad (not differentiable: pass .detach())",
                "one with",
            )

    def fail(self, name: str, expected: object, got: object) -> NoReturn:
        """Raise the error."""
        raise ValueError(f"{self.op}: {name}: expected {expected}, got {got}")

    def _described(self, letters: list[str]) -> str:
        """The shape with the sizes that tensors before this one have fixed."""
        known = (
            f"{letter}={self.sizes[letter]}" if letter in self.sizes else letter
            for letter in letters
        )
        return f"[{', '.join(known)}]"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
