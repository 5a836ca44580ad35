"""The LM head: an algorithm in chunks of tokens over the row kernels of any backend."""
