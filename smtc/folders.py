"""Output folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from smtc.errors import UserError


@contextmanager
def whole_folder(target: str | Path, holds: Collection[str]) -> Iterator[Path]:
    """A new folder beside `target` to write into, which takes its place when the block ends well.

    `holds` names all that such a folder may contain: an earlier one is replaced, a folder with
    anything else is refused before the block runs. Raises `UserError` when `target` is refused or
    cannot be written.
    """
    target = Path(target).absolute()
    _refuse_others(target, holds)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        _replace(target, partial)
    except OSError as error:
        raise UserError(
            f"{target} cannot be written ({error.strerror or error}); choose another output folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _refuse_others(target: Path, holds: Collection[str]) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; choose another output folder.")
    strangers = sorted(set(os.listdir(target)) - set(holds)) if target.exists() else []
    if strangers:
        raise UserError(f"{target} already holds {strangers[0]!r}; choose another output folder.")


def _replace(target: Path, partial: Path) -> None:
    """Rename `partial` to `target`; what was there is back in its place if that fails."""
    if not target.exists():
        partial.rename(target)
        return
    former = partial.with_name(partial.name + "-former")
    target.rename(former)
    try:
        partial.rename(target)
    except OSError:
        former.rename(target)
        raise
    shutil.rmtree(former)
