"""Sampling and scoring with a model, and strategies that spend more of it on a question."""

from srm_jax.inference.generate import make_generate as make_generate
