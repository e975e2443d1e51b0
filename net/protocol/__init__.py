"""What nodes and clients say to each other: fields, bounds and versions, without I/O."""
