"""Methods that narrow towards a measured speed."""
