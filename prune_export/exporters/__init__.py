"""The exporters: each turns a checkpoint into an engine and opens it again; one package each."""
