"""What budgets chosen from data save on another text, beside one budget for all heads, and what foretells errors."""
