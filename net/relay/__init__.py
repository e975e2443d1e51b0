"""Circuit relay v2: peers that cannot reach each other meet at one that both can reach."""
