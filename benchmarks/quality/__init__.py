"""What stands for blocks that are not exact, and which blocks are: errors on real heads, and errors at equal time."""
