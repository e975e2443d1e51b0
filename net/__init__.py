"""Raceme's networking floor: hosts, transports, secure channels, streams, the DHT and RPC.

Nothing here knows torch or transformers. Import the module that you need; this package itself
imports nothing, so that a command's ``--help`` stays quick.
"""
