"""Backends: one way of running a module a file."""
