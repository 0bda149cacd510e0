"""How tensors and threads reach the native module."""
