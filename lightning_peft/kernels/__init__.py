"""Everything that is only speed: each piece computes what a plain formula of torch says, and is tested against it."""
