"""Public weights by name, from a server of this process: the ways in which a download fails."""

import dataclasses
import hashlib
import http.server
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command, train_flags

from smtc import downloads, public_weights
from smtc.backbones import HEADS, build_encoder
from smtc.config import BackboneConfig, Config, from_dict
from smtc.downloads import resolve_weights
from smtc.errors import UserError
from smtc.public_weights import PUBLISHED
from smtc.training.run_folder import check_run_folder, claim_run_folder
from smtc.weights import load_encoder_weights

VIT_S = BackboneConfig()
RESNET = BackboneConfig(architecture="resnet50", feature="tokens")
DINO = "dino_deitsmall16_pretrain.pth"
MOCO = "moco_v2_800ep_pretrain.pth.tar"


@dataclass
class Server:
    """What it sends and how, and what it was asked."""

    address: str
    files: dict[str, bytes]
    """By the last part of the path."""
    md5: str
    """What is stated of MoCo's file."""
    ranges: bool = True
    promised: int = 0
    """Bytes that the header promises beyond those that come."""
    pause: float = 0.0
    """Seconds before the answer."""
    halfway: float = 0.0
    """Seconds after half of it."""
    gate: threading.Event | None = None
    """What it waits for before it answers."""
    status: int = 200
    kind: str = "application/octet-stream"
    sent_part: int | None = None
    """The first byte of each part, whatever was asked for."""
    asked: list[str] = field(default_factory=list)
    """The range of each request, or an empty text."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: "_Listening"

    def do_GET(self) -> None:
        told = self.server.told
        name = self.path.rpartition("/")[2]
        if self.path.startswith("/moved/"):
            self.send_response(302)
            self.send_header("Location", f"{told.address}/{name}")
            self.end_headers()
            return
        told.asked.append(self.headers.get("Range", ""))
        time.sleep(told.pause)
        if told.gate is not None:
            told.gate.wait(60)
        if told.status != 200 or name not in told.files:
            self.send_error(told.status if told.status != 200 else 404)
            return
        body, start = told.files[name], 0
        if told.ranges and told.asked[-1]:
            start = int(told.asked[-1].removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        if start:
            shown = start if told.sent_part is None else told.sent_part
            self.send_header("Content-Range", f"bytes {shown}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start + told.promised))
        self.send_header("Content-Type", told.kind)
        self.end_headers()
        body = body[start:]
        self.wfile.write(body[: len(body) // 2])
        time.sleep(told.halfway)
        self.wfile.write(body[len(body) // 2 :])

    def log_message(self, *_: object) -> None:
        """Nothing."""


class _Listening(http.server.ThreadingHTTPServer):
    told: Server
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is part of some tests."""


@pytest.fixture(scope="module")
def bodies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Small files with the public names and shapes, by the names that the publishers gave them."""
    folder, found = tmp_path_factory.mktemp("public"), {}
    for name, backbone, prefix in ((DINO, VIT_S, ""), (MOCO, RESNET, "module.encoder_q.")):
        with torch.device("meta"):
            state = build_encoder(backbone).state_dict()
        tensors = {
            prefix + n: torch.tensor(i / 7).expand(t.shape)
            for i, (n, t) in enumerate(state.items())
            if not n.startswith(HEADS)
        }
        torch.save({"state_dict": tensors} if prefix else tensors, folder / name)
        found[name] = (folder / name).read_bytes()
    return found


@pytest.fixture
def server(
    bodies: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Server]:
    """The publishers' server, with an empty cache in `tmp_path`."""
    listening = _Listening(("127.0.0.1", 0), _Handler)
    told = listening.told = Server(
        address=f"http://127.0.0.1:{listening.server_port}",
        files=dict(bodies),
        md5=hashlib.md5(bodies[MOCO]).hexdigest()[:8],
    )
    publish(monkeypatch, told.address, told.md5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
    yield told
    listening.shutdown()
    listening.server_close()


def publish(monkeypatch: pytest.MonkeyPatch, address: str, md5: str) -> None:
    """All public weights stand at `address`, those with a checksum with `md5`."""
    moved = tuple(
        dataclasses.replace(known, address=f"{address}/{known.file_name}", md5=known.md5 and md5)
        for known in PUBLISHED
    )
    monkeypatch.setattr(public_weights, "PUBLISHED", moved)


def cached(name: str = "") -> Path:
    return public_weights.weights_folder() / name


def kept() -> dict[str, int]:
    """Sizes of all that is in the cache."""
    return {path.name: path.stat().st_size for path in cached().glob("*")}


def halved(server: Server) -> bytes:
    """Leave the first half of DINO's file in the cache as a partial one."""
    body = server.files[DINO]
    cached().mkdir(parents=True)
    cached(f"{DINO}.partial").write_bytes(body[: len(body) // 2])
    return body


def failed(server: Server, backbone: BackboneConfig = VIT_S, weights: str = "dino") -> str:
    """What `resolve_weights` refuses with, which has to name the address and the file's place."""
    with pytest.raises(UserError) as caught:
        resolve_weights(weights, backbone)
    said = str(caught.value)
    name = DINO if weights == "dino" else MOCO
    assert "\n" not in said and f"{server.address}/{name}" in said
    return said


# Names.


def test_the_published_addresses() -> None:
    """As in DINO's hubconf.py and MoCo's README; nobody has downloaded them here."""
    base = "https://dl.fbaipublicfiles.com"
    assert [(w.name, w.architecture, w.patch, w.address, w.md5) for w in PUBLISHED] == [
        ("dino", "vit_small", 16, f"{base}/dino/dino_deitsmall16_pretrain/{DINO}", None),
        (
            *("dino", "vit_small", 8),
            f"{base}/dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth",
            None,
        ),
        (
            *("moco", "resnet50", 16),
            f"{base}/moco/moco_checkpoints/moco_v2_800ep/{MOCO}",
            "a04e12f8",
        ),
    ]


@pytest.mark.parametrize("path", ["./dino", "moco.pth", "/dino", "DINO", Path("dino")])
def test_a_path_is_left_alone(path: Any) -> None:
    assert resolve_weights(path, VIT_S) == Path(path)


def test_none_is_no_file() -> None:
    assert BackboneConfig(weights="none").weights is None
    assert from_dict(BackboneConfig, {"weights": "none"}).weights is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weights": "moco"}, "moco are those of a resnet50 of patch 16, not of a vit_small"),
        ({"weights": "dino", "patch": 14}, "vit_small of patch 16 or 8, not of a vit_small of p"),
        ({"weights": "dino", "architecture": "vit_tiny"}, "not of a vit_tiny of patch 16"),
        (
            {"weights": "dino", "architecture": "resnet50", "feature": "tokens"},
            "not of a resnet50 of patch 16; change model.backbone.architecture",
        ),
    ],
)
def test_a_name_that_does_not_suit_the_encoder(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        BackboneConfig(**settings)


def test_such_a_name_on_the_command_line(
    safe: Command, synthetic_data: Path, tmp_path: Path
) -> None:
    said = safe(*train_flags(synthetic_data, tmp_path / "run", "--model.backbone.weights", "moco"))
    assert "The weights moco are those of a resnet50 of patch 16, not of a vit_tiny" in said


def test_a_name_means_the_same_in_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(weights: str) -> Config:
        model = dataclasses.replace(Config().model, backbone=BackboneConfig(weights=weights))
        return Config(model=model, output=str(tmp_path / "run"))

    monkeypatch.chdir(tmp_path)
    claim_run_folder(tmp_path / "run", config("dino"))
    monkeypatch.chdir("/")
    assert check_run_folder(config("dino")) == tmp_path / "run"
    with pytest.raises(UserError, match="holds a run with other settings"):
        check_run_folder(config("./dino"))


# What arrives.


def test_a_download_is_checked_kept_and_not_made_again(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="smtc"):
        path = resolve_weights("dino", VIT_S)
    assert path == cached(DINO) and path.read_bytes() == server.files[DINO]
    assert kept() == {DINO: len(server.files[DINO])}
    assert "checked by the names and shapes of its tensors (its publisher states no" in caplog.text
    assert server.asked == [""]
    server.status = 500
    assert resolve_weights("dino", VIT_S) == path and server.asked == [""]


def test_a_stated_checksum_is_what_is_checked(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="smtc"):
        path = resolve_weights("moco", RESNET)
    assert path.read_bytes() == server.files[MOCO]
    assert "checked by the first 8 digits of its MD5, which its publisher states" in caplog.text


@pytest.mark.parametrize(("weights", "backbone"), [("dino", VIT_S), ("moco", RESNET)])
def test_an_encoder_starts_from_a_name(
    server: Server, weights: str, backbone: BackboneConfig
) -> None:
    encoder = build_encoder(backbone)
    report = load_encoder_weights(encoder, weights)
    name = next(iter(report.loaded)).removeprefix("encoder.")
    assert torch.equal(encoder.state_dict()[name], torch.zeros_like(encoder.state_dict()[name]))
    assert len(report.loaded) > 100 and str(cached()) in report.source


def test_a_redirect_is_followed_also_by_a_part(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = halved(server)
    publish(monkeypatch, f"{server.address}/moved", "")
    assert resolve_weights("dino", VIT_S).read_bytes() == body
    assert server.asked == [f"bytes={len(body) // 2}-"]


def test_a_partial_file_is_gone_on_with(server: Server) -> None:
    body = halved(server)
    assert resolve_weights("dino", VIT_S).read_bytes() == body
    assert server.asked == [f"bytes={len(body) // 2}-"] and kept() == {DINO: len(body)}


def test_a_whole_partial_file_is_not_fetched_again(server: Server) -> None:
    """As a process leaves it that was killed before the renaming."""
    cached().mkdir(parents=True)
    cached(f"{MOCO}.partial").write_bytes(server.files[MOCO])
    assert resolve_weights("moco", RESNET).read_bytes() == server.files[MOCO]
    assert server.asked == [] and kept() == {MOCO: len(server.files[MOCO])}


def test_without_parts_a_partial_file_starts_anew(server: Server) -> None:
    body = halved(server)
    server.ranges = False
    assert resolve_weights("dino", VIT_S).read_bytes() == body
    assert kept() == {DINO: len(body)}


def test_a_partial_file_that_is_too_long_starts_anew(server: Server) -> None:
    cached().mkdir(parents=True)
    cached(f"{DINO}.partial").write_bytes(server.files[DINO] + b"more")
    assert resolve_weights("dino", VIT_S).read_bytes() == server.files[DINO]
    assert server.asked == [f"bytes={len(server.files[DINO]) + 4}-", ""]


def test_another_part_than_asked_for(server: Server) -> None:
    body = halved(server)
    server.sent_part = 3
    assert "another part than was asked for" in failed(server)
    assert kept() == {f"{DINO}.partial": len(body) // 2}


def test_a_body_that_ends_early_can_be_gone_on_with(server: Server) -> None:
    server.promised = 10
    size = len(server.files[DINO])
    said = failed(server)
    assert f"ended after {size:,} of {size + 10:,} bytes" in said
    assert f"save it as {cached(DINO)}." in said
    assert kept() == {f"{DINO}.partial": size}
    server.promised = 0
    server.files[DINO] += b"0123456789"  # what an archive may end with
    assert resolve_weights("dino", VIT_S).read_bytes() == server.files[DINO]
    assert server.asked == ["", f"bytes={size}-"]


@pytest.mark.parametrize("where", ["pause", "halfway"])
def test_a_server_that_falls_silent(
    server: Server, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(downloads, "_TIMEOUT", 0.2)
    monkeypatch.setattr(downloads, "_CHUNK", 1024)
    setattr(server, where, 2.0)
    assert "could not be downloaded (no answer within 0.2 s); fetch" in failed(server)
    part = len(server.files[DINO]) // 2 // 1024 * 1024 if where == "halfway" else 0
    assert kept() == ({f"{DINO}.partial": part} if part else {})


@pytest.mark.parametrize(("status", "words"), [(404, "404 Not Found"), (503, "503 Service")])
def test_a_server_that_refuses(server: Server, status: int, words: str) -> None:
    server.status = status
    assert f"the server answers {words}" in failed(server)
    assert kept() == {}


def test_nobody_listens(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, "http://127.0.0.1:9", "")
    with pytest.raises(UserError, match=r"\(Connection refused\); fetch http://127.0.0.1:9/dino"):
        resolve_weights("dino", VIT_S)
    assert kept() == {}


def test_no_such_host(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, "http://nowhere.invalid", "")
    with pytest.raises(
        UserError, match=r"could not be downloaded .*fetch http://nowhere\.invalid/"
    ):
        resolve_weights("dino", VIT_S)


def test_a_web_page_in_place_of_the_file(server: Server) -> None:
    server.files[DINO], server.kind = b"<html>Log in</html>", "text/html"
    said = failed(server)
    assert "(it is no checkpoint but text/html); try again later, or save the right file" in said
    assert kept() == {}


def test_an_empty_file(server: Server) -> None:
    server.files[DINO] = b""
    assert "the server sends an empty file" in failed(server)
    assert kept() == {}


def test_a_wrong_checksum(server: Server) -> None:
    body = bytearray(server.files[MOCO])
    body[-1] ^= 1
    server.files[MOCO] = bytes(body)
    found = hashlib.md5(body).hexdigest()[:8]
    assert f"(its MD5 begins with {found}, not {server.md5})" in failed(server, RESNET, "moco")
    assert kept() == {}


@pytest.mark.parametrize("kind", ["of another encoder", "cut short"])
def test_a_file_without_checksum_that_is_not_the_right_one(server: Server, kind: str) -> None:
    server.files[DINO] = server.files[MOCO] if kind != "cut short" else server.files[DINO][:5000]
    said = failed(server)
    assert ("its tensors are not those of vit_small, patch 16" in said) == (kind != "cut short")
    assert ("cannot be read as a checkpoint" in said) == (kind == "cut short")
    assert kept() == {}


# The cache.


def test_a_file_put_there_by_hand(server: Server) -> None:
    cached().mkdir(parents=True)
    cached(DINO).write_bytes(server.files[DINO])
    assert resolve_weights("dino", VIT_S) == cached(DINO)
    assert server.asked == []


@pytest.mark.parametrize(
    ("weights", "backbone", "name"), [("dino", VIT_S, DINO), ("moco", RESNET, MOCO)]
)
def test_a_damaged_file_is_noticed_and_replaced(
    server: Server,
    caplog: pytest.LogCaptureFixture,
    weights: str,
    backbone: BackboneConfig,
    name: str,
) -> None:
    resolve_weights(weights, backbone)
    cached(name).write_bytes(server.files[name][:-100])
    with caplog.at_level(logging.WARNING, logger="smtc"):
        assert resolve_weights(weights, backbone).read_bytes() == server.files[name]
    assert f"{cached(name)} is damaged (" in caplog.text and len(server.asked) == 2


def test_a_damaged_file_without_network(server: Server) -> None:
    resolve_weights("dino", VIT_S)
    cached(DINO).write_bytes(b"PK")
    server.status = 502
    assert f"save it as {cached(DINO)}." in failed(server)


def test_a_full_disk(
    server: Server, mounted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = mounted("size=16k")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    assert len(server.files[DINO]) > 20_000
    said = failed(server)
    assert f"cannot be kept in {cached()} (No space left on device); free some space" in said
    assert kept() == {}


def test_a_cache_that_cannot_be_written(
    server: Server, read_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(read_only))
    assert "(Read-only file system); free some space, set XDG_CACHE_HOME" in failed(server)
    assert server.asked == []


def test_a_cache_that_can_only_be_read_serves_what_it_has(
    server: Server, mounted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = mounted("size=1m")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    resolve_weights("dino", VIT_S)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    assert resolve_weights("dino", VIT_S) == cached(DINO)


def test_a_file_in_place_of_the_cache(server: Server) -> None:
    cached().parent.mkdir(parents=True)
    cached().write_text("")
    assert f"cannot be kept in {cached()} (" in failed(server)


# Many processes.

_PROGRAM = """
import dataclasses, logging, sys
from smtc import public_weights
from smtc.config import BackboneConfig
from smtc.downloads import resolve_weights
from smtc.errors import UserError
public_weights.PUBLISHED = tuple(
    dataclasses.replace(known, address=f"{sys.argv[1]}/{known.file_name}")
    for known in public_weights.PUBLISHED
)
logging.basicConfig(level=logging.INFO)
"""
_ALONE = _PROGRAM + 'print(resolve_weights("dino", BackboneConfig()))'
_TOGETHER = (
    _PROGRAM
    + """
import torch
from smtc.training.distributed import joined
with joined(torch.device("cpu")) as world:
    try:
        print(world.rank, resolve_weights("dino", BackboneConfig()), flush=True)
    except UserError as error:
        print(world.rank, error, flush=True)
"""
)


def test_of_processes_at_once_one_downloads(server: Server, tmp_path: Path) -> None:
    server.gate = threading.Event()
    command = [sys.executable, "-c", _ALONE, server.address]
    logs = [tmp_path / "first", tmp_path / "second"]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log.open("w"), text=True)
        for log in logs
    ]
    end = time.monotonic() + 60
    while not any("Waiting for another process" in log.read_text() for log in logs):
        assert time.monotonic() < end and all(process.poll() is None for process in processes)
        time.sleep(0.05)
    server.gate.set()
    said = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert said == [str(cached(DINO))] * 2
    assert server.asked == [""] and kept() == {DINO: len(server.files[DINO])}


def test_one_that_waited_takes_over_from_one_that_failed(server: Server) -> None:
    """It holds the lock of a file that is gone by then, and must not download beside a third."""
    cached().mkdir(parents=True)
    with downloads._sole_partial(cached(DINO)):
        found: list[Path] = []
        waiting = threading.Thread(target=lambda: found.append(resolve_weights("dino", VIT_S)))
        waiting.start()
        time.sleep(0.3)
        assert not found and not server.asked
    waiting.join(timeout=20)
    assert found == [cached(DINO)] and kept() == {DINO: len(server.files[DINO])}


def test_without_locks_each_has_a_file_of_its_own(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(downloads.fcntl, "flock", refuse)
    halved(server)
    before = cached(f"{DINO}.partial").read_bytes()
    assert resolve_weights("dino", VIT_S).read_bytes() == server.files[DINO]
    assert server.asked == [""] and cached(f"{DINO}.partial").read_bytes() == before
    cached(DINO).unlink()
    server.promised = 10
    failed(server)
    assert kept() == {f"{DINO}.partial": len(before)}


@pytest.mark.parametrize("status", [200, pytest.param(404, marks=pytest.mark.slow)])
def test_of_the_processes_of_a_machine_the_first_downloads(
    server: Server, tmp_path: Path, status: int
) -> None:
    server.status = status
    program = tmp_path / "program.py"
    program.write_text(_TOGETHER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node=2", str(program), server.address],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    first, second = sorted(done.stdout.splitlines())
    assert first[0] == "0" and second[0] == "1" and first[1:] == second[1:]
    assert (str(cached(DINO)) if status == 200 else "answers 404 Not Found") in first
    assert server.asked == [""]
    assert cached(DINO).exists() == (status == 200)


def test_a_failed_download_starts_no_run(
    server: Server, refused: Command, synthetic_data: Path, tmp_path: Path
) -> None:
    server.status = 404
    flags = ["--model.backbone.architecture", "vit_small", "--model.backbone.weights", "dino"]
    flags += ["--model.backbone.patch", 16]
    said = refused(*train_flags(synthetic_data, tmp_path / "run", *flags))
    assert said.startswith("smtc: The weights dino could not be downloaded")
    assert not (tmp_path / "run").exists()
