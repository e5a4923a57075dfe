"""A label-free warm start of a small encoder: the trainer's second method.

SMTC starts from an encoder that knows textures (DINO, MoCo); from random weights its losses fall
and its masks find nothing. Here the small encoder learns them in a few hundred steps: a token of
one frame should have the embedding that its neighbourhood has in another frame of the clip, seen
through other colours (VICReg: Bardes et al., 2022). Removing each clip's mean first leaves only
what tells places *within* a clip apart; without it the encoder learns to recognise clips.
"""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smtc.backbones import Encoder, build_encoder
from smtc.compatibility import check_settings
from smtc.config import Config
from smtc.errors import UserError
from smtc.keyed_random import keyed_bits, keyed_uniform
from smtc.method import Method
from smtc.pipelines.batch import Batch
from smtc.weights import save_encoder

_SHIFT_STREAM = 4
_GREY_STREAM = 5
_LUMA = (0.299, 0.587, 0.114)


class WarmStart(Method):
    """An encoder with a neck, and the batch norm inside the neck that training needs and the result
    does not.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        if not config.model.backbone.neck:
            raise UserError("The warm start trains a neck; set model.backbone.neck to its width.")
        check_settings(config, "warm_start")
        if config.init is not None or config.model.backbone.weights is not None:
            raise UserError(
                "The warm start begins with random weights; leave out --init and weights."
            )
        self.config = config
        self.encoder = build_encoder(config.model.backbone, config.model.attention)
        self.norm = nn.BatchNorm1d(config.model.backbone.neck)
        self.luma: Tensor
        self.register_buffer("luma", torch.tensor(_LUMA).view(3, 1, 1), persistent=False)

    def trainable(self, step: int) -> dict[str, nn.Parameter]:
        """The whole encoder but what its feature leaves without gradient."""
        dead = {f"encoder.{name}" for name in self.encoder.unused_parameters()}
        return {n: p for n, p in self.named_parameters() if n not in dead}

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """VICReg between the first frame of one view and the last frame of the other."""
        settings = self.config.warm_start
        frames = torch.stack([batch.views[:, 0, 0], batch.views[:, 1, -1]], dim=1)
        frames = self._grey(frames, step)
        embeddings = self._embed(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])  # [B,2,L,D]
        mean = embeddings.mean(dim=(1, 2), keepdim=True)
        first, second = (embeddings - mean).unbind(dim=1)
        first, second = self._pair_up(first, second, batch.index, self.encoder.grid(frames))
        invariance = F.mse_loss(first, second)
        variance = (_variance_hinge(first) + _variance_hinge(second)) / 2
        covariance = (_off_diagonal(first) + _off_diagonal(second)) / 2
        centring = mean.square().mean()
        loss = (
            settings.invariance * invariance
            + settings.variance * variance
            + settings.covariance * covariance
            + settings.centring * centring
        )
        return {
            "loss": loss,
            "invariance": invariance,
            "variance": variance,
            "covariance": covariance,
            "centring": centring,
        }

    def save_model(self, folder: Path) -> None:
        """The encoder with the norm folded into its neck, for `--init`."""
        folded = copy.deepcopy(self.encoder)
        assert folded.neck is not None
        folded.neck.fold(self.norm)
        save_encoder(folded, folder)

    def encoders(self) -> list[Encoder]:
        """The one."""
        return [self.encoder]

    def _embed(self, frames: Tensor) -> Tensor:
        # Called as a module, which is what `train.compile` compiles.
        embeddings: Tensor = self.encoder(frames, norm=self.norm)
        return embeddings

    def _grey(self, frames: Tensor, step: int) -> Tensor:
        """The whole batch without colour at some steps, so that texture has to do."""
        # Drawn on the host, which needs no copy from the device.
        drawn = keyed_uniform(self.config.train.seed, torch.tensor([step]), _GREY_STREAM, 1)
        if float(drawn) >= self.config.warm_start.grayscale:
            return frames
        return (frames * self.luma).sum(dim=-3, keepdim=True).expand_as(frames)

    def _pair_up(
        self, first: Tensor, second: Tensor, index: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Tokens `[B,L,D]` and their positives, up to `shift` tokens away (at the border: the
        border token).
        """
        shift = self.config.warm_start.shift
        bits = keyed_bits(self.config.train.seed, index, _SHIFT_STREAM, 2)
        dy, dx = (bits % (2 * shift + 1) - shift).unbind(dim=1)
        rows = (torch.arange(grid[0], device=index.device) + dy[:, None]).clamp(0, grid[0] - 1)
        columns = (torch.arange(grid[1], device=index.device) + dx[:, None]).clamp(0, grid[1] - 1)
        place = (rows[:, :, None] * grid[1] + columns[:, None, :]).flatten(1)
        return first, second.gather(1, place[..., None].expand_as(second))


def _variance_hinge(tokens: Tensor) -> Tensor:
    deviation = torch.sqrt(tokens.flatten(0, 1).var(dim=0) + 1e-4)
    return F.relu(1 - deviation).mean()


def _off_diagonal(tokens: Tensor) -> Tensor:
    """Squared covariances of different features, summed and divided by their number D."""
    rows = tokens.flatten(0, 1)
    covariance = torch.cov(rows.T)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / rows.shape[1]
