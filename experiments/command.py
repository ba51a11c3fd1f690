"""From the command line to the library: flags, logging and exit codes that all mains share.

Exit codes: 0 done, 1 not finite, 2 a config, data or checkpoint that cannot be used, 130 interrupted.
"""

import logging
import sys
from collections.abc import Callable

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from experiments import runtime


def show_progress_of_library():
  """Log lines of srm_jax go to stderr; those of the libraries below it only from warnings on."""
  handler = logging.StreamHandler(sys.stderr)
  handler.setFormatter(logging.Formatter('%(message)s'))
  logger = logging.getLogger('srm_jax')
  logger.addHandler(handler)
  logger.setLevel(logging.INFO)
  logger.propagate = False
  for name in ('absl', 'jax', 'jax._src.xla_bridge', 'orbax', 'matplotlib'):
    logging.getLogger(name).setLevel(logging.ERROR)


def guarded(action: Callable[[], None]):
  """Runs the action; what a user can mend is one line and an exit code, not a traceback."""
  from srm_jax.hosts import HostError
  from srm_jax.train import NonFiniteError

  try:
    action()
  except NonFiniteError as error:
    sys.exit(_say(error, 1))
  except (ValueError, FileNotFoundError, HostError) as error:
    logging.getLogger('srm_jax').debug('', exc_info=True)
    sys.exit(_say(error, 2))
  except KeyboardInterrupt as error:
    sys.exit(_say(error, 130))


def _say(error, code: int) -> int:
  print(f'error: {error}' if code != 130 else f'{error or "interrupted; the same command continues"}', file=sys.stderr)
  return code


def names_bfloat16(config: ConfigDict) -> bool:
  """Whether anything in a config is of that type."""
  return '"bfloat16"' in config.to_json_best_effort()


def launch(action: Callable, *, several_hosts: bool = False):
  """action(config, workdir), with --config=FILE.py[:arg], --config.key=value and --workdir=DIR; several_hosts: and with
  --hosts.
  """
  config = config_flags.DEFINE_config_file(
      'config', None, 'FILE.py[:arg] with get_config; override with --config.key=value.',
  )
  workdir = flags.DEFINE_string('workdir', None, 'Where results go; the same command continues a stopped run.')
  hosts = flags.DEFINE_string(
      'hosts', '', "'auto' where the cluster tells, or ADDRESS:PORT,COUNT,INDEX; '' for one host.",
  ) if several_hosts else None
  flags.mark_flags_as_required(['config', 'workdir'])

  def run():
    if several_hosts and hosts.value:
      runtime.join_hosts(hosts.value)
    action(config.value, workdir.value)

  def main(argv):
    if len(argv) > 1:
      raise app.UsageError(f'unexpected arguments {argv[1:]}')
    show_progress_of_library()
    runtime.prepare(bfloat16=names_bfloat16(config.value))
    guarded(run)

  app.run(main)
