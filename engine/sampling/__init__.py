"""From noise to latents: schedule, timesteps, levels, solvers, and the table of samplers."""
