"""Latent spaces: between images and what the trunk sees; one file is one space."""
