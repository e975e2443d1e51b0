"""Whether others can reach us, and what can be done so that they can."""
