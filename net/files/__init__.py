"""Files between peers: known by what is in them, fetched from several holders at once, verified piece by piece."""
