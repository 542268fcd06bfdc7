"""Other tools as workers, each in a virtual environment of its own, so that they take turns with SPIR in one run."""
