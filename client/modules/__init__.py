"""What was trained, as others get it: a folder of plain data, described, signed, fetched, checked."""
