"""SimMIM (Xie et al., 2022): an encoder sees an image with some patches hidden, and one layer draws what was there.

    image -> patch embedding, hidden tokens replaced by the mask token -> encoder -> 1 x 1 convolution -> pixels

Names and shapes of parameters are the official ones: those of the encoder under `encoder.`, with `encoder.mask_token`,
and `decoder.0`.
"""

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_scale.errors import UserError
from swin_scale.models.geometry import Stage
from swin_scale.models.init import init_parameters
from swin_scale.models.layers import PatchProjection, compute_dtype
from swin_scale.models.swin import Swin
from swin_scale.moe.stats import RoutingStats

COUNT_FLOOR = 1e-5
"""Added to the number of masked pixels that the loss is divided by, as in the official code."""
VARIANCE_FLOOR = 1e-6


class SimMIM(nn.Module):
    """A headless `encoder` and the decoder of its last map, one convolution that gives stride x stride pixels a token.

    `norm_target`: side in pixels, odd, of the neighbourhood by which targets are standardised (see `local_moments`);
    None: targets are the pixels of the normalised image. Parameters are left to `init_weights`.
    """

    def __init__(self, encoder: Swin, norm_target: int | None = None) -> None:
        super().__init__()
        if norm_target is not None and (norm_target < 3 or not norm_target % 2):
            raise UserError(f"norm_target: {norm_target} is not an odd number of pixels from 3 on (47 in the recipes)")
        v = encoder.variant
        self.variant, self.norm_target = v, norm_target
        self.stride = v.patch_size << (len(v.depths) - 1)
        self.encoder = encoder
        self.encoder.register_parameter("mask_token", nn.Parameter(torch.empty(1, 1, v.embed_dim)))
        pixels = self.stride**2 * v.in_chans
        self.decoder = nn.Sequential(PatchProjection(encoder.num_features, pixels, 1), nn.PixelShuffle(self.stride))

    @property
    def is_moe(self) -> bool:
        """Whether the encoder has experts, so that `forward` returns an auxiliary loss too."""
        return self.encoder.is_moe

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Of the encoder."""
        return tuple(self.encoder.stages)

    def forward(
        self, x: Tensor, mask: Tensor, *, output: Literal["loss", "losses", "drawing"] = "loss", stats: bool = False
    ) -> Any:
        """The mean absolute error over masked pixels, 0-d, in fp32 at least; (loss, aux) for an encoder with experts.

        All that a model is asked for goes through here: ZeRO-3 gathers the parameters of what is called, and, while it
        is, those read off others, as the mask token is off the encoder.

        Args:
            x: (B, in_chans, H, W), normalised images; the encoder reads them in its own dtype, the loss in this one.
            mask: (B, H / patch, W / patch), 1 where a token is hidden, of any dtype.
            output: ``loss``; or ``losses``, (B,), of the images one by one, whose mean it is where all have equally
                many masked pixels, as those of `data.masking` have; or ``drawing``, alone, see `reconstruct`.
            stats: with experts, return the routing of their blocks by name as a third value, as `Swin.forward` does.

        Raises UserError for a mask of another size and for `stats` of a dense encoder.
        """
        if stats and not self.is_moe:
            raise UserError(f"stats: a dense {self.variant.family} encoder routes nothing; call it without")
        drawn, aux, routing = self._draw(x, mask)
        if output == "drawing":
            return self._unstandardised(drawn, x)
        error_B, count_B = self._errors(x, mask, drawn)
        if output == "loss":
            error_B, count_B = error_B.sum(), count_B.sum()
        loss = error_B / (count_B + COUNT_FLOOR) / self.variant.in_chans
        if aux is None:
            return loss
        return (loss, aux, routing) if stats else (loss, aux)

    def losses(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B,) losses of the images one by one, and the auxiliary loss or None; arguments as of `forward`."""
        found = self(x, mask, output="losses")
        return found if isinstance(found, tuple) else (found, None)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, mask: Tensor) -> Tensor:
        """What the model draws, (B, in_chans, H, W), everywhere and on the scale of `x`.

        Under `norm_target` it draws standardised pixels, which get the local mean and deviation of `x` back.
        """
        return self(x, mask, output="drawing")

    def frozen_position_bias(self) -> AbstractContextManager[None]:
        """See `Swin.frozen_position_bias`."""
        return self.encoder.frozen_position_bias()

    def init_weights(self, seed: int = 0) -> None:
        """Initialise every parameter by the official rules (`models.init`) and rebuild the derived buffers."""
        init_parameters(self, seed)
        self.rebuild_buffers()

    def rebuild_buffers(self, device: torch.device | None = None) -> None:
        """Fill the encoder's derived buffers."""
        self.encoder.rebuild_buffers(device)

    def _draw(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None, dict[str, RoutingStats]]:
        decoder = self.decoder[0]
        assert isinstance(decoder, PatchProjection)
        tokens = self.encoder.embed(x.to(decoder.weight.dtype))
        if mask.shape != tokens.shape[:3]:
            raise UserError(f"mask of shape {tuple(mask.shape)} for tokens {tuple(tokens.shape[:3])}: give one entry "
                            f"for each patch of {self.variant.patch_size} pixels")  # fmt: skip
        token = self.encoder.get_parameter("mask_token").to(tokens.dtype)
        outputs, losses, routing = self.encoder.encode(torch.where(mask.bool()[..., None], token, tokens))
        features = self.encoder.norm(outputs[-1]).permute(0, 3, 1, 2)
        return self.decoder(features), torch.stack(losses).sum() if self.is_moe else None, routing

    def _unstandardised(self, drawn: Tensor, x: Tensor) -> Tensor:
        drawn = drawn.to(compute_dtype(x))
        if self.norm_target is None:
            return drawn
        mean, variance = local_moments(x.to(drawn.dtype), self.norm_target)
        return drawn * (variance + VARIANCE_FLOOR).sqrt() + mean

    def _errors(self, x: Tensor, mask: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """For each image, the absolute errors summed over masked pixels and channels, and its masked pixels; (B,)."""
        dtype, patch = compute_dtype(x), self.variant.patch_size
        target = x.to(dtype)
        if self.norm_target is not None:
            target = standardised(target, self.norm_target)
        hidden = mask.to(dtype).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
        error = ((drawn.to(dtype) - target).abs() * hidden[:, None]).sum((1, 2, 3))
        return error, hidden.sum((1, 2))


def local_moments(x: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each pixel's `side` x `side` neighbourhood, cut at the border; x: (B, C, H, W)."""
    half = side // 2
    mean = F.avg_pool2d(x, side, stride=1, padding=half, count_include_pad=False)
    square = F.avg_pool2d(x.square(), side, stride=1, padding=half, count_include_pad=False)
    inside = F.avg_pool2d(torch.ones_like(x[:1, :1]), side, stride=1, padding=half, count_include_pad=True)
    count = inside * side**2
    return mean, ((square - mean.square()) * (count / (count - 1))).clamp_min(0)


def standardised(x: Tensor, side: int) -> Tensor:
    """x less its local mean, over its local deviation (SimMIM's NORM_TARGET); no gradient."""
    mean, variance = local_moments(x.detach(), side)
    return (x.detach() - mean) / (variance + VARIANCE_FLOOR).sqrt()
