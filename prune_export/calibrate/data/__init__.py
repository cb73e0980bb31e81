"""Token sets, from texts that a recipe names."""
