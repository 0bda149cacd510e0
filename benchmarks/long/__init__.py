"""Long sequences: time and memory against the length, and ladders beside two levels."""
