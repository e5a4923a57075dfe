"""Every kind of file: fabricated with the public names and shapes, loaded, converted, spoiled."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from smtc import presets
from smtc.backbones import Encoder, build_encoder
from smtc.config import BackboneConfig, ModelConfig, to_dict
from smtc.errors import UserError
from smtc.model import SMTC
from smtc.training.checkpoint import Checkpoints
from smtc.weights import (
    checkpoint_hash,
    convert,
    load_encoder,
    load_encoder_weights,
    load_init,
    load_into,
    load_model,
    save_encoder,
    save_model,
)

TINY = BackboneConfig(
    architecture="vit_tiny", patch=8, neck=16, position_embedding="none", weights="start.pth"
)
SMALL = ModelConfig(backbone=TINY, resolution=(24, 32), slots=3, instances=2)
VIT_S = BackboneConfig()
RESNET = BackboneConfig(architecture="resnet50", feature="tokens")


def pair(name: str, *weight: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def dino_shapes(patch: int = 16) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, 384)}
    shapes["pos_embed"] = (1, (224 // patch) ** 2 + 1, 384)
    shapes |= pair("patch_embed.proj", 384, 3, patch, patch)
    for i in range(12):
        block = f"blocks.{i}."
        shapes |= pair(block + "norm1", 384) | pair(block + "attn.qkv", 1152, 384)
        shapes |= pair(block + "attn.proj", 384, 384) | pair(block + "norm2", 384)
        shapes |= pair(block + "mlp.fc1", 1536, 384) | pair(block + "mlp.fc2", 384, 1536)
    return shapes | pair("norm", 384)


def authors_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {f"encoder.{name}": shape for name, shape in dino_shapes().items()}
    shapes |= pair("transport_proj", 384, 256, 1)
    shapes |= pair("mlp_slot.0", 768, 384) | pair("mlp_slot.2", 384, 768)
    slots: dict[str, tuple[int, ...]] = {
        "slots_mu": (1, 16, 1, 384),
        "slots_sigma": (1, 16, 1, 384),
    }
    for norm in ("norm_input", "norm_slots", "norm_pre_ff"):
        slots |= pair(norm, 384)
    for linear in ("project_q", "project_k", "project_v", "mlp.0", "mlp.2"):
        slots |= pair(linear, 384, 384)
    return shapes | {f"slot_attention.{name}": shape for name, shape in slots.items()}


def fill(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A number of its own for every tensor, expanded, so that the files stay small."""
    return {name: torch.tensor(i / 7).expand(shapes[name]) for i, name in enumerate(shapes)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the public files."""
    folder = tmp_path_factory.mktemp("public")
    dino = fill(dino_shapes())
    torch.save(dino, folder / "dino.pth")
    head = {"head.mlp.0.weight": torch.zeros(2, 2), "head.last_layer.weight_g": torch.zeros(2)}
    full = {
        "student": {"module.backbone.cls_token": torch.zeros(1, 1, 384)},
        "teacher": {f"backbone.{n}": t for n, t in (dino | head).items()},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", lr=5e-4),
    }
    torch.save(full, folder / "dino_full.pth")
    with torch.device("meta"):
        trunk = build_encoder(RESNET).state_dict()
    shapes = {n: tuple(t.shape) for n, t in trunk.items() if not n.startswith("project.")}
    resnet = fill(shapes)
    moco = {f"module.encoder_q.{n}": t for n, t in resnet.items()}
    moco |= {"module.encoder_q.fc.0.weight": torch.zeros(2), "module.queue": torch.zeros(2, 2)}
    torch.save(
        {"epoch": 200, "arch": "resnet50", "state_dict": moco, "optimizer": {}},
        folder / "moco.pth.tar",
        _use_new_zipfile_serialization=False,
    )
    authors = {"iteration": 7, "optimizer_state_dict": {"state": {}}, "loss": torch.zeros(())}
    torch.save({**authors, "model_state_dict": fill(authors_shapes())}, folder / "authors.pth")
    return folder


def expect_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name


def test_the_authors_checkpoint_has_the_size_that_the_spec_says() -> None:
    with torch.device("meta"):
        model = SMTC(presets.official_v2().model)
    state = model.state_dict()
    assert {n: tuple(t.shape) for n, t in state.items()} == authors_shapes()
    assert len(state) == 174
    assert sum(t.numel() for t in state.values()) == 23_109_120


def test_the_authors_file_loads_strictly(files: Path) -> None:
    model = load_model(files / "authors.pth", iterations=5)
    assert not model.training
    assert model.config.semantic_mask == "logits>0.3" and model.config.iterations == 5
    expect_equal(model.state_dict(), fill(authors_shapes()))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda s: s.pop("mlp_slot.0.bias"), "mlp_slot.0.bias is missing. Use"),
        (lambda s: s.update(extra=torch.zeros(2)), "extra has no place in it. Use"),
        (
            lambda s: s.update({"encoder.norm.bias": torch.zeros(5)}),
            r"encoder.norm.bias is \(5,\) instead of \(384,\). Use",
        ),
        (
            lambda s: [s.pop(f"slot_attention.mlp.{i}.bias") for i in (0, 2)],
            r"slot_attention.mlp.0.bias is missing \(and 1 more\)",
        ),
        (lambda s: s.update({"encoder.norm.bias": 3}), "encoder.norm.bias is missing. Use"),
    ],
)
def test_one_odd_tensor_is_named(spoil: Any, sentence: str, tmp_path: Path) -> None:
    state = fill(authors_shapes())
    spoil(state)
    torch.save({"model_state_dict": state}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=f"odd.pth does not fit.*174 tensors: {sentence}"):
        load_model(tmp_path / "odd.pth")


def test_load_into_refuses_before_it_changes_anything() -> None:
    model = torch.nn.Linear(2, 3)
    before = model.weight.detach().clone()
    with pytest.raises(UserError, match=r"somewhere .* 2 tensors: bias is int instead of"):
        load_into(model, {"weight": torch.ones(3, 2), "bias": 1}, "somewhere")
    assert torch.equal(model.weight, before)
    load_into(model, {"weight": torch.ones(3, 2), "bias": torch.ones(3)}, "somewhere")
    assert torch.equal(model.weight, torch.ones(3, 2))


@pytest.mark.parametrize("path", ["run", "run/model", "run/model/model.safetensors"])
def test_our_model_comes_back_bit_for_bit(path: str, tmp_path: Path) -> None:
    model = SMTC(SMALL).train()
    save_model(model, tmp_path / "run" / "model")
    assert sorted(os.listdir(tmp_path / "run" / "model")) == ["config.json", "model.safetensors"]
    loaded = load_model(tmp_path / path)
    expect_equal(loaded.state_dict(), model.state_dict())
    assert not loaded.training
    assert loaded.config.backbone.weights is None
    assert {**to_dict(loaded.config), "backbone": 0} == {**to_dict(SMALL), "backbone": 0}


def test_saving_again_replaces_the_model(tmp_path: Path) -> None:
    save_model(SMTC(SMALL), tmp_path)
    before = checkpoint_hash(tmp_path)
    model = SMTC(SMALL)
    (tmp_path / "model.safetensors.partial").write_text("left by a run that was killed")
    save_model(model, tmp_path)
    assert checkpoint_hash(tmp_path) != before
    expect_equal(load_model(tmp_path).state_dict(), model.state_dict())
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_a_save_that_fails_leaves_the_model_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SMTC(SMALL)
    save_model(model, tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"could not be written to .*No space left"):
        save_model(SMTC(SMALL), tmp_path)
    monkeypatch.undo()
    expect_equal(load_model(tmp_path).state_dict(), model.state_dict())
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_a_saved_model_has_the_mode_of_an_ordinary_file(tmp_path: Path) -> None:
    former = os.umask(0o027)
    try:
        save_model(SMTC(SMALL), tmp_path)
    finally:
        os.umask(former)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"config.json": 0o640, "model.safetensors": 0o640}


def test_what_training_resumes_from_is_no_model(tmp_path: Path) -> None:
    model = SMTC(SMALL)
    (tmp_path / "run").mkdir()
    saving = Checkpoints(tmp_path / "run")
    saving.save(7, 7, {"method": model.state_dict()})
    saving.close()
    file = tmp_path / "run" / "checkpoints" / "step_00000007"
    sentence = r"step_00000007 is what training resumes from.* name the run folder .*run instead"
    for load in (load_model, lambda path: load_init(model, path)):
        with pytest.raises(UserError, match=sentence):
            load(file)
    with pytest.raises(UserError, match="There is no file"):
        load_model(file.with_name("step_00000008"))
    # The name alone says nothing: a model of the authors may have it too.
    file = file.with_name("step_00000009.pt")
    torch.save({"model_state_dict": fill(authors_shapes())}, file)
    assert isinstance(load_model(file), SMTC)


def test_overrides_are_checked(tmp_path: Path) -> None:
    save_model(SMTC(SMALL), tmp_path)
    assert load_model(tmp_path, impl="eager", instances=4).config.instances == 4
    backbone = BackboneConfig(
        architecture="vit_tiny", patch=8, neck=16, position_embedding="none", feature="tokens"
    )
    assert load_model(tmp_path, backbone=backbone).config.backbone == backbone
    with pytest.raises(UserError, match="no model setting 'iteration'; did you mean 'iterations'"):
        load_model(tmp_path, iteration=5)
    with pytest.raises(UserError, match="no model setting 'xyz'; choose from backbone, "):
        load_model(tmp_path, xyz=5)
    with pytest.raises(UserError, match=r"model.update is 'lstm'; choose from 'gru', 'residual'"):
        load_model(tmp_path, update="lstm")
    with pytest.raises(UserError, match=r"slots_mu is \(1, 3, 1, 64\) instead of \(1, 5, 1, 64\)"):
        load_model(tmp_path, slots=5)


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    model = SMTC(SMALL)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds something else \(notes.txt\)"):
        save_model(model, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    (other / "model.safetensors").write_text("someone's weights")
    with pytest.raises(UserError, match=r"holds something else \(config.json\)"):
        save_model(model, other)
    assert (other / "model.safetensors").read_text() == "someone's weights"
    for folder in (tmp_path / "notes.txt", tmp_path / "notes.txt" / "below"):
        with pytest.raises(UserError, match=r"notes.txt.* cannot be made or read \("):
            save_model(model, folder)
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "other"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "no config.json beside the weights"),
        ("{", "config.json is damaged"),
        ("[]", "does not describe an SMTC model"),
        ('{"kind": "encoder", "format": 1}', "does not describe an SMTC model"),
        ('{"kind": "model", "format": 2, "model": {}}', "has format 2, this version reads 1"),
        ('{"kind": "model", "format": 1, "model": {"slot": 3}}', "Unknown setting model.'slot'"),
        ('{"kind": "model", "format": 1, "model": {"slots": 0}}', "model.slots is 0"),
    ],
)
def test_spoiled_settings_are_named(text: str | None, sentence: str, tmp_path: Path) -> None:
    save_model(SMTC(SMALL), tmp_path)
    (tmp_path / "config.json").unlink()
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=sentence):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["dino.pth", "dino_full.pth", "authors.pth"])
def test_an_encoder_starts_from_every_public_vit_file(name: str, files: Path) -> None:
    encoder = build_encoder(VIT_S)
    report = load_encoder_weights(encoder, files / name)
    if name == "authors.pth":
        every = fill(authors_shapes())
        wanted = {n.removeprefix("encoder."): t for n, t in every.items() if "encoder." in n}
        assert report.left_out["transport_proj.weight"] == "not the encoder"
        assert report.left_out["iteration"] == "training state"
    else:
        wanted = fill(dino_shapes())
    expect_equal(encoder.state_dict(), wanted)
    assert len(report.loaded) == 150 and not report.initial
    assert report.values == sum(t.numel() for t in wanted.values())
    if name == "dino_full.pth":
        assert report.loaded["encoder.cls_token"] == "backbone.cls_token"
        assert report.left_out["backbone.head.mlp.0.weight"] == "projection head"
        assert "teacher" in report.left_out["student"]


def test_moco_starts_the_resnet(files: Path) -> None:
    encoder = build_encoder(RESNET)
    project = encoder.get_submodule("project").weight.detach().clone()
    report = load_encoder_weights(encoder, files / "moco.pth.tar")
    moco = torch.load(files / "moco.pth.tar")["state_dict"]
    state = encoder.state_dict()
    for name, tensor in moco.items():
        if ".fc." not in name and "queue" not in name:
            ours = state[name.removeprefix("module.encoder_q.")]
            assert torch.equal(ours, tensor.to(ours.dtype)), name
    assert report.initial == ("project.weight", "project.bias")
    assert torch.equal(state["project.weight"], project)
    assert report.left_out["module.encoder_q.fc.0.weight"] == "projection head"
    assert report.left_out["module.queue"] == "not the encoder"
    assert report.left_out["optimizer"] == "training state"


@pytest.mark.parametrize(
    ("name", "config"),
    [("dino.pth", VIT_S), ("authors.pth", VIT_S), ("moco.pth.tar", RESNET)],
)
def test_an_encoder_alone_has_the_settings_of_its_file(
    name: str, config: BackboneConfig, files: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    encoder = load_encoder(files / name)
    assert encoder.config == config and not encoder.training
    again = load_encoder(files / name)  # the projection that MoCo lacks is no other
    expect_equal(again.state_dict(), encoder.state_dict())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(0)
    wanted = build_encoder(config)
    load_encoder_weights(wanted, files / name)
    expect_equal(encoder.state_dict(), wanted.state_dict())
    save_encoder(encoder, tmp_path / "encoder")
    expect_equal(load_encoder(tmp_path / "encoder").state_dict(), encoder.state_dict())


def test_an_encoder_by_its_name(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def resolve(weights: str | Path, config: BackboneConfig) -> Path:
        asked.append((weights, config))
        return files / "dino.pth"

    monkeypatch.setattr("smtc.weights.resolve_weights", resolve)
    assert load_encoder("dino").config == VIT_S
    assert asked == [("dino", VIT_S)]


def test_an_encoder_without_positions_leaves_them_out(files: Path) -> None:
    encoder = build_encoder(BackboneConfig(position_embedding="none", neck=8))
    report = load_encoder_weights(encoder, files / "dino.pth")
    assert report.left_out == {"pos_embed": "position_embedding is none"}
    assert report.initial[0] == "neck.fc1.weight" and len(report.initial) == 4


@pytest.mark.parametrize(
    ("backbone", "name", "sentence"),
    [
        (BackboneConfig(patch=8), "dino.pth", r"pos_embed is \(1, 197, 384\) instead of \(1, 785"),
        (VIT_S, "moco.pth.tar", "cls_token is missing .*conv1.weight has no place"),
        (RESNET, "dino.pth", "conv1.weight is missing"),
    ],
)
def test_another_architecture_is_refused(
    backbone: BackboneConfig, name: str, sentence: str, files: Path
) -> None:
    with torch.device("meta"):
        encoder = build_encoder(backbone)
    with pytest.raises(UserError, match=sentence):
        load_encoder_weights(encoder, files / name)


def small_encoder(**settings: Any) -> Encoder:
    values = {**to_dict(TINY), "weights": None, **settings}
    return build_encoder(BackboneConfig(**values))


def test_init_from_the_warm_start(tmp_path: Path) -> None:
    encoder, model = small_encoder(), SMTC(SMALL)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    save_encoder(encoder, tmp_path / "model")
    report = load_init(model, tmp_path)
    expect_equal(model.encoder.state_dict(), encoder.state_dict())
    for name, tensor in model.state_dict().items():
        if not name.startswith("encoder."):
            assert name in report.initial and torch.equal(tensor, before[name])
    assert report.loaded["encoder.neck.fc1.weight"] == "encoder.neck.fc1.weight"
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    assert settings["kind"] == "encoder" and settings["backbone"]["weights"] is None
    with pytest.raises(UserError, match="holds an encoder only"):
        load_model(tmp_path)


def test_init_from_a_whole_model(tmp_path: Path) -> None:
    first, second = SMTC(SMALL), SMTC(SMALL)
    save_model(first, tmp_path)
    assert load_init(second, tmp_path / "model.safetensors").initial == ()
    expect_equal(second.state_dict(), first.state_dict())
    encoder = small_encoder()
    report = load_encoder_weights(encoder, tmp_path)
    expect_equal(encoder.state_dict(), first.encoder.state_dict())
    assert report.left_out["slot_attention.slots_mu"] == "not the encoder"
    bare = small_encoder(neck=0)
    assert load_encoder_weights(bare, tmp_path).left_out["encoder.neck.fc2.bias"] == (
        "the encoder has no neck"
    )


def test_init_refuses_what_does_not_fit(tmp_path: Path, files: Path) -> None:
    model = SMTC(SMALL)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"neck": 0}, r"encoder.neck.fc1.weight is missing \(and 3 more\)"),
        ({"neck": 8}, r"encoder.neck.fc1.weight is \(8, 64\) instead of \(16, 64\)"),
        ({"position_embedding": "learned"}, "encoder.pos_embed has no place"),
        ({"patch": 16}, r"proj.weight is \(64, 3, 16, 16\) instead of \(64, 3, 8, 8\)"),
    ]
    for i, (settings, sentence) in enumerate(cases):
        folder = tmp_path / str(i)
        save_encoder(small_encoder(**settings), folder)
        with pytest.raises(UserError, match=r"was made with model\.backbone\."):
            load_init(model, folder)
        (folder / "config.json").unlink()  # then only the shapes tell
        with pytest.raises(UserError, match=sentence):
            load_init(model, folder)
    state = SMTC(SMALL).state_dict()
    del state["mlp_slot.0.weight"]
    safetensors.torch.save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"mlp_slot.0.weight is missing. Use"):
        load_init(model, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"dino.pth is no file of ours.*smtc convert"):
        load_init(model, files / "dino.pth")


def test_converted_dino_is_an_encoder(files: Path, tmp_path: Path) -> None:
    report = convert(files / "dino_full.pth", tmp_path / "out")
    assert "backbone.blocks -> encoder.blocks (144 tensors)" in str(report)
    assert "left out (projection head): backbone.head.mlp.0.weight, backbone.head" in str(report)
    assert f"written to {tmp_path / 'out'}" in str(report)
    assert "ViT, patch 16" in str(report) and "150 tensors taken" in str(report)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["backbone"] == to_dict(VIT_S)
    encoder = build_encoder(VIT_S)
    load_encoder_weights(encoder, tmp_path / "out")
    expect_equal(encoder.state_dict(), fill(dino_shapes()))
    with pytest.raises(UserError, match="in our format already"):
        convert(tmp_path / "out", tmp_path / "again")


def test_convert_reads_the_patch_from_the_shapes(tmp_path: Path) -> None:
    shapes = dino_shapes(patch=8)
    torch.save(fill(shapes), tmp_path / "dino8.pth")
    convert(tmp_path / "dino8.pth", tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["backbone"]["patch"] == 8
    shapes["pos_embed"] = (1, 197, 384)
    torch.save(fill(shapes), tmp_path / "mixed.pth")
    with pytest.raises(
        UserError, match=r"encoder.pos_embed is \(1, 197, 384\) instead of \(1, 785"
    ):
        convert(tmp_path / "mixed.pth", tmp_path / "no")
    base = {"patch_embed.proj.weight": torch.zeros(768, 3, 16, 16), "blocks.0.x": torch.zeros(1)}
    torch.save(base, tmp_path / "base.pth")
    with pytest.raises(UserError, match="a ViT of width 768 with 1 blocks; only ViT-S"):
        convert(tmp_path / "base.pth", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_converted_moco_starts_a_resnet_model(files: Path, tmp_path: Path) -> None:
    report = convert(files / "moco.pth.tar", tmp_path)
    assert "module.encoder_q.layer4 -> encoder.layer4" in str(report)
    encoder = build_encoder(RESNET)
    assert load_encoder_weights(encoder, tmp_path).initial == ("project.weight", "project.bias")
    moco = torch.load(files / "moco.pth.tar")["state_dict"]
    wanted = moco["module.encoder_q.layer4.2.bn3.running_var"]
    assert torch.equal(encoder.state_dict()["layer4.2.bn3.running_var"], wanted)
    model = SMTC(ModelConfig(backbone=RESNET, resolution=(32, 32)))
    initial = load_init(model, tmp_path).initial
    assert "encoder.project.weight" in initial and "transport_proj.bias" in initial
    assert not any(name.startswith("encoder.layer") for name in initial)


def test_the_converted_authors_model_is_the_authors_model(files: Path, tmp_path: Path) -> None:
    report = convert(files / "authors.pth", tmp_path)
    assert (len(report.loaded), report.values) == (174, 23_109_120)
    assert "left out (training state): iteration, optimizer_state_dict, loss" in str(report)
    model = load_model(tmp_path)
    assert model.config == presets.official_v2().model
    expect_equal(model.state_dict(), fill(authors_shapes()))


def test_hash_is_that_of_the_weights(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"abc")
    assert checkpoint_hash(tmp_path) == "ba7816bf8f01cfea"
    assert checkpoint_hash(tmp_path / "model" / "model.safetensors") == "ba7816bf8f01cfea"
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint_hash(tmp_path / "none.pth")


@pytest.mark.parametrize("name", ["dino.pth", "moco.pth.tar"])
def test_an_encoder_file_is_no_model(name: str, files: Path) -> None:
    with pytest.raises(UserError, match=f"{name} holds an encoder only .*model.backbone.weights"):
        load_model(files / name)
