"""`--config FILE.toml`: each mistake in it is one sentence with its line; nothing is written."""

from pathlib import Path

import pytest
from commands import Command

from smtc import presets
from smtc.cli_parsing import parse_config

WRONG_VALUES = [
    ('[train]\nsteps = "many"\n', "line 2: train.steps is 'many'; it should be a whole number."),
    ("[train]\nsteps = 1.5\n", "line 2: train.steps is 1.5; it should be a whole number."),
    ("[train]\nsteps = true\n", "line 2: train.steps is True; it should be a whole number."),
    ("[train]\n\nlog-every='x'\n", "line 3: train.log-every is 'x'; it should be a whole number."),
    ("[train]\nlog_every = 0\n", "line 2: train.log_every is 0; it must be at least 1."),
    ('[data]\nrandom-gap = "no"\n', "line 2: data.random-gap is 'no'; it should be true or false."),
    ("[optim]\nlr = 'x'\n", "line 2: optim.lr is 'x'; it should be a number."),
    ("[optim]\nlr = nan\n", "line 2: optim.lr is nan; it must be positive and finite."),
    ("output = 3\n", "line 1: output is 3; it should be a text in quotes."),
    (
        '[model]\nupdate = "lstm"\n',
        "line 2: model.update is 'lstm'; choose from 'gru', 'residual'.",
    ),
    (
        "[model]\nresolution = [64]\n",
        "line 2: model.resolution is [64]; it needs a list of 2 values.",
    ),
    ("#\n[model]\nslots = 0\n", "line 3: model.slots is 0; at least 1 slot is needed."),
    ("train = {steps = 'x'}\n", "line 1: train.steps is 'x'; it should be a whole number."),
    ("train.steps = 'x'\n", "line 1: train.steps is 'x'; it should be a whole number."),
    ("[data]\nroot = ''\n", "line 2: data.root is empty; leave it out instead."),
    ('\npreset = "tinny"\n', "line 2: There is no preset 'tinny'; did you mean 'tiny'?"),
]

WRONG_NAMES = [
    ("[train]\nstepz = 3\n", "line 2: there is no setting stepz in [train]; did you mean steps?"),
    (
        "[model.backbone]\npach = 3\n",
        "line 2: there is no setting pach in [model.backbone]; did you mean patch?",
    ),
    (
        "steps = 3\n",
        "line 1: there is no setting steps outside of the tables; it belongs in [train].",
    ),
    (
        "[objective]\niterations = 2\ninstances = 3\n",
        "line 3: there is no setting instances in [objective]; it belongs in [model].",
    ),
    ("[trian]\nsteps = 3\n", "line 1: there is no table [trian]; did you mean [train]?"),
    (
        "train = 3\n",
        "line 1: train is a table, not 3; write [train] on a line of its own and its settings "
        "below.",
    ),
    (
        "[train.steps]\na = 1\n",
        "line 1: train.steps is a setting and no table; write steps = … in [train].",
    ),
    ("[[train]]\n", "line 1: train is a table, not [{}]; write [train] on a line of its own"),
    ("[eval]\nxyzzy = 3\n", "line 2: there is no setting xyzzy in [eval]; there are data, "),
]

NO_TOML = [
    ("[train\n", "line 1, column 7 is no valid TOML (expected ']' at the end of a table"),
    ("[train]\nsteps 3\n", "line 2, column 7 is no valid TOML (expected '=' after a key in a key/"),
    ("[train]\nsteps = = 3\n", "line 2, column 9 is no valid TOML (invalid value; text stands in "),
    ("[train]\nsteps = = 3\n", "quotes): steps = = 3"),
    ("[train]\ndevice = cpu\n", "(invalid value; text stands in quotes): device = cpu"),
    ('[train]\ndevice = "cpu\n', 'a text has no quote at its end): device = "cpu'),
    ("[train]\nsteps = 1\nsteps = 2\n", "line 3, column 10 is no valid TOML (cannot overwrite a v"),
    ("a = [1,\n2", "line 2 is no valid TOML ("),
    ("a = '\0'\n", "line 1, column 6 is no valid TOML ("),
    ("a = '\0'\n", "): a = '?'"),
    ('{"train": {"steps": 3}}', " is JSON; --config takes TOML, with lines such as [train] and "),
]


@pytest.mark.parametrize(("text", "told"), [*WRONG_VALUES, *WRONG_NAMES, *NO_TOML])
def test_a_mistake_is_told_with_its_line(
    safe: Command, tmp_path: Path, text: str, told: str
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(text, encoding="utf-8")
    said = safe("train", "--config", file, "--output", tmp_path / "run")
    assert said.startswith("smtc: ") and str(file) in said
    assert told in said, said


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[train]\nsteps = 3 # \xff\n", "is no UTF-8 text (line 2); save it as such."),
        ("[train]\n".encode("utf-16"), "is no UTF-8 text (line 1); save it as such."),
        (b"\x89PNG\r\n\x1a\n", "is no UTF-8 text (line 1)"),
        (None, "cannot be read (Is a directory); name a TOML file."),
        ("missing", "; check the path."),
    ],
)
def test_what_is_no_text(
    safe: Command, tmp_path: Path, content: bytes | str | None, told: str
) -> None:
    file = tmp_path / "settings.toml"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is None:
        file.mkdir()
    said = safe("train", "--config", file)
    assert str(file) in said and told in said


@pytest.mark.parametrize("content", [b"", b"\n\n", b"# steps = 3\n", b"\xef\xbb\xbf"])
def test_an_empty_file_changes_nothing(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "empty.toml"
    file.write_bytes(content)
    assert parse_config(["--config", str(file)]) == presets.fixed()


def test_marks_and_line_ends_of_other_systems(tmp_path: Path) -> None:
    file = tmp_path / "windows.toml"
    file.write_bytes(b"\xef\xbb\xbf[train]\r\nsteps = 7\r\n")
    assert parse_config(["--config", str(file)]).train.steps == 7


def test_home_in_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "settings.toml"
    file.write_text('output = "~/run"\n[data]\nroot = "~/videos"\n', encoding="utf-8")
    config = parse_config(["--config", str(file)])
    assert config.output == str(tmp_path / "run")
    assert config.data.root == str(tmp_path / "videos")
    assert parse_config([f"--output={tmp_path}/~"]).output == f"{tmp_path}/~"
