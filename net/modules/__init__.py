"""Modules that are published: signed manifests, where they are kept, who has them."""
