"""Launchers: they run `python -m plm.train` and read its files; they import nothing of a model."""
