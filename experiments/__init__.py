"""Experiments: a file is a page of the lab book, `get_config(arguments)` and perhaps `sweep(add, arguments)`."""
