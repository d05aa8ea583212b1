"""ExpRL (arXiv 2606.17024) in JAX: prime a language model with reference solutions before sparse-reward RL."""
