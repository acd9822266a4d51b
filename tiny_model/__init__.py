"""The small Stable Diffusion that memorizes, and everything that makes it (see README.md)."""
