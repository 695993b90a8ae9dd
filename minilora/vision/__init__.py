"""Beyond language: a vision transformer and a diffusion model of the same blocks."""
