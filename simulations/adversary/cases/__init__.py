"""The cases of the threat model, each with its variants, one file per case."""
