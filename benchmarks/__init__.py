"""Benchmarks of SPIR: trained networks, real data and the programs that measure them."""
