"""Every other text-to-image pipeline, run by the optional library diffusers."""
