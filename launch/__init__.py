"""Commands: `python -m launch.<name>`."""
