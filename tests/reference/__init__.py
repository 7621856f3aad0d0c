"""Numbers to test against: published, or computed by routes that share no code with the library."""
