"""A latent diffusion model of one's own, told by text: from pixels to pictures."""
