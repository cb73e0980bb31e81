"""Text for people to see: `escapes` (characters that deceive), `notebook` (tables in HTML)."""
