"""What was scored before an evaluation was stopped, a small file a method, seed and sequence."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import smtc
from smtc import kernels, pipelines
from smtc.errors import UserError

Record = dict[str, Any]

_LOG = logging.getLogger("smtc")


class KeptScores:
    """Records beside the folder `output`, in `.<its name>.smtc-scored`, each under a key.

    A record appears whole or not at all, so that a process may be killed at any time. Several
    processes may write at once, each key once. As a context manager it removes what `begin` began
    when the block ends well or with a user's mistake; after anything else it stays.
    """

    def __init__(self, output: str | Path) -> None:
        target = Path(os.path.realpath(output))
        self._output = output
        self.folder = target.with_name(f".{target.name}.smtc-scored")
        self._begun = False

    def __enter__(self) -> "KeptScores":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._begun and (kind is None or issubclass(kind, UserError)):
            shutil.rmtree(self.folder, ignore_errors=True)

    def begin(self, keys: Collection[str]) -> dict[str, Record]:
        """Those of the records `keys` that are there; all others, of other settings, are removed.

        Errors: `UserError` where the folder cannot be written.
        """
        wanted = {f"{key}.json": key for key in keys}
        found = {}
        self._begun = True
        with self.writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            others = list(self.folder.iterdir())
            for path in list(others):
                record = _read(path) if path.name in wanted else None
                if record is not None:
                    found[wanted[path.name]] = record
                    others.remove(path)
            for path in others:
                path.unlink()
        if found:
            _LOG.info("Going on: %d of %d were scored before.", len(found), len(wanted))
        if others:
            _LOG.info("%d were scored with other settings, files or code: not used.", len(others))
        return found

    def write(self, key: str, record: Record) -> None:
        """Keep a record that strict JSON can hold. Errors: `UserError` as `begin`."""
        path = self.folder / f"{key}.json"
        partial = path.with_suffix(".partial")
        with self.writing():
            partial.write_text(json.dumps(record, allow_nan=False), encoding="utf-8")
            partial.replace(path)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside the block, an output that cannot be written is a `UserError`."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._output} cannot be written ({error.strerror or error}); free some space or "
                "choose another output folder."
            ) from error


def _read(path: Path) -> Record | None:
    with suppress(OSError, ValueError):
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if isinstance(record, dict) else None
    return None


def key_of(deciding: Mapping[str, Any]) -> str:
    """A name for what decides a record: 32 hexadecimal digits of the SHA-256 of its JSON."""
    text = json.dumps(deciding, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def stamps(root: Path, files: Iterable[Path]) -> list[list[Any]]:
    """Name under `root`, size and time of change of each file, which is quicker than its content.

    Errors: `UserError` for a file that is not there.
    """
    found = []
    for path in files:
        try:
            state = path.stat()
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}); complete the copy."
            ) from error
        name = Path(os.path.relpath(path, root)).as_posix()
        found.append([name, state.st_size, state.st_mtime_ns])
    return found


def code_hash() -> str:
    """SHA-256 over the source files of the packages that scores come from."""
    whole = hashlib.sha256()
    for package in (smtc, kernels, pipelines):
        folder = Path(str(package.__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            whole.update(f"{path.relative_to(folder).as_posix()} ".encode())
            whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()
