"""A trained network and real images that ship with SPIR, so that the first steps need no download."""
