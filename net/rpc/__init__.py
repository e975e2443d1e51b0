"""Calls between peers: framed messages on one long-lived stream, answered in order."""
