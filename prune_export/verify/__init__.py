"""Measures what is claimed: reload, parity, quality, speed."""
