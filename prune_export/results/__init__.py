"""Results, later: `opening` (their engines), `provenance` (where they are from), `reproduction`."""
