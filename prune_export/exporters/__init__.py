"""Exporters turn a checkpoint into an engine and open it again; one file each."""
