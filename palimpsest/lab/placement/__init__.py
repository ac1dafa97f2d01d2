"""Where to put full attention, learned: by layer, with both mixers and a gate; by token, with a router before the cache."""
