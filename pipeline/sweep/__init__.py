"""Many pipelines at once: every order of a recipe's stages, what the jobs share, and what came out, side by side."""
