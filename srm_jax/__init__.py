"""srm_jax: small reasoning models in JAX, from annotation to evaluation."""

__version__ = '0.1.0'
