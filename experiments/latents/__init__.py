"""Latent diffusion of one's own: an autoencoder, and a network of its latents told by text."""
