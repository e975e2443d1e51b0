"""The engine on a GPU; where there is none, the same tests run on the CPU."""
