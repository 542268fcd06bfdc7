"""Trainable modules that frontends know as leaves."""
