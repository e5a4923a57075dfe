"""Files that are not what they should be: one sentence each, no traceback, no code run."""

import os
import pickle
import random
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import safetensors.torch
import torch

from smtc.errors import UserError
from smtc.weight_files import Report, read_checkpoint, read_source

STATE = {"weight": torch.arange(5000.0), "epoch": 3}


def saved(path: Path) -> bytes:
    """What a checkpoint with this kind of name holds."""
    if path.suffix == ".safetensors":
        return safetensors.torch.save({"weight": STATE["weight"]})
    torch.save(STATE, path, _use_new_zipfile_serialization=path.suffix == ".pth")
    return path.read_bytes()


@pytest.mark.parametrize("name", ["new.pth", "old.tar", "ours.safetensors"])
def test_whole_files_are_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(saved(path))
    content = read_checkpoint(path)
    assert torch.equal(content["weight"], STATE["weight"])
    assert content.get("epoch", 3) == 3


@pytest.mark.parametrize("name", ["new.pth", "old.tar", "ours.safetensors"])
def test_truncated_files_are_refused_at_every_length(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    whole = saved(path)
    lengths = {*range(0, 400, 7), 1, 2, 3, 4, 8, 9, 64, 65, 500, 1000, 4096}
    lengths |= {len(whole) * part // 10 for part in range(1, 10)}
    lengths |= {len(whole) - left for left in (1, 2, 10, 22, 23, 100, 1000)}
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        with pytest.raises(
            UserError, match=f"{name} (is empty|is not|cannot be read|is damaged)"
        ) as caught:
            read_checkpoint(path)
        assert "\n" not in str(caught.value), length


@pytest.mark.parametrize("name", ["new.pth", "old.tar", "ours.safetensors"])
def test_damaged_files_are_refused_or_read(name: str, tmp_path: Path) -> None:
    """Whatever a few wrong bytes do, nothing but a `UserError` comes out."""
    path = tmp_path / name
    whole = saved(path)
    draw = random.Random(0)
    refused = 0
    for _ in range(150):
        spoiled = bytearray(whole)
        for _ in range(4):
            spoiled[draw.choice([draw.randrange(400), -draw.randrange(1, 400)])] = draw.randrange(
                256
            )
        path.write_bytes(spoiled)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read_checkpoint(path)
        except UserError:
            refused += 1
    assert refused > 30


class Bomb:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("ran",)


def test_code_in_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Bomb()}, "bomb.pth")
    with pytest.raises(UserError, match=rf"bomb.pth is damaged or holds a {os.name}.mkdir, and on"):
        read_checkpoint("bomb.pth")
    Path("bomb.pkl").write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(UserError, match=r"bomb.pkl"):
        read_checkpoint("bomb.pkl")
    assert not Path("ran").exists()


def test_a_foreign_object_is_named(tmp_path: Path) -> None:
    torch.save({"model": Fraction(1, 2)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x.pth is damaged or holds a fractions.Fraction, and on"):
        read_checkpoint(tmp_path / "x.pth")


def test_other_things_are_no_checkpoints(tmp_path: Path) -> None:
    text = tmp_path / "notes.pth"
    text.write_text("not weights\n" * 100)
    with pytest.raises(UserError, match=r"notes.pth is not a checkpoint"):
        read_checkpoint(text)
    text.rename(tmp_path / "notes.safetensors")
    with pytest.raises(UserError, match=r"notes.safetensors cannot be read as a checkpoint"):
        read_checkpoint(tmp_path / "notes.safetensors")
    with pytest.raises(UserError, match="is a folder"):
        read_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"There is no file .*absent.pth"):
        read_checkpoint(tmp_path / "absent.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list, not a dictionary"):
        read_checkpoint(tmp_path / "list.pth")


def test_a_pickle_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    # Calls a function that is allowed, without its arguments.
    (tmp_path / "odd.pth").write_bytes(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.")
    with pytest.raises(UserError, match=r"odd.pth cannot be read"):
        read_checkpoint(tmp_path / "odd.pth")


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"a": torch.zeros(2)},
        {"patch_embed.proj.weight": torch.zeros(2)},
        {0: torch.zeros(2)},
        {"state_dict": {"lr": 1}},
    ],
)
def test_unknown_weights_are_refused(content: dict, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match="holds no weights that are known here"):
        read_source(tmp_path / "x.pth")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no model.safetensors and no model/model.safe"):
        read_source(tmp_path)
    with pytest.raises(UserError, match="There is no file"):
        read_source(tmp_path / "nowhere")


def test_a_report_reads_well() -> None:
    loaded = {"encoder.cls_token": "b.cls_token", "encoder.blocks.0.w": "b.blocks.0.w"}
    loaded["encoder.blocks.1.w"] = "b.blocks.1.w"
    loaded["head.w"] = "head.w"
    left_out = {name: "training state" for name in "vwxyz"} | {"fc.w": "projection head"}
    report = Report(
        source="a.pth (ViT)",
        loaded=loaded,
        values=12345,
        left_out=left_out,
        initial=("neck.fc1.weight",),
        written=Path("out"),
    )
    assert str(report).splitlines() == [
        "a.pth (ViT): 4 tensors taken, 12,345 values",
        "  b.cls_token -> encoder.cls_token (1 tensor)",
        "  b.blocks -> encoder.blocks (2 tensors)",
        "  head -> head (1 tensor)",
        "  left out (training state): v, w, x and 2 more",
        "  left out (projection head): fc.w",
        "  not in the file, left as initialised: neck.fc1.weight",
        "  written to out",
    ]
