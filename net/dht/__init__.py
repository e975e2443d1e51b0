"""Kademlia: who is near a key, and the signed records that lie there."""
