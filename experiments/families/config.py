"""What a comparison of the families is: sizes, steps, what they are judged by."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run is."""

    seed: int = 0
    """Of everything random."""
    width: int = 256
    """Of the network of DDPM and of flow matching."""
    depth: int = 4
    """Its residual blocks."""
    half_width: int = 264
    """Of encoder, decoder, generator and discriminator."""
    half_depth: int = 3
    """Their residual blocks."""
    latent: int = 32
    """Numbers in the latent of VAE and GAN."""
    dropout: float = 0.1
    """In the blocks of all networks but the GAN's."""
    batch_size: int = 128
    """Images an update."""
    num_steps: int = 4000
    """Updates of VAE, DDPM and flow matching."""
    decay_steps: int | None = None
    """Updates over which their learning rate decays: all of them."""
    learning_rate: float = 1e-3
    """Peak learning rate of their AdamW."""
    warmup_steps: int = 100
    """Updates over which it rises."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    ema_decay: float = 0.999
    """Decay of the moving average of the parameters, which samples and is judged."""
    gan_steps: int = 1700
    """Updates of the GAN, each of both networks, as many operations as the others' have."""
    gan_learning_rate: float = 1e-3
    """Learning rate of its Adam, with no momentum."""
    slope_penalty: float = 1.0
    """Weight of the squared slope of the discriminator at real images."""
    chain_steps: int = 1000
    """Steps of DDPM's chain."""
    log_snr_low: float = -10.0
    """Log-SNR of DDPM's noisiest training times."""
    log_snr_high: float = 12.0
    """Log-SNR of its cleanest, and of the data end of both probability flows."""
    ddpm_sampler: tuple[str, int] = ("ancestral", 250)
    """Method and steps of DDPM's samples."""
    flow_sampler: tuple[str, int] = ("heun", 25)
    """Method and steps of flow matching's samples."""
    num_samples: int = 1500
    """Samples a family, as many as there are training images."""
    mixture_components: tuple[int, ...] = (2, 4, 6, 8, 10, 12, 16)
    """Numbers of components tried on a fifth of the training images, held out."""
    eval_images: int = 297
    """Held-out images whose likelihood is taken."""
    eval_tolerance: float = 1e-3
    """Relative and absolute tolerance of the probability flows."""
    num_probes: int = 4
    """Hutchinson probes an image of their divergence."""
    elbo_steps: int = 999
    """Steps of the chain that DDPM's bound is taken on."""
    elbo_draws: int = 4
    """Draws of that bound's noise an image."""
    weights: int = 256
    """Draws an image of the VAE's bounds."""
    reader_iterations: int = 300
    """Epochs at most of the classifier whose features judge."""
    checkpoint_every: int = 1000
    """Updates between checkpoints; the last is always saved."""
    log_every: int = 50
    """Updates between logged ones."""


PRESETS = {
    "full": Config(),
    "smoke": Config(
        width=16,
        depth=1,
        half_width=16,
        half_depth=1,
        latent=4,
        batch_size=16,
        num_steps=6,
        warmup_steps=2,
        gan_steps=4,
        ddpm_sampler=("ancestral", 4),
        flow_sampler=("heun", 4),
        num_samples=24,
        mixture_components=(1, 2),
        eval_images=6,
        eval_tolerance=1e-1,
        num_probes=1,
        elbo_steps=111,
        elbo_draws=1,
        weights=4,
        reader_iterations=3,
        checkpoint_every=4,
        log_every=2,
    ),
}
