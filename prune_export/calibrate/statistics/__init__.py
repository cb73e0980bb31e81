"""What a method may ask of a calibration pass, and what gathers it."""
