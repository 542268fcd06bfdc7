"""The ops of the language, one file each: fields, infer, bounds, reference, corners."""
