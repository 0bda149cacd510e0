"""Do heads behave like wavelets? Metrics of two pretrained models beside null models, and what they say of errors."""
