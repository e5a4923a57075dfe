"""Public weights by name: downloaded from their publisher once, checked, and kept in a cache.

The file is `$XDG_CACHE_HOME/smtc/weights/<its publisher's name for it>` (by default under
`~/.cache`), and may be put there by hand. It gets this name when it is whole and checked; until
then it is `….partial`, which a later call goes on with where the server allows that.
"""

import fcntl
import hashlib
import http.client
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import NoReturn
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch

from smtc.backbones import HEADS, build_encoder
from smtc.config import BackboneConfig
from smtc.errors import UserError
from smtc.progress import bar
from smtc.public_weights import PublicWeights, published, weights_folder
from smtc.training.distributed import once_a_machine
from smtc.weight_files import read_source

logger = logging.getLogger("smtc")

_TIMEOUT = 30.0  # seconds without an answer or a byte
_CHUNK = 2**20
_MAGIC = (b"PK", b"\x80")  # how a file of torch.save begins: an archive or a pickle


def resolve_weights(weights: str | Path, backbone: BackboneConfig) -> Path:
    """The file that `weights` means for the encoder `backbone`: of a name ("dino", "moco"; see
    `smtc.public_weights`) the downloaded one, else the path as it is.

    A name's file is checked at each call: against the MD5 that its publisher states, else by the
    names and shapes of its tensors, where a wrong number inside a tensor does not show; the log
    says which. A damaged file is downloaded again. Under torchrun the first process of a machine
    downloads and the others wait, so all have to call.

    Errors: `UserError` where the name does not suit the encoder, or where the file is not there and
    cannot be downloaded: it says what to fetch and where to put it. A path is not looked at.
    """
    known = published(weights, backbone.architecture, backbone.patch)
    if known is None:
        return Path(weights)
    return Path(once_a_machine(lambda: str(_fetch(known))))


def _fetch(known: PublicWeights) -> Path:
    """The checked file of `known`, from the cache or from its publisher."""
    target = weights_folder() / known.file_name
    with _disk(known, target):
        if not target.exists() or _fault(target, known) is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _sole_partial(target) as (file, partial):
                _complete(known, file, partial, target)
    how = (
        "by the names and shapes of its tensors (its publisher states no checksum)"
        if known.md5 is None
        else f"by the first {len(known.md5)} digits of its MD5, which its publisher states"
    )
    logger.info("The weights %s are %s, checked %s.", known.name, target, how)
    return target


def _complete(known: PublicWeights, file: FileIO, partial: Path, target: Path) -> None:
    """Download `target` by way of `partial`, unless another process has done so meanwhile."""
    if target.exists():
        fault = _fault(target, known)
        if fault is None:
            return
        logger.warning("%s is damaged (%s) and is downloaded again.", target, fault)
    try:
        # A process that was killed between download and renaming left all of it; only a checksum
        # can tell.
        if known.md5 is None or _fault(partial, known) is not None:
            _download(known, file, target)
    except (HTTPError, _BrokenOffError) as error:
        raise UserError(
            f"The weights {known.name} could not be downloaded ({_reason(error)}); fetch "
            f"{known.address} by other means and save it as {target}."
        ) from error
    fault = _fault(partial, known)
    if fault is not None:
        file.truncate(0)
        _refuse(known, target, fault)
    os.replace(partial, target)


def _download(known: PublicWeights, file: FileIO, target: Path) -> None:
    """Append to `file` what is missing of it, or all of it where the server gives no parts."""
    have = os.fstat(file.fileno()).st_size
    try:
        response = _ask(known.address, have)
    except HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not have:
            raise
        file.truncate(0)  # it is longer than what the server has
        _download(known, file, target)
        return
    with response:
        if not _goes_on(response, have):
            have = 0
            file.truncate(0)
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else None
        with bar(total=total, title=known.file_name, unit="B", initial=have) as shown:
            while chunk := _read(response):
                if not have and not chunk.startswith(_MAGIC):
                    kind = response.headers.get_content_type()
                    _refuse(known, target, f"it is no checkpoint but {kind}")
                _append(file, chunk)
                have += len(chunk)
                shown.update(len(chunk))
    if have < (total or 1):
        raise _BrokenOffError(
            f"the connection ended after {have:,} of {total:,} bytes, with which the same command "
            "goes on"
            if total
            else "the server sends an empty file"
        )
    os.fsync(file.fileno())


class _BrokenOffError(Exception):
    """The connection or the server failed after it had answered."""


def _ask(address: str, have: int) -> http.client.HTTPResponse:
    """The server's answer, of which the first `have` bytes need not come. Errors: `HTTPError` where
    it refuses, `_BrokenOffError` where there is none.
    """
    headers = {"User-Agent": "smtc"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        answer: http.client.HTTPResponse = urlopen(
            Request(address, headers=headers), timeout=_TIMEOUT
        )
    except HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenOffError(_reason(error)) from error
    return answer


def _goes_on(response: http.client.HTTPResponse, have: int) -> bool:
    """Whether what comes is the part after the first `have` bytes, and not the whole file."""
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
        return False
    if not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        raise _BrokenOffError("the server sends another part than was asked for")
    return True


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenOffError(_reason(error)) from error


def _append(file: FileIO, chunk: bytes) -> None:
    rest = memoryview(chunk)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        file.truncate(0)  # a full disk gets its space back
        raise


def _fault(path: Path, known: PublicWeights) -> str | None:
    """Why a file is not the one that `known` describes; None where it is."""
    if known.md5 is not None:
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, lambda: hashlib.md5(usedforsecurity=False))
        found = digest.hexdigest()[: len(known.md5)]
        return None if found == known.md5 else f"its MD5 begins with {found}, not {known.md5}"
    try:
        tensors = read_source(path).tensors
    except UserError:
        return "it cannot be read as a checkpoint"
    backbone = BackboneConfig(architecture=known.architecture, patch=known.patch)  # type: ignore[arg-type]
    with torch.device("meta"):
        encoder = build_encoder(backbone).state_dict()
    wanted = {f"encoder.{n}": t.shape for n, t in encoder.items() if not n.startswith(HEADS)}
    if {name: tensor.shape for name, tensor in tensors.items()} == wanted:
        return None
    return f"its tensors are not those of {known.architecture}, patch {known.patch}"


@contextmanager
def _sole_partial(target: Path) -> Iterator[tuple[FileIO, Path]]:
    """What there is of `target` so far, open for appending, and its path; no other process has it.

    Processes wait for each other, also those of several machines with one file system. Where that
    has no locks, each gets a file of its own, which does not outlive the block.
    """
    shared = target.with_name(f"{target.name}.partial")
    file, locked = _opened(shared, target)
    path = shared
    if not locked:
        file.close()
        path = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
        file = FileIO(path, "a")
    with file:
        try:
            yield file, path
        finally:
            # Still locked: whoever waits finds that the path is gone and opens it anew.
            if not locked or not os.fstat(file.fileno()).st_size:
                path.unlink(missing_ok=True)


def _opened(path: Path, target: Path) -> tuple[FileIO, bool]:
    """The file at `path`, and whether it is locked (else the file system has no locks)."""
    while True:
        file = FileIO(path, "a")
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("Waiting for another process, which downloads %s.", target.name)
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            return file, False
        with suppress(FileNotFoundError):  # renamed or removed by who had it before
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file, True
        file.close()


@contextmanager
def _disk(known: PublicWeights, target: Path) -> Iterator[None]:
    """Inside the block, a cache that cannot be written is a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"The weights {known.name} cannot be kept in {target.parent} ({error.strerror}); free "
            f"some space, set XDG_CACHE_HOME to another folder, or fetch {known.address} and give "
            "the path of the file."
        ) from error


def _refuse(known: PublicWeights, target: Path, fault: str) -> NoReturn:
    raise UserError(
        f"What {known.address} sends is not the weights {known.name} ({fault}); try again later, "
        f"or save the right file as {target}."
    )


def _reason(error: BaseException) -> str:
    """Why a download failed, for people."""
    if isinstance(error, HTTPError):
        return f"the server answers {error.code} {error.reason}"
    if isinstance(error, URLError) and isinstance(error.reason, BaseException):
        error = error.reason
    if isinstance(error, TimeoutError):
        return f"no answer within {_TIMEOUT:g} s"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
