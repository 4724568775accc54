"""Driver side: which rows, where to, and what is true afterwards; README.md beside this file maps the modules."""
