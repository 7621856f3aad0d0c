"""Know a sampler's error before running it, and optimise schedules and processes for few steps."""
