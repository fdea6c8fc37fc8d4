"""The terminal: the only package that imports typer, rich and prompt_toolkit."""
