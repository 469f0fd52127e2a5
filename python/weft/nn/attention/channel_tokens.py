"""Patches of every channel of an image as tokens of their own."""

import torch
from torch import Tensor, nn

from weft.nn.attention.heads import size_pair
from weft.nn.checks import check_features, check_labels, check_sizes


def sample_channels(count: int) -> Tensor:
    """Hierarchical channel sampling: a number m from 1 to ``count``, every one as likely, then m
    of ``count`` channels without replacement, ``(m,)`` int64, rising; on the CPU.

    Source: Bao et al., "Channel Vision Transformers: An Image Is Worth C x 16 x 16 Words",
    ICLR 2024, section 3.2.
    """
    check_sizes(count=count)
    taken = int(torch.randint(1, count + 1, ()))
    return torch.randperm(count)[:taken].sort().values


class ChannelPatchEmbedding(nn.Module):
    r"""ChannelViT's tokens: patches of each channel by one projection, plus what channel it is.

    .. math::
        x_{cp} = W \, \text{patch}_{cp} + b + \text{position}_p + \text{channel}_c

    A plain vision transformer then attends over the C P tokens, and reasons across places and
    channels. In training each batch has some of the channels (:func:`weft.nn.sample_channels`): it
    is shorter, and the network learns to work where channels are missing.

    Args:
        image_size, patch_size: height and width, one integer where both are the same; the image is
            a multiple of the patch.
        num_channels: of all channels that there may be.
        dim: D.
        sampling: whether channels are sampled in training.
        device, dtype: of the parameters.

    Attributes:
        proj: the projection, a convolution of one channel.
        position: ``(P, D)``. channel: ``(num_channels, D)``.

    Shapes: images ``(B, C, height, width)`` and ``channels`` ``(B, C)`` int64, which channels these
    are, or None for all in their order, give ``(B, C' P, D)``, channel by channel, and which
    channels these C' are, ``(B, C')``; they keep the order that they had.

    Raises:
        ValueError: sizes, images or channels of another shape or out of range.
        TypeError: images that are not floating-point, channels that are not int64.

    Source: Bao et al., "Channel Vision Transformers: An Image Is Worth C x 16 x 16 Words",
    ICLR 2024, sections 3.1 and 3.2.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        num_channels: int,
        dim: int,
        *,
        sampling: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(num_channels=num_channels, dim=dim)
        image, patch = size_pair("image_size", image_size), size_pair("patch_size", patch_size)
        if any(a % b for a, b in zip(image, patch, strict=True)):
            raise ValueError(f"image_size must be a multiple of patch_size, got {image}, {patch}")
        self.image_size, self.num_channels, self.sampling = image, num_channels, sampling
        factory = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(1, dim, patch, patch, **factory)
        places = (image[0] // patch[0]) * (image[1] // patch[1])
        self.position = nn.Parameter(torch.empty(places, dim, **factory))
        self.channel = nn.Parameter(torch.empty(num_channels, dim, **factory))
        for embedding in (self.position, self.channel):
            nn.init.trunc_normal_(embedding, std=0.02)

    def forward(self, x: Tensor, channels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_features("x", x)
        if x.dim() != 4 or tuple(x.shape[2:]) != self.image_size or not x.shape[1]:
            height, width = self.image_size
            raise ValueError(
                f"x must be (B, C, {height}, {width}) with C >= 1, got {tuple(x.shape)}"
            )
        B, C = x.shape[:2]
        if channels is None:
            if C != self.num_channels:
                raise ValueError(
                    f"channels must be given for {C} of {self.num_channels} channels, got None"
                )
            channels = torch.arange(C, device=x.device).expand(B, C)
        check_labels("channels", channels, (B, C), self.num_channels)
        if self.training and self.sampling:
            taken = sample_channels(C).to(x.device)
            x, channels = x[:, taken], channels[:, taken]
        tokens = self.proj(x.flatten(0, 1)[:, None]).flatten(2).mT
        tokens = tokens.unflatten(0, channels.shape)
        tokens = tokens + self.position + self.channel[channels][:, :, None]
        return tokens.flatten(1, 2), channels

    def extra_repr(self) -> str:
        return (
            f"image_size={self.image_size}, num_channels={self.num_channels}, "
            f"sampling={self.sampling}"
        )
