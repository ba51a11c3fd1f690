"""Installs srm_jax: `pip install -c experiments/constraints.txt -e '.[test]'`, or let the scripts do it."""

import setuptools

# Lower bounds are the oldest versions that the tests have passed with; constraints.txt pins what they pass with today.
REQUIREMENTS = [
  'absl-py>=2.5',
  'array-record>=0.8.6',
  'chex>=0.1.92',
  'etils[epath]>=1.15.0',
  'flax>=0.12.8',
  'grain>=0.2.18',
  'jax>=0.10.2',
  'jinja2>=3.1.6',
  'latex2sympy2-extended>=1.11.0',
  'math-verify>=0.9.0',
  'matplotlib>=3.11',
  'ml-collections>=1.1.0',
  'ml-dtypes>=0.6.0',
  'numpy>=2.4',
  'optax>=0.2.8',
  'orbax-checkpoint>=0.12.8',
  'pandas>=3.1',
  'reasoning-gym>=0.1.25',
  'rich>=15.0',
  'scipy>=1.17',
  'sentencepiece>=0.2.3',
  'tensorboardX>=2.6.5',
  'tensorflow-datasets>=4.9.10',
  'tokenizers>=0.23.3',
]

EXTRAS = {
  'bench': ['peft>=0.21', 'torch>=2.13', 'transformers>=5.23', 'trl>=1.16'],
  'cuda': ['jax[cuda12]'],
  'gcs': ['gcsfs>=2026.8'],
  'notebooks': ['ipykernel>=7.0', 'nbclient>=0.10', 'nbformat>=5.10'],
  'test': ['pytest>=9.0', 'pytest-xdist>=3.8', 'safetensors>=0.8.0'],
  'tpu': ['jax[tpu]'],
}

setuptools.setup(
  name='srm_jax',
  version='0.1.0',
  description='Trains, studies and runs small reasoning models in JAX, from a laptop CPU to a TPU pod.',
  license='Apache-2.0',
  license_files=['LICENSE'],
  python_requires='>=3.11',
  packages=setuptools.find_namespace_packages(include=['srm_jax*', 'experiments*', 'configs*']),
  # Naming the root makes an editable install one path entry, so that a new folder needs no new install.
  package_dir={'': '.'},
  install_requires=REQUIREMENTS,
  extras_require=EXTRAS,
)
