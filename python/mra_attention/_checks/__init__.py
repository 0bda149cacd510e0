"""What the public functions check of their arguments, and the form in which the operators take them."""
