"""What processes say to each other; never imports numba."""
