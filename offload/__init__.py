"""The streaming engine: tiers, chunks, lanes, the streamed layer."""
