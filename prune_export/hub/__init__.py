"""The Hugging Face Hub: `publishing` (results), `recipes`, `credentials` (refused in both)."""
