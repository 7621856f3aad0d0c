"""Samplers of densities that learn: controlled diffusions in one table, their losses, and draws with exact weights."""
