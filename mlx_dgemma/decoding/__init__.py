"""The diffusion loop on ids alone: canvas, denoise, accept, renoise, stop, commit."""
