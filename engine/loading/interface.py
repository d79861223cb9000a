"""What the engine asks of the configs of a family's two networks, whichever they are. No torch here."""

from __future__ import annotations

from typing import Protocol


class DenoiserConfig(Protocol):
    """What the engine asks of any denoiser's config: latents in and out, and what it is told beside them."""

    @property
    def in_channels(self) -> int:
        """Channels of the noisy latents."""

    @property
    def out_channels(self) -> int:
        """Channels of the prediction."""

    @property
    def context_dim(self) -> int:
        """Features of one token's state."""

    @property
    def pooled_dim(self) -> int | None:
        """Features of the prompt's pooled state; None where it takes none."""

    @property
    def sample_size(self) -> int:
        """Cells along a side of the latents that it was trained on."""

    @property
    def patch_size(self) -> int:
        """Cells along a side of what it sees as one token: the latents' sides are multiples of it."""

    @property
    def side_limit(self) -> int | None:
        """Cells along a side of the latents at most; None where there is no limit."""

    @property
    def distilled_guidance(self) -> bool:
        """Whether it is told the guidance scale, `guidance (n,)`, so that there is no unconditional pass."""


class AutoencoderConfig(Protocol):
    """What the engine asks of any autoencoder's config."""

    @property
    def denoiser_channels(self) -> int:
        """Channels of the latents that the denoiser works on."""

    @property
    def factor(self) -> int:
        """Pixels per latent cell along one side: the paper's f."""

    @property
    def scaling_factor(self) -> float:
        """The denoiser's latents are `(latents - shift_factor) * scaling_factor`."""

    @property
    def shift_factor(self) -> float:
        """As above."""

    @property
    def force_upcast(self) -> bool:
        """Whether its values overflow in half precision, so that it runs in fp32."""

    @property
    def decoder_width(self) -> int:
        """Features per pixel of the largest activation while decoding."""
