"""SimMIM (Xie et al., 2022): an encoder sees an image with some patches hidden, and one layer draws what was there.

    image -> patch embedding, hidden tokens replaced by the mask token -> encoder -> 1 x 1 convolution -> pixels

Names and shapes of parameters are the official ones: those of the encoder under `encoder.`, with `encoder.mask_token`,
and `decoder.0`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_scale.errors import UserError
from swin_scale.models.init import init_parameters
from swin_scale.models.layers import PatchProjection, compute_dtype
from swin_scale.models.swin import Swin

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

    def forward(self, x: Tensor, mask: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The mean absolute error over masked pixels, 0-d, in fp32 at least; (loss, aux) for an encoder with experts.

        Args:
            x: (B, in_chans, H, W), normalised images.
            mask: (B, H / patch, W / patch), 1 where a token is hidden, of any dtype.
        """
        drawn, aux = self._draw(x, mask)
        error_B, count_B = self._errors(x, mask, drawn)
        loss = error_B.sum() / (count_B.sum() + COUNT_FLOOR) / self.variant.in_chans
        return loss if aux is None else (loss, aux)

    def losses(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B,) losses of the images one by one, and the auxiliary loss or None; arguments as of `forward`.

        Their mean is `forward` where all images have equally many masked pixels, as those of `data.masking` have.
        """
        drawn, aux = self._draw(x, mask)
        error_B, count_B = self._errors(x, mask, drawn)
        return error_B / (count_B + COUNT_FLOOR) / self.variant.in_chans, aux

    @torch.no_grad()
    def reconstruct(self, x: Tensor, mask: Tensor) -> Tensor:
        """What the model draws, (B, in_chans, H, W), everywhere and on the scale of `x`.

        Under `norm_target` it draws standardised pixels, which get the local mean and deviation of `x` back.
        """
        drawn = self._draw(x, mask)[0].to(compute_dtype(x))
        if self.norm_target is None:
            return drawn
        mean, variance = local_moments(x.to(drawn.dtype), self.norm_target)
        return drawn * (variance + VARIANCE_FLOOR).sqrt() + mean

    def init_weights(self, seed: int = 0) -> None:
        """Initialise every parameter by the official rules (`models.init`) and rebuild the derived buffers."""
        init_parameters(self, seed)
        self.rebuild_buffers()

    def rebuild_buffers(self, device: torch.device | None = None) -> None:
        """Fill the encoder's derived buffers."""
        self.encoder.rebuild_buffers(device)

    def _draw(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        tokens = self.encoder.embed(x)
        if mask.shape != tokens.shape[:3]:
            raise UserError(f"mask of shape {tuple(mask.shape)} for tokens {tuple(tokens.shape[:3])}: give one entry "
                            f"for each patch of {self.variant.patch_size} pixels")  # fmt: skip
        token = self.encoder.get_parameter("mask_token").to(tokens.dtype)
        outputs, losses, _ = self.encoder.encode(torch.where(mask.bool()[..., None], token, tokens))
        features = self.encoder.norm(outputs[-1]).permute(0, 3, 1, 2)
        return self.decoder(features), torch.stack(losses).sum() if self.is_moe else None

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
