"""`python -m pipeline` is `run`."""

from pipeline.cli import main

main()
