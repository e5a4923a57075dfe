"""Output folders that appear whole or not at all."""

import fcntl
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from smtc.errors import UserError

MARKER = ".smtc"
"""A file in every folder that a later run may replace; its one line says what wrote the folder."""


@contextmanager
def whole_folder(
    target: str | Path,
    holds: Collection[str],
    *,
    writer: str | None = None,
    goes_on: Callable[[Path], bool] | None = None,
) -> Iterator[Path]:
    """A new folder beside `target` to write into, which takes its place when the block ends well.

    With a `writer` ("smtc segment") the folder gets a marker, which lets a later call replace it.
    A folder that is neither empty nor marked is refused before the block runs, and so is a marked
    one with anything but the marker and the names that it `holds`. A link is followed: it stays,
    and its target is replaced.

    A second run that would write to the same folder meanwhile is refused. What a killed run left
    is removed; with `goes_on`, what a killed or interrupted run left is shown to it first, and if
    it says so, this run goes on in that folder. Raises `UserError` when `target` is refused or
    cannot be written.
    """
    target = Path(os.path.realpath(target))
    if not target.name:
        raise UserError(f"{target} is the root of the file system; choose another output folder.")
    partial = target.with_name(f".{target.name}.smtc-partial")
    former = target.with_name(f".{target.name}.smtc-former")
    kept = False
    with _written(target), _alone(target):
        if former.exists() and not target.exists():  # killed between two renames
            former.rename(target)
        _refuse_others(target, holds)
        try:
            if goes_on is None or not partial.is_dir() or not goes_on(partial):
                shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(former, ignore_errors=True)
            partial.mkdir(exist_ok=True)
            if writer is not None:
                line = f"Written by {writer}, whose next run may replace this folder.\n"
                (partial / MARKER).write_text(line, encoding="utf-8")
            yield partial
            _replace(target, partial, former)
        except KeyboardInterrupt:
            kept = goes_on is not None
            raise
        finally:
            if not kept:
                shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _written(target: Path) -> Iterator[None]:
    """Inside the block, what the operating system refuses is a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{target} cannot be written ({error.strerror or error}); free some space or choose "
            "another output folder."
        ) from error


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Inside the block no other call of this writes to `target`; `UserError` where one does."""
    path = target.with_name(f".{target.name}.smtc-lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path, target):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path, target: Path) -> IO[str]:
    while True:
        file = path.open("a", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(
                f"{target} is being written by another command; wait for its end, or choose "
                "another output folder."
            ) from None
        except OSError:  # a file system without locks
            return file
        # Whoever had it may have removed the file in between.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def _refuse_others(target: Path, holds: Collection[str]) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file; choose another output folder.")
    present = set(os.listdir(target))
    # A name that we use too, such as masks, does not make a folder ours.
    strangers = sorted(present - {MARKER, *holds} if MARKER in present else present)
    if strangers:
        raise UserError(f"{target} already holds {strangers[0]!r}; choose another output folder.")


def _replace(target: Path, partial: Path, former: Path) -> None:
    """Rename `partial` to `target`; what was there is back in its place if that fails."""
    if not target.exists():
        partial.rename(target)
        return
    target.rename(former)
    try:
        partial.rename(target)
    except OSError:
        former.rename(target)
        raise
    shutil.rmtree(former)
