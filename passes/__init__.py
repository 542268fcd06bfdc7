"""Passes: one rewrite a file, named as in the pipeline."""
