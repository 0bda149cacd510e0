"""Other libraries' models with the attention of this package; each module imports its library, this one none."""
