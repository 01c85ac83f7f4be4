"""Draw and measure the claims of the theory, each with a number that could be otherwise."""
