"""Secure channels: who is at the other end, and nobody in between. Noise or TLS, never plaintext."""
