"""What several methods share, by family; no recipe names anything in here."""
