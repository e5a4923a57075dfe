"""What `smtc doctor` tries: for each library one small piece of real work.

Each function returns an answer, or raises whatever the library raises. Everything is imported where
it is tried, since any of it may be missing or broken.
"""

import importlib
import importlib.util
import io
import os
import platform
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["works", "limited", "missing", "broken"]

_GIB = 2**30


@dataclass(frozen=True)
class Answer:
    """What came of trying."""

    state: State
    """limited: what is there works, and something is not there."""
    detail: str


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _device() -> Any:
    import torch

    return torch.device("cuda" if _cuda() else "cpu")


def _expect(holds: object, fault: str) -> None:
    if not holds:
        raise RuntimeError(fault)


def try_python() -> Answer:
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return Answer("works", f"{platform.python_version()} on {system}")


def try_torch() -> Answer:
    import torch

    ones = torch.ones(64, 64)
    for kind in (torch.float32, torch.bfloat16):
        product = ones.to(kind) @ ones.to(kind)
        _expect((product == 64).all(), f"a matrix product in {kind} is wrong")
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    units = [
        f"{label} {'yes' if has.get(name) else 'no'}"
        for name, label in (("avx512_bf16", "AVX-512 bf16"), ("amx_bf16", "AMX bf16"))
    ]
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return Answer("works", f"CPU code {capability}, {', '.join(units)}, {threads} threads")


def try_cuda() -> Answer:
    import torch

    if torch.version.cuda is None:
        return Answer("missing", "this torch is built for CPUs only")
    if not torch.cuda.is_available():
        return Answer("missing", f"no device or no driver for CUDA {torch.version.cuda}")
    found = []
    for index in range(torch.cuda.device_count()):
        ones = torch.ones(64, 64, device=f"cuda:{index}")
        _expect(((ones @ ones) == 64).all().item(), f"a matrix product on device {index} is wrong")
        has = torch.cuda.get_device_properties(index)
        memory = has.total_memory / _GIB
        found.append(f"{has.name} (sm_{has.major}{has.minor}, {memory:.0f} GiB)")
    return Answer("works", f"CUDA {torch.version.cuda}, driver {_driver()}: {', '.join(found)}")


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split("\n")[0].strip() or "unknown"


def try_processes() -> Answer:
    import torch
    import torch.distributed as dist

    _expect(dist.is_available(), "this torch is built without torch.distributed")
    _expect(importlib.util.find_spec("torch.distributed.run"), "torchrun is not there")
    backends = {"gloo": torch.device("cpu")} | ({"nccl": torch.device("cuda")} if _cuda() else {})
    for backend, device in backends.items():
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            sums = torch.ones(2, device=device)
            dist.all_reduce(sums)
            _expect(sums.tolist() == [1, 1], f"{backend} adds up wrongly")
        finally:
            dist.destroy_process_group()
    if "nccl" in backends:
        version = ".".join(map(str, torch.cuda.nccl.version()))
        return Answer("works", f"gloo, NCCL {version} and torchrun")
    return Answer("works", "gloo and torchrun; NCCL is not tried without CUDA")


def try_triton() -> Answer:
    importlib.import_module("torch")
    if not _cuda():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
    importlib.import_module("triton")
    _compare_operations("triton", ("assignment", "mask_losses"))
    if _cuda():
        return Answer("works", "compiles and runs kernels for this GPU")
    return Answer("limited", "its interpreter runs the kernels; there is no CUDA device")


def try_operations() -> Answer:
    from smtc.kernels.dispatch import obstacle

    _compare_operations(
        "auto", ("assignment", "mask_losses", "transport_alignment", "masked_slot_attention")
    )
    device = _device()
    reason = obstacle(device)
    if reason is None:
        return Answer("works", "impl auto runs the Triton kernels on cuda")
    if device.type == "cpu":
        return Answer("works", "impl auto runs plain torch (eager) on cpu")
    return Answer("limited", f"impl auto runs plain torch (eager) on cuda: the kernel {reason}")


def _compare_operations(impl: Any, names: tuple[str, ...]) -> None:
    """Run small cases with `impl` and compare them with plain torch in float64."""
    import torch

    from smtc import kernels

    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2, 3, 20, generator=draw)
    features = torch.randn(1, 2, 20, 16, generator=draw)
    queries = torch.randn(1, 1, 4, 16, generator=draw)
    cost = torch.rand(5, 4, 4, generator=draw)
    masks = logits.softmax(2)
    alignment = {"epsilon": 0.05, "iterations": 3}
    attention = {"scale": 0.25, "epsilon": 1e-6}
    calls: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], dict[str, Any]]] = {
        "assignment": (kernels.assignment, (cost,), {}),
        "mask_losses": (kernels.mask_losses, (logits, masks), {}),
        "transport_alignment": (kernels.transport_alignment, (features, masks), alignment),
        "masked_slot_attention": (
            kernels.masked_slot_attention,
            (queries, features[:, 0], features[:, 1]),
            attention,
        ),
    }
    for name in names:
        run, tensors, settings = calls[name]
        found = run(*(x.to(_device()) for x in tensors), impl=impl, **settings)
        wanted = run(*(x.double() for x in tensors), impl="eager", **settings)
        if isinstance(found, torch.Tensor):
            found, wanted = (found,), (wanted,)
        close = [
            torch.allclose(one.double().cpu(), other.double(), rtol=1e-3, atol=1e-4)
            for one, other in zip(found, wanted, strict=True)
        ]
        _expect(all(close), f"{name} computes something else than plain torch")


def _picture() -> Any:
    """uint8 `[48,64,3]`, smooth, so that every codec keeps it."""
    import numpy as np

    rows, columns = np.mgrid[0:48, 0:64]
    return np.stack([rows * 5, columns * 3, 255 - rows * 2], axis=-1).astype(np.uint8)


def _is_close(one: Any, other: Any) -> bool:
    """Whether two pictures differ by no more than lossy codecs do."""
    import numpy as np

    return one.shape == other.shape and bool(np.abs(one.astype(int) - other).mean() < 10)


def try_dali() -> Answer:
    import cv2

    dali = importlib.import_module("nvidia.dali")
    from smtc.pipelines.dali import obstacle

    done = []
    _, encoded = cv2.imencode(".jpg", _picture())
    for device in ("cpu", "cuda") if _cuda() else ("cpu",):
        reason = obstacle(device)
        _expect(reason is None, reason or "")
        gpu = device == "cuda"
        pipe = dali.Pipeline(batch_size=2, num_threads=1, device_id=0 if gpu else None)
        with pipe:
            files = dali.fn.external_source(lambda: [encoded.ravel()] * 2)
            pipe.set_outputs(dali.fn.decoders.image(files, device="mixed" if gpu else "cpu"))
        pipe.build()
        (pictures,) = pipe.run()
        pictures = pictures.as_cpu() if gpu else pictures
        same = [_is_close(pictures.at(n)[..., ::-1], _picture()) for n in range(2)]
        _expect(all(same), f"a JPEG decoded on {device} looks different")
        done.append(device)
    return Answer("works", f"decodes JPEG on {' and '.join(done)}")


def try_pyav() -> Answer:
    av = importlib.import_module("av")
    codecs = {"H.264": "libx264", "MPEG-4": "mpeg4"}
    tried = [label for label, codec in codecs.items() if codec in av.codecs_available]
    for label in tried:
        frames = _through_video(av, codecs[label])
        _expect(len(frames) == 3, f"{label} gives back {len(frames)} frames of 3")
        _expect(_is_close(frames[-1], _picture()), f"{label} gives back other colours")
    readers = {
        "HEVC": ["hevc"],
        "VP9": ["vp9"],
        "AV1": ["libdav1d", "libaom-av1"],  # FFmpeg's own needs a GPU
    }
    can = {label: any(_decodes(av, name) for name in names) for label, names in readers.items()}
    detail = f"writes and reads {_listed(tried)}"
    if any(can.values()):
        detail += f"; has decoders of {_listed(label for label in can if can[label])}"
    lacking = [f"writes no {label}" for label in codecs if label not in tried]
    lacking += [f"reads no {label}" for label in can if not can[label]]
    return Answer("limited" if lacking else "works", "; ".join([detail, *lacking]))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"


def _through_video(av: Any, codec: str) -> list[Any]:
    """Three frames after a way through an MP4 file in memory."""
    memory = io.BytesIO()
    with av.open(memory, "w", format="mp4") as file:
        stream = file.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(3):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(_picture(), format="rgb24")))
        file.mux(stream.encode())
    memory.seek(0)
    with av.open(memory) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


def _decodes(av: Any, codec: str) -> bool:
    try:
        return bool(av.Codec(codec, "r"))
    except ValueError:  # what PyAV's error for an unknown codec is
        return False


def try_opencv() -> Answer:
    import cv2

    for suffix in (".jpg", ".png"):
        written, encoded = cv2.imencode(suffix, _picture())
        _expect(written, f"it cannot write {suffix}")
        _expect(
            _is_close(cv2.imdecode(encoded, cv2.IMREAD_COLOR), _picture()),
            f"a {suffix} file gives back another picture",
        )
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "video.mp4"))
        code = cv2.VideoWriter.fourcc(*"mp4v")
        writer = cv2.VideoWriter(path, code, 25, (64, 48))
        for _ in range(3):
            writer.write(_picture())
        writer.release()
        if not sum(file.stat().st_size for file in Path(folder).iterdir()):
            return Answer("limited", "reads and writes JPEG and PNG, but writes no MP4")
    return Answer("works", "reads and writes JPEG and PNG, writes MP4")


def try_xformers() -> Answer:
    importlib.import_module("xformers")
    import torch

    from smtc.attention import load_xformers, try_xformers

    if not _cuda():
        load_xformers()
        return Answer("limited", "it can be imported; its kernels need a CUDA device")
    for kind in (torch.float32, torch.bfloat16):
        try_xformers(_device(), kind)
    return Answer("works", "attention in float32 and bfloat16")


def try_apex() -> Answer:
    if importlib.util.find_spec("apex") is None:
        return Answer("missing", "not installed")
    import torch

    from smtc.config import OptimConfig
    from smtc.training.apex import fused_adam, load_fused_adam

    load_fused_adam()
    if not _cuda():
        return Answer("limited", "it can be imported; its kernels need a CUDA device")
    weight = torch.nn.Parameter(torch.ones(8, device="cuda"))
    optimizer = fused_adam([{"params": [weight]}], OptimConfig())
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    _expect((weight < 1).all().item(), "a step of FusedAdam changes nothing")
    return Answer("works", "a step of FusedAdam")


def try_safetensors() -> Answer:
    import torch

    files = importlib.import_module("safetensors.torch")
    tensor = torch.arange(6).reshape(2, 3)
    _expect(
        torch.equal(files.load(files.save({"x": tensor}))["x"], tensor),
        "a tensor comes back changed",
    )
    return Answer("works", "writes and reads tensors")


def try_tensorboard() -> Answer:
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        writer = SummaryWriter(folder)
        writer.add_scalar("x", 1.0, 0)
        writer.close()
        _expect(any(Path(folder).iterdir()), "it writes no events")
    return Answer("works", "writes events")


def try_matplotlib() -> Answer:
    importlib.import_module("matplotlib").use("Agg")
    figure, axes = importlib.import_module("matplotlib.pyplot").subplots(figsize=(1, 1))
    axes.plot([0, 1])
    memory = io.BytesIO()
    figure.savefig(memory, format="png")
    _expect(memory.getvalue().startswith(b"\x89PNG"), "it draws no PNG")
    return Answer("works", "draws a chart")


def try_checkpoints() -> Answer:
    import torch
    import torch.distributed.checkpoint as dcp

    with tempfile.TemporaryDirectory() as folder:
        state = {"x": torch.arange(6.0)}
        dcp.save(state, checkpoint_id=folder, no_dist=True)
        found = {"x": torch.zeros(6)}
        dcp.load(found, checkpoint_id=folder, no_dist=True)
    _expect(torch.equal(found["x"], state["x"]), "a tensor comes back changed")
    return Answer("works", "torch.distributed.checkpoint saves and loads")


def try_compiler() -> Answer:
    name = os.environ.get("CXX", "g++")  # what torch asks for
    if shutil.which(name) is None:
        return Answer("missing", f"there is no {name}")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "tiny.cpp")
        source.write_text("int one() { return 1; }\n", encoding="utf-8")
        command = [name, "-shared", "-fPIC", "-o", str(Path(folder, "tiny.so")), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        _expect(done.returncode == 0, f"{name} fails: {done.stderr.strip()}")
    return Answer("works", f"{name} compiles")


def try_shared_memory() -> Answer:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Answer("works", "this system has no /dev/shm that could be too small")
    size, _, free = shutil.disk_usage(folder)
    detail = f"/dev/shm: {free / _GIB:.1f} of {size / _GIB:.1f} GiB free"
    # Two processes hold two batches each; one of the preset `fixed` in float32 is 200 MB.
    return Answer("works" if free >= _GIB else "limited", detail)


def try_open_files() -> Answer:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = [
        "unlimited" if limit == resource.RLIM_INFINITY else str(limit) for limit in (soft, hard)
    ]
    few = soft != resource.RLIM_INFINITY and soft < 1024
    return Answer("limited" if few else "works", f"{shown[0]} (may be raised to {shown[1]})")


def try_disk() -> Answer:
    from smtc.public_weights import weights_folder

    found, faults = [], []
    for label, folder in (("here", Path.cwd()), ("cache", weights_folder())):
        while not folder.exists():  # it is made when it is needed
            folder = folder.parent
        free = shutil.disk_usage(folder).free / _GIB
        found.append(f"{label} {free:.1f} GiB free")
        if free < 2:
            faults.append(f"{label} is nearly full")
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            faults.append(f"{folder} cannot be written ({error.strerror})")
    return Answer("limited" if faults else "works", "; ".join(found + faults))


def try_training() -> Answer:
    import math
    from dataclasses import replace

    from smtc import presets
    from smtc.pipelines.synthetic import synthesize
    from smtc.training.trainer import pick_device, train

    with tempfile.TemporaryDirectory() as folder:
        videos = synthesize(Path(folder, "videos"), videos=4, frames=8, size=32)
        tiny = presets.tiny()
        run = train(
            replace(
                tiny,
                model=replace(tiny.model, resolution=(32, 32)),
                data=replace(tiny.data, root=str(videos), workers=1),
                train=replace(tiny.train, steps=2, batch=2, log_every=1, pictures_every=0),
                output=str(Path(folder, "run")),
            )
        )
        losses = [line["loss"] for line in run.metrics]
        _expect(len(losses) == 2 and all(map(math.isfinite, losses)), f"the losses are {losses}")
        _expect((run.model_folder / "model.safetensors").exists(), "no model was written")
    return Answer("works", f"two steps on {pick_device('auto')}, a checkpoint and a model")
