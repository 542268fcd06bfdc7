"""Importers: models of other tools to modules of reals, one file each."""
