"""Named pipelines with typed options, one file each."""
