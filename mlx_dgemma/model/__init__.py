"""The network: config, weights, encoder pass, decoder pass, context cache, vision tower."""
