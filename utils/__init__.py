"""Finding and deactivating the neurons that make a Stable Diffusion model memorize (NeMo)."""
