"""Methods that make weights zero."""
