"""Model directories: a lazy reader, a header-first writer, GGUF in."""
