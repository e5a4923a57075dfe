"""From files to augmented clips."""
