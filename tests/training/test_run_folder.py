"""Run folders belong to one set of settings and to nothing else."""

import errno
import fcntl
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smtc.config import Config, flatten, to_dict
from smtc.errors import UserError
from smtc.training.run_folder import check_run_folder, claim_run_folder, locked, write_json
from smtc.training.trainer import train

TinyConfig = Callable[..., Config]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def open_run_folder(config: Config) -> Path:
    """As `train` does."""
    folder = check_run_folder(config)
    claim_run_folder(folder, config)
    return folder


def run_config(tiny_config: TinyConfig, folder: Path, **settings: Any) -> Config:
    dotted = {name.replace("__", "."): value for name, value in settings.items()}
    return tiny_config({"output": str(folder)} | dotted)


def test_a_run_folder_is_made_with_its_parents_and_settings(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    config = run_config(tiny_config, tmp_path / "some" / "run")
    folder = open_run_folder(config)
    assert folder == tmp_path / "some" / "run"
    assert names(folder) == ["config.json", "environment.json"]
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    assert environment["versions"]["torch"]
    assert len(environment["commit"] or "") >= 40
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(to_dict(config)))


def test_an_empty_folder_and_the_same_settings_are_welcome(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    config = run_config(tiny_config, tmp_path)
    open_run_folder(config)
    assert open_run_folder(config) == tmp_path


def test_no_output_named(tiny_config: TinyConfig) -> None:
    with pytest.raises(UserError, match="--output"):
        open_run_folder(tiny_config())


def test_other_settings_are_refused_with_their_names(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    open_run_folder(run_config(tiny_config, tmp_path))
    before = (tmp_path / "config.json").read_bytes()
    other = run_config(tiny_config, tmp_path, optim__lr=0.5, model__slots=3)
    with pytest.raises(UserError) as refusal:
        open_run_folder(other)
    told = str(refusal.value)
    assert "model.slots 8 (now 3), optim.lr 0.008 (now 0.5);" in told
    assert "more" not in told
    assert str(tmp_path) in told
    assert (tmp_path / "config.json").read_bytes() == before


def test_many_other_settings_are_counted(tiny_config: TinyConfig, tmp_path: Path) -> None:
    open_run_folder(run_config(tiny_config, tmp_path))
    six = {"slots": 3, "instances": 2, "iterations": 2, "update": "gru"}
    settings = {f"model__{name}": value for name, value in six.items()}
    other = run_config(tiny_config, tmp_path, optim__lr=0.5, train__seed=9, **settings)
    with pytest.raises(UserError, match="and 2 more;"):
        open_run_folder(other)


def test_settings_that_do_not_change_the_result_may_differ(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    open_run_folder(run_config(tiny_config, tmp_path))
    free = {
        "train.device": "auto",
        "train.threads": 2,
        "train.log_every": 7,
        "train.checkpoint_every": 3,
        "data.workers": 5,
        "data.loader": "torch",
        "data.max_bad_share": 0.5,
        "model.impl": "eager",
    }
    open_run_folder(tiny_config(free | {"output": str(tmp_path)}))
    written = flatten(json.loads((tmp_path / "config.json").read_text(encoding="utf-8")))
    assert {name: written[name] for name in free} == free


def test_a_run_of_an_older_version_goes_on_with_the_default_of_a_new_setting(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    open_run_folder(run_config(tiny_config, tmp_path))
    file = tmp_path / "config.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    del written["data"]["antialias"], written["optim"]["betas"], written["eval"]
    file.write_text(json.dumps(written), encoding="utf-8")
    with pytest.raises(UserError, match=r"data\.antialias False \(now True\)"):
        open_run_folder(run_config(tiny_config, tmp_path, data__antialias=True))
    open_run_folder(run_config(tiny_config, tmp_path))


def test_looking_at_a_folder_changes_nothing(tiny_config: TinyConfig, tmp_path: Path) -> None:
    assert check_run_folder(run_config(tiny_config, tmp_path / "run")) == tmp_path / "run"
    assert names(tmp_path) == []


def test_a_moved_run_folder_goes_on(tiny_config: TinyConfig, tmp_path: Path) -> None:
    open_run_folder(run_config(tiny_config, tmp_path / "here"))
    (tmp_path / "here").rename(tmp_path / "there")
    open_run_folder(run_config(tiny_config, tmp_path / "there"))


def test_a_folder_with_something_else_is_refused(tiny_config: TinyConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious", encoding="utf-8")
    with pytest.raises(UserError, match=r"'thesis\.tex'.*choose another --output"):
        open_run_folder(run_config(tiny_config, tmp_path))
    assert names(tmp_path) == ["thesis.tex"]


def test_a_file_in_the_way_is_refused(tiny_config: TinyConfig, tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_text("precious", encoding="utf-8")
    with pytest.raises(UserError, match="is a file; choose another --output"):
        open_run_folder(run_config(tiny_config, path))
    assert path.read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize("content", [b'{"method": ', b"\xff\xfe", b"[1]", b"3", b'"text"'])
def test_a_damaged_config_is_refused(
    tiny_config: TinyConfig, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json"):
        open_run_folder(run_config(tiny_config, tmp_path))
    assert (tmp_path / "config.json").read_bytes() == content


def test_a_read_only_place_is_refused(tiny_config: TinyConfig, read_only: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be written .Read-only file system"):
        open_run_folder(run_config(tiny_config, read_only / "run"))
    with pytest.raises(UserError, match=r"cannot be written .Read-only file system"):
        open_run_folder(run_config(tiny_config, read_only))


HOLDER = """
import os, sys, time
from pathlib import Path
from smtc.training.run_folder import locked
with locked(Path(sys.argv[1])):
    print(flush=True)
    time.sleep(8)
"""


def test_one_process_at_a_time_trains_in_a_folder(tmp_path: Path) -> None:
    """Until it dies, however it dies."""
    folder = tmp_path / "some" / "run"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"\n"
        with (
            pytest.raises(UserError, match=rf"Another process trains in {folder};"),
            locked(folder),
        ):
            pass
        with locked(folder, wanted=False):
            assert names(folder) == [".lock"]
        holder.kill()
    with locked(folder), pytest.raises(UserError), locked(folder):
        pass
    with locked(folder):
        pass
    assert names(folder) == []


def test_a_lock_taken_as_its_holder_leaves_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def late(file: Any, how: int) -> None:
        (tmp_path / ".lock").unlink()
        (tmp_path / ".lock").touch()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UserError, match="Another process"), locked(tmp_path):
        pass


def test_without_locks_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path), locked(tmp_path):
        pass


def test_two_runs_in_one_folder(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = run_config(tiny_config, tmp_path / "run", train__steps=1)
    with locked(tmp_path / "run"), pytest.raises(UserError, match="Another process trains"):
        train(config)
    assert not (tmp_path / "run" / "config.json").exists()
    assert train(config).metrics[-1]["step"] == 1


def test_a_run_killed_before_its_settings_were_written_may_start_again(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    for name in (".lock", "config.json.partial"):
        (tmp_path / name).write_text("{", encoding="utf-8")
    open_run_folder(run_config(tiny_config, tmp_path))


def test_flatten_gives_dotted_names() -> None:
    nested = {"a": 1, "b": {"c": [2], "d": {"e": None}}}
    assert flatten(nested) == {"a": 1, "b.c": [2], "b.d.e": None}


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "values.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}
    assert names(tmp_path) == ["values.json"]


def test_a_run_inside_the_data_is_refused(tiny_config: TinyConfig, synthetic_data: Path) -> None:
    with pytest.raises(UserError, match=r"lies inside the data folder .*--output"):
        open_run_folder(run_config(tiny_config, synthetic_data / "runs" / "mine"))
    assert not (synthetic_data / "runs").exists()
