"""The weights that have a name here: who published them, where, and which encoder they are for.

Addresses: `hubconf.py` of github.com/facebookresearch/dino and the README of
github.com/facebookresearch/moco, which also states the first digits of the MD5. DINO's publisher
states no checksum.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from smtc.errors import UserError

_PUBLISHER = "https://dl.fbaipublicfiles.com"


@dataclass(frozen=True, kw_only=True)
class PublicWeights:
    """A file of its publisher's."""

    name: str
    """What `model.backbone.weights` calls it."""
    architecture: str
    patch: int
    address: str
    md5: str | None = None
    """The first digits, as far as the publisher states them."""

    @property
    def file_name(self) -> str:
        """The last part of the address."""
        return self.address.rpartition("/")[2]


PUBLISHED = (
    PublicWeights(
        name="dino",
        architecture="vit_small",
        patch=16,
        address=f"{_PUBLISHER}/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    ),
    PublicWeights(
        name="dino",
        architecture="vit_small",
        patch=8,
        address=f"{_PUBLISHER}/dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth",
    ),
    PublicWeights(
        name="moco",  # version 2, 800 epochs
        architecture="resnet50",
        patch=16,
        address=f"{_PUBLISHER}/moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar",
        md5="a04e12f8",
    ),
)
PUBLIC_NAMES = frozenset(known.name for known in PUBLISHED)


def published(weights: object, architecture: str, patch: int) -> PublicWeights | None:
    """What `weights` names for an encoder, or None where it is no name but a path.

    Only a text that is a name and nothing else counts as one: `./dino` is a path. Errors:
    `UserError` where the encoder is not the one that the name's weights are for.
    """
    named = [known for known in PUBLISHED if known.name == weights]
    for known in named:
        if (known.architecture, known.patch) == (architecture, patch):
            return known
    if not named:
        return None
    patches = " or ".join(str(known.patch) for known in named)
    raise UserError(
        f"The weights {weights} are those of a {named[0].architecture} of patch {patches}, not of "
        f"a {architecture} of patch {patch}; change model.backbone.architecture and .patch, or "
        "give other weights."
    )


def weights_folder() -> Path:
    """Where downloaded weights are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smtc" / "weights"
