"""The algorithms: forward, tangent, backward, and the rules of JAX for them."""
