"""Methods that rotate the residual states before they narrow them."""
