"""Foreign libp2p peers: fetched into a cache by package name and version, started, driven, ended."""
